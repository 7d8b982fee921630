"""Bytes that a rank keeps for its parameters: weights, gradients and optimizer states by ZeRO stage."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.plan.strategy import Offload, Strategy
from galvatron_megatron.plan.zero_rules import is_deepspeed

_FP32_BYTES = 4
_ADAM_BYTES = 8
"""Two fp32 moments of one parameter."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ElementBytes:
    """Bytes of one parameter by purpose."""

    weight: int
    gradient: int
    """Of the buffer that gradients are accumulated in."""
    optimizer: int
    """Master weight (where weights are 16 bit wide) and moments."""
    step_gradient: int = 0
    """fp32 copy of a 16-bit gradient that the optimizer works on."""

    @property
    def under_deepspeed(self) -> "ElementBytes":
        """The same where DeepSpeed's classes keep the states: gradients add up in fp32, however reduced."""
        return replace(self, gradient=_FP32_BYTES, step_gradient=0)


def parameter_bytes(precision: str, options: RunOptions) -> ElementBytes:
    """Bytes per parameter with Adam.

    Source: the table of Megatron-LM ``docs/source/api-guide/dist_optimizer.md``: without a distributed
    optimizer 20 bytes for fp16 with fp16 gradients, 18 for bf16 with fp32 gradients, 16 for fp32; with it
    4 + 16/d, 6 + 12/d and 8 + 8/d.

    Args:
        precision: ``bf16``, ``fp16`` or ``fp32``.
        options: whether gradients are accumulated in fp32.

    Returns:
        Bytes by purpose.
    """
    if precision == "fp32":
        return ElementBytes(weight=4, gradient=4, optimizer=_ADAM_BYTES)
    if options.gradients_in_fp32:
        return ElementBytes(weight=2, gradient=4, optimizer=4 + _ADAM_BYTES)
    return ElementBytes(weight=2, gradient=2, optimizer=4 + _ADAM_BYTES, step_gradient=4)


@dataclass(kw_only=True, frozen=True, slots=True)
class StateBytes:
    """What a rank keeps of some parameters all the time."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(
            weights=self.weights + other.weights,
            gradients=self.gradients + other.gradients,
            optimizer=self.optimizer + other.optimizer,
        )


@dataclass(kw_only=True, frozen=True, slots=True)
class Share:
    """Parameters of a rank that the same ranks replicate."""

    parameters: int
    replicas: int
    """How many ranks hold them."""
    stride: int
    """Distance between those ranks."""
    instances: int = 1
    """Groups of them that shard states each among themselves."""

    @property
    def sharding(self) -> int:
        """Over how many ranks ZeRO shards the states."""
        return max(1, self.replicas // self.instances)


def parameter_shares(
    parameters: int, expert_parameters: int, strategy: Strategy, instances: int = 1
) -> tuple[Share, ...]:
    """The parameters of a layer's rank by who replicates them: experts have replicas of their own.

    Args:
        parameters: of this rank, those of its experts included.
        expert_parameters: of the experts on this rank.
        strategy: of the layer.
        instances: ``--num-distributed-optimizer-instances``.

    Returns:
        One share, or two for a layer with experts.
    """
    dense = Share(
        parameters=parameters - expert_parameters,
        replicas=strategy.state_replicas,
        stride=strategy.weight_shards,
        instances=instances,
    )
    if not expert_parameters:
        return (dense,)
    return dense, Share(
        parameters=expert_parameters,
        replicas=strategy.expert_replicas,
        stride=strategy.expert_ranks,
        instances=instances,
    )


def state_bytes(
    parameters: int, zero: int, replicas: int, element: ElementBytes, *, whole: int = 0
) -> StateBytes:
    """Bytes of weights, gradients and optimizer states of one rank.

    ZeRO stage 1 shards optimizer states, stage 2 also gradients, stage 3 also weights (arXiv 1910.02054,
    figure 1) over the ranks that hold the same weight shard.

    Args:
        parameters: of this rank after tensor parallelism.
        zero: ZeRO stage.
        replicas: how many ranks hold the same parameters.
        element: bytes per parameter.
        whole: those of the parameters that stage 3 keeps whole beside the shards of all.

    Returns:
        Bytes, rounded up.
    """
    shard = -(-parameters // replicas)
    return StateBytes(
        weights=(shard + whole if zero >= 3 else parameters) * element.weight,
        gradients=(shard if zero >= 2 else parameters) * element.gradient,
        optimizer=(shard if zero >= 1 else parameters) * (element.optimizer + element.step_gradient),
    )


def held_bytes(
    shares: Iterable[Share], strategy: Strategy, element: ElementBytes, options: RunOptions, *, whole: int = 0
) -> StateBytes:
    """Bytes that a rank has on its device of some parameters, all the time.

    Args:
        shares: parameters of the rank by who replicates them.
        strategy: how they are kept.
        element: bytes of one parameter by purpose.
        options: switches of the job.
        whole: parameters, of the first share, that stage 3 keeps whole.
    """
    if is_deepspeed(strategy.zero, strategy.offload, options.deepspeed_zero_1):
        element = element.under_deepspeed
    state = sum(
        (
            state_bytes(share.parameters, strategy.zero, share.sharding, element, whole=0 if number else whole)
            for number, share in enumerate(shares)
        ),
        StateBytes(weights=0, gradients=0, optimizer=0),
    )
    return _kept_on_device(state, strategy.offload)


def _kept_on_device(state: StateBytes, offload: Offload) -> StateBytes:
    """What offloading leaves: optimizer states go, weights go with ``parameters``; gradients add up there."""
    if offload is Offload.NONE:
        return state
    weights = 0 if offload is Offload.PARAMETERS else state.weights
    return replace(state, weights=weights, optimizer=0)


def optimizer_traffic_bytes(parameters: int, zero: int, replicas: int, element: ElementBytes) -> int:
    """Bytes that clearing gradients, their norm and Adam move through device memory in one step.

    Adam reads gradient, master weight and two moments and writes master weight, moments and the working
    weight; the norm reads the gradient once more; the gradient buffer is cleared in full.

    Args:
        parameters: of this rank after tensor parallelism.
        zero: ZeRO stage.
        replicas: how many ranks hold the same parameters.
        element: bytes per parameter.

    Returns:
        Bytes.
    """
    updated = -(-parameters // replicas) if zero >= 1 else parameters
    cleared = -(-parameters // replicas) if zero >= 2 else parameters
    gradient = element.step_gradient or element.gradient
    return cleared * element.gradient + updated * (2 * gradient + 2 * element.optimizer + element.weight)
