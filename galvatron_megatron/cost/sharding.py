"""The collectives with which the states of a layer are kept equal, or sharded, over the ranks that hold it."""

from dataclasses import dataclass

from galvatron_megatron.cost.counts_values import LayerCounts
from galvatron_megatron.cost.memory import ElementBytes
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.model import Model
from galvatron_megatron.plan.strategy import Strategy
from galvatron_megatron.plan.zero_rules import vectors_stay_whole

FORWARD, BACKWARD, REDUCTION, UPDATE = "forward", "backward", "reduction", "update"
"""When: in every forward or backward pass of a micro-batch, once per step before or behind the optimizer."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ShardingCollective:
    """One kind of collective over the ranks that replicate a layer's parameters."""

    kind: str
    """``all_reduce``, ``reduce_scatter`` or ``all_gather``."""
    when: str
    count: int
    """How often, each time."""
    bytes: int
    """Of all of them together, each counted in full (gathered output, input of a reduction)."""


def sharding_collectives(
    parameters: int,
    zero: int,
    element: ElementBytes,
    *,
    modules: int = 1,
    deepspeed: bool = False,
    whole: int = 0,
) -> tuple[ShardingCollective, ...]:
    """What a ZeRO stage sends for some parameters.

    Source: the collectives that the runtime's engines over DeepSpeed's classes were seen to send; Megatron's
    distributed optimizer for stage 1. DeepSpeed's stages 1 and 2 all-reduce whole buckets of gradients and keep
    their part; stage 2 does so after every micro-batch, since a rank keeps its own part alone. Stage 3 gathers
    a module's weights for its forward and for its backward pass, where they serve computing again as well; what
    stays whole is gathered behind the optimizer alone. These are counted for some parameters alone;
    ``sharded_states.sent_collectives`` says what layers of a stage share.

    Args:
        parameters: of this rank.
        zero: stage.
        element: bytes of one parameter by purpose.
        modules: how many modules hold the parameters.
        deepspeed: stage 1 is DeepSpeed's, not Megatron's.
        whole: those of the parameters that stage 3 keeps whole; ``modules`` does not count theirs.

    Returns:
        Collectives with something to send.
    """
    gradients, weights = parameters * element.gradient, parameters * element.weight
    if zero == 3:
        weights -= whole * element.weight
        found = (
            ShardingCollective(kind="all_gather", when=FORWARD, count=modules, bytes=weights),
            ShardingCollective(kind="all_gather", when=BACKWARD, count=modules, bytes=weights),
            ShardingCollective(kind="reduce_scatter", when=BACKWARD, count=1, bytes=gradients),
            ShardingCollective(kind="all_gather", when=UPDATE, count=1, bytes=whole * element.weight),
        )
    elif zero == 0:
        found = (ShardingCollective(kind="all_reduce", when=REDUCTION, count=1, bytes=gradients),)
    else:
        whole = zero == 2 or deepspeed
        found = (
            ShardingCollective(
                kind="all_reduce" if whole else "reduce_scatter",
                when=BACKWARD if zero == 2 else REDUCTION,
                count=1,
                bytes=gradients,
            ),
            ShardingCollective(kind="all_gather", when=UPDATE, count=1, bytes=weights),
        )
    return tuple(entry for entry in found if entry.bytes)


def gathered_modules(counts: LayerCounts, options: RunOptions, *, norms: bool = True) -> int:
    """How many modules of a layer hold parameters, each gathered by itself under stage 3.

    Transformer Engine's linears hold the norm in front of them.

    Args:
        counts: of the layer.
        options: switches of the job.
        norms: norms are gathered too; False where they stay whole.
    """
    names = {operator.name for operator in counts.operators if operator.phase == "forward"}
    linears = sum(operator_kind(name) == "linear" for name in names)
    # Megatron's Mamba mixer itself holds its convolution's weights, and what its scan needs.
    mixers = sum(name.endswith("convolution") for name in names)
    apart = norms and not (options.implementation == "transformer_engine" and linears)
    return max(1, linears + mixers + apart * sum(operator_kind(name) == "norm" for name in names))


def embedding_modules(model: Model) -> int:
    """How many modules of the embedding hold parameters: words, and positions where they are learned.

    Args:
        model: whose embedding.
    """
    return 2 if model.position_embedding == "learned_absolute" else 1


def whole_parameters(closed: LayerCounts, parameters: int, strategy: Strategy, options: RunOptions) -> int:
    """Parameters of a layer that stage 3 keeps whole on every rank, see ``vectors_stay_whole``.

    Args:
        closed: counts of the layer in closed form, which tell vectors, on a rank under the strategy.
        parameters: of the layer on that rank.
        strategy: of the layer.
        options: switches of the job; Transformer Engine's linears hold norms and biases.
    """
    vectors = closed.parameters_apart if options.implementation == "local" else 0
    stay = vectors_stay_whole(vectors, parameters, strategy.state_replicas, strategy.offload)
    return vectors if stay and strategy.zero == 3 else 0


def operator_kind(name: str) -> str:
    """``linear`` or ``norm`` for an operator with weights, by its name; else an empty string."""
    if name.endswith("norm"):
        return "norm"
    return "linear" if any(word in name for word in ("projection", "linear", "output layer", "router")) else ""
