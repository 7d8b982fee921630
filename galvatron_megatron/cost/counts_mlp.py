"""Closed-form counts of dense and mixture-of-experts feed-forward parts."""

from galvatron_megatron.cost.counts_attention import norm, residual_add
from galvatron_megatron.cost.counts_builder import Builder
from galvatron_megatron.describe.model import Experts, Mlp


def mlp(b: Builder, part: Mlp) -> None:
    """Norm, two linears with an activation between them, and the residual addition."""
    shapes = b.shapes
    norm(b, "mlp norm", "mlp input")
    b.keep("mlp norm output", shapes.stream_tokens * shapes.model.hidden_size * shapes.element_bytes)
    b.enter_tensor_parallel()
    width = shapes.per_shard(part.ffn_hidden_size, "ffn_hidden_size")
    feed_forward(b, "mlp", shapes.gemm_tokens, width, gated=part.gated, bias=part.bias)
    b.leave_tensor_parallel()
    residual_add(b, "mlp residual")


def feed_forward(b: Builder, name: str, tokens: int, width: int, *, gated: bool, bias: bool, experts: int = 1):
    """Two linears; ``tokens`` and ``width`` are those of one rank (and one expert)."""
    hidden, size = b.shapes.model.hidden_size, b.shapes.element_bytes
    wide = 2 * width if gated else width
    b.parameter(wide * hidden, hidden * width, sharded=True, count=experts)
    if bias:
        b.parameter(wide, sharded=True, count=experts)
        b.parameter(hidden, sharded=False, count=experts)
    b.linear(f"{name} first linear", tokens, wide, hidden, count=experts)
    b.keep(f"{name} before activation", experts * tokens * wide * size)
    b.memory(
        f"{name} activation",
        experts * tokens * (wide + width) * size,
        experts * tokens * (2 * wide + width) * size,
    )
    b.keep(f"{name} after activation", experts * tokens * width * size)
    b.linear(f"{name} second linear", tokens, hidden, width, count=experts)
    if b.shapes.fused:
        b.peak(experts * tokens * (wide + width) * size)
        return
    # Weight gradients are tensors of their own here, and what was kept for a step is gone after it: the second
    # linear, the activation, the first linear.
    steps = (hidden * width + tokens * width, experts * tokens * wide, wide * hidden - tokens * width)
    b.peak((max(steps) + 4 * b.shapes.gemm_tokens * hidden) * size)


def mixture_of_experts(b: Builder, part: Experts) -> None:
    """Norm, router, permuted expert feed-forwards, shared expert, and the residual addition.

    Tokens are spread evenly over the experts; experts are split over tp, not over data-parallel ranks.
    """
    shapes, hidden, size = b.shapes, b.shapes.model.hidden_size, b.shapes.element_bytes
    stream, tokens = shapes.stream_tokens, shapes.gemm_tokens
    norm(b, "mlp norm", "mlp input")
    b.keep("mlp norm output", stream * hidden * size)
    b.parameter(part.count * hidden, sharded=False)
    if part.bias:
        b.parameter(part.count, sharded=False)
    b.linear("router", stream, part.count, hidden)
    routed = stream * part.top_k
    # Chosen experts and their probabilities, routing map, sorted indices of permutation and its inverse.
    b.keep("routing", routed * (8 + 4) + stream * part.count + 2 * 8 * routed)
    b.memory("permutation", 2 * routed * hidden * size, 2 * routed * hidden * size)
    rows = -(-tokens * part.top_k // part.count)
    _dispatch(b, part.count * rows, "forward", "backward")
    b.keep("permuted tokens", part.count * rows * hidden * size)
    b.keep("permuted probabilities", part.count * rows * size)
    width = shapes.per_shard(part.ffn_hidden_size, "expert ffn_hidden_size")
    feed_forward(b, "expert", rows, width, gated=part.gated, bias=part.bias, experts=part.count)
    _dispatch(b, part.count * rows, "backward", "forward")
    b.memory("unpermutation", 2 * routed * hidden * size, 2 * routed * hidden * size)
    if part.shared_ffn_hidden_size:
        b.enter_tensor_parallel()
        width = shapes.per_shard(part.shared_ffn_hidden_size, "shared ffn_hidden_size")
        feed_forward(b, "shared expert", tokens, width, gated=part.gated, bias=False)
        if part.shared_gate:
            b.parameter(hidden, sharded=False)
        b.leave_tensor_parallel()
    residual_add(b, "mlp residual")


def _dispatch(b: Builder, rows: int, gathered: str, reduced: str) -> None:
    """Gathers the routed tokens of the tp group for its experts, and reduces the other way.

    The permuted tokens are kept as gathered, so nothing is gathered again for the weight gradient.
    """
    shapes = b.shapes
    if shapes.strategy.weight_shards == 1 or not shapes.is_megatron_sp:
        return
    size = rows * shapes.model.hidden_size * shapes.element_bytes
    b.collective("all_gather", "tp", gathered, size)
    b.collective("reduce_scatter", "tp", reduced, size)
    if gathered == "forward":
        probabilities = rows * shapes.element_bytes
        b.collective("all_gather", "tp", "forward", probabilities)
        b.collective("reduce_scatter", "tp", "backward", probabilities)
