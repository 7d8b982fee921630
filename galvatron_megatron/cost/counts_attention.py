"""Closed-form counts of norms, attention and the residual addition."""

from galvatron_megatron.cost.counts_builder import Builder
from galvatron_megatron.cost.counts_values import Operator, gemm
from galvatron_megatron.describe.model import Attention
from galvatron_megatron.errors import DescriptionError


def norm(b: Builder, name: str, input_name: str) -> None:
    """A layer or RMS norm of the residual stream; its input and its statistics are kept.

    The input is kept even where it is kept elsewhere under another name: it is one tensor of the residual
    stream, and the next addition makes a new one.
    """
    shapes, model = b.shapes, b.shapes.model
    tokens, hidden, size = shapes.stream_tokens, model.hidden_size, shapes.element_bytes
    statistics = 1 if model.normalization == "RMSNorm" else 2
    b.parameter(*[hidden] * statistics, sharded=False)
    b.keep(input_name, tokens * hidden * size)
    b.keep(f"{name} statistics", statistics * 4 * tokens)
    b.memory(name, 2 * tokens * hidden * size, 3 * tokens * hidden * size)


def residual_add(b: Builder, name: str) -> None:
    """Bias, dropout and addition to the residual stream; the dropout mask is kept, one byte an element."""
    shapes, model = b.shapes, b.shapes.model
    elements = shapes.stream_tokens * model.hidden_size
    dropout = model.hidden_dropout > 0
    if dropout:
        b.keep(f"{name} dropout mask", elements)
    size = shapes.element_bytes
    mask = elements if dropout else 0
    b.memory(name, 3 * elements * size + mask, (3 + 2 * dropout) * elements * size + mask)


def attention(b: Builder, part: Attention) -> None:
    """Norm, projections, core attention and residual addition of self-attention."""
    shapes, model = b.shapes, b.shapes.model
    tokens, stream, size, hidden = (
        shapes.gemm_tokens,
        shapes.stream_tokens,
        shapes.element_bytes,
        model.hidden_size,
    )
    heads = shapes.per_shard(part.heads, "attention heads")
    groups = shapes.per_shard(part.query_groups, "query_groups")
    query, key = heads * part.head_dim, groups * part.head_dim

    norm(b, "attention norm", "attention input")
    b.keep("attention norm output", stream * hidden * size)
    b.enter_tensor_parallel()
    b.parameter((query + 2 * key) * hidden, sharded=True)
    if part.qkv_bias:
        b.parameter(query + 2 * key, sharded=True)
    b.linear("qkv projection", tokens, query + 2 * key, hidden)
    if part.qk_layernorm:
        _qk_norm(b, part, heads, groups)
    if model.position_embedding == "rope":
        b.memory("rotary embedding", 2 * tokens * (query + key) * size, 2 * tokens * (query + key) * size)
    core_attention(
        b, heads=part.heads, groups=part.query_groups, head_dim=part.head_dim, v_head_dim=part.head_dim
    )
    b.parameter(hidden * query, sharded=True)
    if part.output_bias:
        b.parameter(hidden, sharded=False)
    b.linear("output projection", tokens, hidden, query)
    b.leave_tensor_parallel()
    residual_add(b, "attention residual")


def _qk_norm(b: Builder, part: Attention, heads: int, groups: int) -> None:
    shapes = b.shapes
    statistics = 1 if shapes.model.normalization == "RMSNorm" else 2
    b.parameter(*[part.head_dim] * (2 * statistics), sharded=False)
    rows = shapes.gemm_tokens * (heads + groups)
    elements = rows * part.head_dim * shapes.element_bytes
    b.keep("query and key before their norm", elements)
    b.keep("query and key norm statistics", statistics * 4 * rows)
    b.memory("query and key norm", 2 * elements, 3 * elements)


