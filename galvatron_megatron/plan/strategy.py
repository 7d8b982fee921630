"""How one layer runs."""

from dataclasses import dataclass, replace
from enum import StrEnum

from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.checks import require_count, shown


class SequenceParallel(StrEnum):
    """What the ranks of a layer's tp group do along the sequence dimension."""

    NONE = "none"
    """Weights are split over tp, activations between the split parts are replicated."""
    MEGATRON = "megatron"
    """Weights are split over tp; norms and dropouts run on sequence slices (arXiv 2205.05198)."""
    ULYSSES = "ulysses"
    """Weights are replicated; every rank of the tp group holds a sequence slice, and attention runs on
    a slice of the heads after an all-to-all (arXiv 2309.14509)."""


class Recompute(StrEnum):
    """Which activations of a layer are computed again in the backward pass."""

    NONE = "none"
    SELECTIVE = "selective"
    """Only the core attention (Megatron's ``--recompute-granularity selective``)."""
    FULL = "full"
    """The whole layer; only its input is kept."""


class Offload(StrEnum):
    """What of a layer's sharded states lies in host memory between uses (DeepSpeed's ZeRO-Offload)."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    """Optimizer states and the gradient shards they work on: the host updates the weights
    (arXiv 2101.06840)."""
    PARAMETERS = "parameters"
    """Weight shards as well; they are fetched for every pass (arXiv 2104.07857, on host memory)."""

    @property
    def and_less(self) -> tuple["Offload", ...]:
        """All kinds that keep no more in host memory, the least first."""
        kinds = tuple(Offload)
        return kinds[: kinds.index(self) + 1]


_KINDS = (("sequence_parallel", SequenceParallel), ("recompute", Recompute), ("offload", Offload))
LEAST_ZERO = {Offload.NONE: 0, Offload.OPTIMIZER: 1, Offload.PARAMETERS: 3}
"""ZeRO stages at which DeepSpeed's classes move these states."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Strategy:
    """How ONE layer runs on the N = tp * cp * dp ranks of its pipeline stage.

    Ranks are laid out tp innermost, then cp, then dp (Megatron's ``tp-cp-ep-dp-pp`` order).
    """

    tp: int = 1
    """Size of the tensor-parallel group; under Ulysses, of the group that splits the sequence."""
    sequence_parallel: SequenceParallel = SequenceParallel.NONE
    """Kind of sequence parallelism over the tp group; ``none`` where tp is 1."""
    cp: int = 1
    """Context-parallel degree: attention over a sequence split in cp parts."""
    dp: int = 1
    """Data-parallel degree."""
    zero: int = 0
    """ZeRO stage 0-3: states sharded over the ranks that replicate a weight shard."""
    recompute: Recompute = Recompute.NONE
    expert_parallel: int = 1
    """Ranks that share out the experts of a mixture-of-experts layer (``--expert-model-parallel-size``)."""
    expert_tensor_parallel: int | None = None
    """In how many parts each expert's weights are split (``--expert-tensor-parallel-size``); None, to which a
    given ``weight_shards`` is turned: as those of the rest of the layer."""
    offload: Offload = Offload.NONE
    """What lies in host memory; anything but ``none`` needs ZeRO, ``parameters`` needs ZeRO 3."""

    def __post_init__(self) -> None:
        for name in ("tp", "cp", "dp", "expert_parallel"):
            require_count(getattr(self, name), f"strategy.{name}")
        if type(self.zero) is not int or self.zero not in (0, 1, 2, 3):
            raise PlanError(f"strategy.zero: {shown(self.zero)} is not a ZeRO stage; valid: 0, 1, 2, 3")
        for name, kind in _KINDS:
            value = getattr(self, name)
            if not isinstance(value, kind):
                valid = ", ".join(member.value for member in kind)
                raise PlanError(f"strategy.{name}: {shown(value)} is unknown; valid: {valid}")
        if self.sequence_parallel is not SequenceParallel.NONE and self.tp == 1:
            raise PlanError(
                f"strategy.sequence_parallel: {self.sequence_parallel.value!r} needs tp > 1; valid: none"
            )
        least = LEAST_ZERO[self.offload]
        if self.zero < least:
            raise PlanError(
                f"strategy.offload: {self.offload.value!r} needs zero {least} or higher, which shards what is "
                "moved; valid: none"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        if self.expert_tensor_parallel is not None:
            require_count(self.expert_tensor_parallel, "strategy.expert_tensor_parallel")
            if self.expert_tensor_parallel == self.weight_shards:
                object.__setattr__(self, "expert_tensor_parallel", None)
        if self.ranks % self.expert_ranks:
            raise PlanError(
                f"strategy.expert_parallel: {self.expert_parallel} x expert tensor parallelism "
                f"{self.expert_shards} does not divide the {self.ranks} ranks of tp x cp x dp; valid: degrees "
                "that divide them"
            )

    @property
    def ranks(self) -> int:
        """Ranks of the stage that the strategy occupies: tp * cp * dp."""
        return self.tp * self.cp * self.dp

    @property
    def weight_shards(self) -> int:
        """In how many parts tensor parallelism splits the weights: tp, or 1 under Ulysses."""
        return 1 if self.sequence_parallel is SequenceParallel.ULYSSES else self.tp

    @property
    def state_replicas(self) -> int:
        """How many ranks hold the same weight shard before ZeRO: ranks / weight_shards."""
        return self.ranks // self.weight_shards

    @property
    def expert_shards(self) -> int:
        """In how many parts the weights of one expert are split."""
        return self.weight_shards if self.expert_tensor_parallel is None else self.expert_tensor_parallel

    @property
    def expert_ranks(self) -> int:
        """Consecutive ranks that together hold all experts once: expert_parallel * expert_shards.

        Megatron numbers the same ranks again for experts: expert tensor parallelism innermost, then expert
        parallelism, then the replicas (``RankGenerator`` in ``megatron/core/parallel_state.py``).
        """
        return self.expert_parallel * self.expert_shards

    @property
    def expert_replicas(self) -> int:
        """How many ranks hold the same expert weights before ZeRO."""
        return self.ranks // self.expert_ranks

    @property
    def without_experts(self) -> "Strategy":
        """The same without what concerns experts alone: how a layer that has none runs beside this one."""
        if (self.expert_parallel, self.expert_tensor_parallel) == (1, None):
            return self
        return replace(self, expert_parallel=1, expert_tensor_parallel=None)

    @property
    def layout(self) -> tuple[int, int, int, bool]:
        """Where the activations of the layer lie: (tp, cp, dp, sequence split over tp).

        Two layers with equal layouts exchange activations without resharding.
        """
        return (self.tp, self.cp, self.dp, self.sequence_parallel is not SequenceParallel.NONE)

    def __str__(self) -> str:
        parts = [f"tp{self.tp}"]
        if self.sequence_parallel is not SequenceParallel.NONE:
            parts[0] += f"+{self.sequence_parallel.value}"
        if self.cp > 1:
            parts.append(f"cp{self.cp}")
        parts.append(f"dp{self.dp}")
        if self.expert_parallel > 1:
            parts.append(f"ep{self.expert_parallel}")
        if self.expert_tensor_parallel is not None:
            parts.append(f"etp{self.expert_tensor_parallel}")
        if self.zero:
            parts.append(f"zero{self.zero}")
        if self.offload is not Offload.NONE:
            parts.append(f"offload-{self.offload.value}")
        if self.recompute is not Recompute.NONE:
            parts.append(f"recompute-{self.recompute.value}")
        return " ".join(parts)
