"""Closed-form counts of mixture-of-experts feed-forward parts."""

from galvatron_megatron.cost.counts_attention import norm, residual_add
from galvatron_megatron.cost.counts_builder import Builder
from galvatron_megatron.cost.counts_mlp import feed_forward
from galvatron_megatron.describe.model import Experts
from galvatron_megatron.errors import DescriptionError

_INDEX_BYTES = 8


def mixture_of_experts(b: Builder, part: Experts) -> None:
    """Norm, router, dispatched expert feed-forwards, shared expert, and the residual addition.

    Tokens are spread evenly over the experts. Every rank routes the tokens of its own slice of the stream; each
    of the ``expert_parallel`` ranks has as many whole experts, whose weights ``expert_shards`` ranks split.

    Raises:
        DescriptionError: the experts do not divide.
    """
    shapes, hidden, size = b.shapes, b.shapes.model.hidden_size, b.shapes.element_bytes
    strategy, stream = shapes.strategy, b.shapes.stream_tokens
    local, rest = divmod(part.count, strategy.expert_parallel)
    if rest:
        raise DescriptionError(
            f"counts experts: {part.count} are not divisible by expert_parallel {strategy.expert_parallel}"
        )
    if part.ffn_hidden_size % strategy.expert_shards:
        raise DescriptionError(
            f"counts expert ffn_hidden_size: {part.ffn_hidden_size} is not divisible by the expert tensor "
            f"parallelism {strategy.expert_shards}"
        )
    norm(b, "mlp norm", "mlp input")
    b.keep("mlp norm output", stream * hidden * size)
    b.parameter(part.count * hidden, sharded=False)
    if part.bias:
        b.parameter(part.count, sharded=False)
    b.linear("router", stream, part.count, hidden)
    routed = stream * part.top_k
    b.memory("permutation", 2 * routed * hidden * size, 2 * routed * hidden * size)
    each = -(-routed // part.count)
    rows = each * strategy.expert_ranks
    if part.dispatcher == "allgather" and strategy.expert_ranks > 1:
        _gather(b, part, local)
    else:
        # Chosen experts and their probabilities, routing map, sorted indices of permutation and its inverse.
        b.keep("routing", routed * (8 + 4) + stream * part.count + 2 * _INDEX_BYTES * routed)
        _exchange(b, part.count * each)
    b.keep("permuted tokens", local * rows * hidden * size)
    b.keep("permuted probabilities", local * rows * size)
    width = part.ffn_hidden_size // strategy.expert_shards
    feed_forward(b, "expert", rows, width, gated=part.gated, bias=part.bias, experts=local)
    b.memory("unpermutation", 2 * routed * hidden * size, 2 * routed * hidden * size)
    if part.shared_ffn_hidden_size:
        b.enter_tensor_parallel()
        width = shapes.per_shard(part.shared_ffn_hidden_size, "shared ffn_hidden_size")
        feed_forward(b, "shared expert", shapes.gemm_tokens, width, gated=part.gated, bias=False)
        if part.shared_gate:
            b.parameter(hidden, sharded=False)
        b.leave_tensor_parallel()
    residual_add(b, "mlp residual")


def _exchange(b: Builder, sent: int) -> None:
    """Sends routed tokens to their experts' ranks and gathers them over the parts of an expert; and back.

    ``MoEAlltoAllTokenDispatcher``. The permuted tokens are kept as gathered, so nothing is gathered again for
    the weight gradient.

    Args:
        b: the layer.
        sent: routed tokens of one rank.
    """
    strategy = b.shapes.strategy
    tokens, probabilities = (
        sent * b.shapes.model.hidden_size * b.shapes.element_bytes,
        sent * b.shapes.element_bytes,
    )
    shards = strategy.expert_shards
    if strategy.expert_parallel > 1:
        for phase in ("forward", "backward"):
            b.collective("all_to_all", "ep", phase, tokens, 2)
            b.collective("all_to_all", "ep", phase, probabilities)
    if shards > 1:
        for gathered, reduced, size in (
            ("forward", "backward", tokens),
            ("backward", "forward", tokens),
            ("forward", "backward", probabilities),
        ):
            b.collective("all_gather", "etp", gathered, shards * size)
            b.collective("reduce_scatter", "etp", reduced, shards * size)


def _gather(b: Builder, part: Experts, local: int) -> None:
    """Gathers all tokens on all ranks that together hold the experts, and reduces their outputs; and back.

    ``MoEAllGatherTokenDispatcher``: tokens, routing map and probabilities are gathered, each rank picks the
    rows of its own experts, and a reduce-scatter sums what the experts of a token made of it.

    Args:
        b: the layer.
        part: its experts.
        local: experts of this rank.
    """
    shapes, strategy = b.shapes, b.shapes.strategy
    size, everywhere = shapes.element_bytes, shapes.stream_tokens * strategy.expert_ranks
    tokens = everywhere * shapes.model.hidden_size * size
    probabilities = everywhere * part.count * size
    routed = shapes.stream_tokens * part.top_k
    picked = routed * strategy.expert_shards
    # Chosen experts, then of the gathered tokens: mask and its transpose, probabilities, and the rows picked.
    b.keep("routing", routed * (8 + 4) + shapes.stream_tokens * part.count)
    b.keep("routing of gathered tokens", everywhere * local * (2 + size) + 2 * _INDEX_BYTES * picked)
    b.collective("all_gather", "etp_ep", "forward", everywhere * part.count)
    for whole in (tokens, probabilities):
        b.collective("all_gather", "etp_ep", "forward", whole)
        b.collective("reduce_scatter", "etp_ep", "backward", whole)
    b.collective("reduce_scatter", "etp_ep", "forward", tokens)
    b.collective("all_gather", "etp_ep", "backward", tokens)
    b.peak(2 * tokens)
