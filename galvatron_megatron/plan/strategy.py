"""How one layer runs."""

from dataclasses import dataclass
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

    def __post_init__(self) -> None:
        for name in ("tp", "cp", "dp"):
            require_count(getattr(self, name), f"strategy.{name}")
        if type(self.zero) is not int or self.zero not in (0, 1, 2, 3):
            raise PlanError(f"strategy.zero: {shown(self.zero)} is not a ZeRO stage; valid: 0, 1, 2, 3")
        for name, kind in (("sequence_parallel", SequenceParallel), ("recompute", Recompute)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                valid = ", ".join(member.value for member in kind)
                raise PlanError(f"strategy.{name}: {shown(value)} is unknown; valid: {valid}")
        if self.sequence_parallel is not SequenceParallel.NONE and self.tp == 1:
            raise PlanError(
                f"strategy.sequence_parallel: {self.sequence_parallel.value!r} needs tp > 1; valid: none"
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
        if self.zero:
            parts.append(f"zero{self.zero}")
        if self.recompute is not Recompute.NONE:
            parts.append(f"recompute-{self.recompute.value}")
        return " ".join(parts)