def core_attention(b: Builder, *, heads: int, groups: int, head_dim: int, v_head_dim: int) -> None:
    """Softmax(Q K^T) V with fused kernels or with a kept score matrix; heads are those of the whole layer."""
    shapes, model, strategy = b.shapes, b.shapes.model, b.shapes.strategy
    size = shapes.element_bytes
    if heads % strategy.tp or (groups % strategy.tp and not shapes.is_ulysses):
        raise DescriptionError(
            f"counts attention heads: {heads}/{groups} are not divisible by tp {strategy.tp}"
        )
    heads, groups = heads // strategy.tp, max(1, groups // strategy.tp)
    seq_q = model.seq_length // strategy.cp
    seq_k = model.seq_length
    tokens = shapes.cp_tokens
    query, key, value = (
        tokens * heads * head_dim * size,
        tokens * groups * head_dim * size,
        tokens * groups * v_head_dim * size,
    )
    output = tokens * heads * v_head_dim * size
    _exchange(b, query + key + value, output, key + value)
    b.keep("query, key and value", query + key + value)
    b.keep("attention output", output)
    scores = shapes.samples * heads * seq_q * seq_k
    if not model.fused_attention:
        _score_matrix(b, heads, scores, seq_q, seq_k, head_dim, v_head_dim)
        return
    if shapes.fused and shapes.samples > 1:
        # Flash attention keeps its output batch-first; the output projection keeps it again sequence-first.
        b.keep("attention output, batch first", output)
    b.keep("attention log-sum-exp", shapes.samples * heads * seq_q * 4, in_core_attention=True)
    shape = (shapes.samples, heads, groups, seq_q, seq_k, head_dim)
    pair = 2 * scores
    traffic = query + key + value + output
    b.recomputed.add("core attention")
    b.operators += [
        Operator(
            name="core attention",
            kind="attention",
            phase=phase,
            flops=pair * (qk * head_dim + av * v_head_dim),
            bytes=factor * traffic,
            shape=shape,
        )
        for phase, qk, av, factor in (("forward", 1, 1, 1), ("backward", 3, 2, 2))
    ]


def _score_matrix(
    b: Builder, heads: int, scores: int, seq_q: int, seq_k: int, head_dim: int, v_head_dim: int
) -> None:
    """Unfused attention keeps softmax, dropout mask and dropped softmax (arXiv 2205.05198, 5as/h)."""
    size, model = b.shapes.element_bytes, b.shapes.model
    batch = b.shapes.samples * heads
    fp32_softmax = 4 if not b.shapes.fused and size != 4 else 0
    b.keep("attention probabilities", scores * (size + fp32_softmax), in_core_attention=True)
    if model.attention_dropout > 0:
        b.keep("attention dropout", scores * (size + 1), in_core_attention=True)
        b.memory("attention dropout", scores * (2 * size + 1), scores * (2 * size + 1))
    b.recomputed |= {"attention scores", "attention softmax", "attention dropout", "attention context"}
    b.memory("attention softmax", 2 * scores * size, 3 * scores * size)
    for name, n, k in (("attention scores", seq_k, head_dim), ("attention context", v_head_dim, seq_k)):
        b.operators += [
            gemm(name, "forward", batch, seq_q, n, k, element_bytes=size),
            gemm(name, "backward", batch, seq_q, k, n, element_bytes=size),
            gemm(name, "backward", batch, k, n, seq_q, element_bytes=size),
        ]


def _exchange(b: Builder, qkv: int, output: int, key_value: int) -> None:
    """Ulysses' all-to-alls (arXiv 2309.14509) and the ring of context parallelism (arXiv 2310.01889)."""
    strategy = b.shapes.strategy
    if b.shapes.is_ulysses:
        for phase in ("forward", "backward"):
            b.collective("all_to_all", "tp", phase, qkv)
            b.collective("all_to_all", "tp", phase, output)
    if strategy.cp > 1:
        b.collective("send", "cp", "forward", key_value, strategy.cp - 1)
        b.collective("send", "cp", "backward", 2 * key_value, strategy.cp - 1)
