"""Closed-form counts of the core attention: scores, softmax and context."""

from galvatron_megatron.cost.counts_builder import Builder
from galvatron_megatron.cost.counts_values import Operator, gemm
from galvatron_megatron.errors import DescriptionError

_MATRICES_PER_BLOCK = 4
"""Score matrices that one block of Megatron's softmax kernel works on: 128 threads in warps of 32."""
_HALF_BYTES, _SINGLE_BYTES = 2, 4


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
    if not shapes.fused and v_head_dim != head_dim:
        # Flash attention has one head size: the value is padded, and the output cut.
        b.keep("padded value", tokens * groups * head_dim * size, in_core_attention=True)
        b.keep("padded attention output", tokens * heads * head_dim * size, in_core_attention=True)
        v_head_dim = head_dim
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
    """Unfused attention keeps softmax, dropout mask and dropped softmax (arXiv 2205.05198, 5as/h).

    Megatron's 16-bit scale-mask-softmax kernel takes four score matrices a block; where samples x heads of a
    rank are no multiple of four, PyTorch's operators take its place
    (``FusedScaleMaskSoftmax.is_kernel_available`` and ``forward_torch_softmax`` in
    ``megatron/core/fusions/fused_softmax.py``; so in Megatron-LM since 2021).
    """
    size, model = b.shapes.element_bytes, b.shapes.model
    batch = b.shapes.samples * heads
    if batch % _MATRICES_PER_BLOCK == 0 or size != _HALF_BYTES:
        b.keep("attention probabilities", scores * size, in_core_attention=True)
    else:
        _softmax_operators(b, scores)
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


def _softmax_operators(b: Builder, scores: int) -> None:
    """What PyTorch runs around a softmax in fp32, beside the softmax itself: every operator a kernel each way.

    Cast to fp32, scale, mask (in place; its own mask is small), and the cast back to 16 bit. Autograd keeps the
    fp32 probabilities.
    """
    half, single = scores * _HALF_BYTES, scores * _SINGLE_BYTES
    b.keep("attention probabilities", single, in_core_attention=True)
    for name, traffic in (
        ("attention scores to fp32", half + single),
        ("attention scale", 2 * single),
        ("attention mask", 2 * single),
        ("attention probabilities to 16 bit", single + half),
    ):
        b.recomputed.add(name)
        b.memory(name, traffic, traffic)


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
