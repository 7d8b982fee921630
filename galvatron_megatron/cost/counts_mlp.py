"""Closed-form counts of dense feed-forward parts, and of the two linears that experts share with them."""

from galvatron_megatron.cost.counts_attention import norm, residual_add
from galvatron_megatron.cost.counts_builder import Builder
from galvatron_megatron.describe.model import Mlp


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


def feed_forward(b: Builder, name: str, tokens: int, width: int, *, gated: bool, bias: bool, experts: int = 0):
    """Two linears; ``tokens`` and ``width`` are those of a rank (and one of its ``experts``; 0: none)."""
    hidden, size = b.shapes.model.hidden_size, b.shapes.element_bytes
    wide = 2 * width if gated else width
    biases = (wide, hidden) if bias else ()
    if experts:
        b.expert_parameter(wide * hidden, hidden * width, *biases, count=experts)
    else:
        b.parameter(wide * hidden, hidden * width, sharded=True)
        b.vector(*biases[:1], sharded=True)
        b.vector(*biases[1:], sharded=False)
    experts = experts or 1
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
