"""Closed-form counts of norms, self-attention and the residual addition."""

from galvatron_megatron.cost.counts_builder import Builder
from galvatron_megatron.cost.counts_core import core_attention
from galvatron_megatron.describe.model import Attention


def norm(b: Builder, name: str, input_name: str) -> None:
    """A layer or RMS norm of the residual stream; its input and its statistics are kept.

    The input is kept even where it is kept elsewhere under another name: it is one tensor of the residual
    stream, and the next addition makes a new one.
    """
    shapes, model = b.shapes, b.shapes.model
    tokens, hidden, size = shapes.stream_tokens, model.hidden_size, shapes.element_bytes
    statistics = 1 if model.normalization == "RMSNorm" else 2
    b.vector(*[hidden] * statistics, sharded=False)
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
    tokens, size, hidden = shapes.gemm_tokens, shapes.element_bytes, model.hidden_size
    heads = shapes.per_shard(part.heads, "attention heads")
    groups = shapes.per_shard(part.query_groups, "query_groups")
    query, key = heads * part.head_dim, groups * part.head_dim

    norm(b, "attention norm", "attention input")
    b.keep("attention norm output", shapes.stream_tokens * hidden * size)
    b.enter_tensor_parallel()
    b.parameter((query + 2 * key) * hidden, sharded=True)
    if part.qkv_bias:
        b.parameter(query + 2 * key, sharded=True)
    b.linear("qkv projection", tokens, query + 2 * key, hidden)
    if part.qk_layernorm:
        _qk_norm(b, part, heads, groups)
    if model.position_embedding == "rope":
        b.memory("rotary embedding", 2 * tokens * (query + key) * size, 2 * tokens * (query + key) * size)
        keep_rotary(b, part.head_dim)
    b.peak(tokens * (2 * (query + 2 * key) + hidden) * size)
    if not shapes.fused:
        b.peak((query + 2 * key) * hidden * size)
    _keep_query_key_value(b, part, heads, groups)
    core_attention(
        b, heads=part.heads, groups=part.query_groups, head_dim=part.head_dim, v_head_dim=part.head_dim
    )
    output_projection(b, query, bias=part.output_bias)


def output_projection(b: Builder, width: int, *, bias: bool) -> None:
    """Row-parallel linear from ``width`` features of this rank, and the residual addition."""
    hidden = b.shapes.model.hidden_size
    b.parameter(hidden * width, sharded=True)
    if bias:
        b.vector(hidden, sharded=False)
    b.linear("output projection", b.shapes.gemm_tokens, hidden, width)
    b.leave_tensor_parallel()
    residual_add(b, "attention residual")


def keep_rotary(b: Builder, rotary_dim: int) -> None:
    """Megatron's unfused rotary embedding keeps sine and cosine for query and key; a fused kernel does not."""
    shapes = b.shapes
    if not shapes.fused:
        sequence = shapes.model.seq_length // shapes.strategy.cp
        b.keep("rotary sine and cosine", 4 * sequence * rotary_dim * shapes.element_bytes)


def _keep_query_key_value(b: Builder, part: Attention, heads: int, groups: int) -> None:
    """Keeps what norms and core attention read.

    Fused kernels get query, key and value as tensors of their own. Megatron's local layers cut views out of the
    projection's output, which then lives as a whole beside whatever was copied from it: the query by the
    reshape of grouped heads, query and key by norms and rotary embedding. Unfused attention repeats grouped
    keys and values for every head.
    """
    shapes = b.shapes
    token = shapes.gemm_tokens * part.head_dim * shapes.element_bytes
    sizes = {
        "query, key and value": token * (heads + 2 * groups),
        "query of grouped heads": token * heads,
        "rotated or normed query": token * heads,
        "rotated or normed key": token * groups,
        "key and value, repeated": 2 * token * heads,
    }
    projected, regrouped, query, key, repeated = sizes
    kept = {projected}
    if not shapes.fused:
        source = regrouped if groups > 1 and heads > groups else projected
        renewed = part.qk_layernorm or shapes.model.position_embedding == "rope"
        if heads > groups and not shapes.model.fused_attention and not shapes.recomputes_core_attention:
            # One group's query is a view until the heads of several samples are put in one dimension.
            copied = groups == 1 and shapes.samples > 1
            in_core = {query if renewed else regrouped if copied else source, repeated}
        else:
            in_core = {query if renewed else source, key if renewed else projected, projected}
        kept = in_core | ({source, projected} if part.qk_layernorm else set())
    for name, size in sizes.items():
        if name in kept:
            b.keep(name, size)


def _qk_norm(b: Builder, part: Attention, heads: int, groups: int) -> None:
    shapes = b.shapes
    statistics = 1 if shapes.model.normalization == "RMSNorm" else 2
    b.vector(*[part.head_dim] * (2 * statistics), sharded=False)
    rows = shapes.gemm_tokens * (heads + groups)
    elements = rows * part.head_dim * shapes.element_bytes
    if shapes.fused:
        b.keep("query and key before their norm", elements)
    b.keep("query and key norm statistics", statistics * 4 * rows)
    b.memory("query and key norm", 2 * elements, 3 * elements)
