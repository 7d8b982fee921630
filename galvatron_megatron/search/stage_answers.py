"""What is known about the stages of a pipeline, shared by all problems that meet the same stage.

A stage is a sequence of layers in a class of positions. What is found for one set of limits also answers every
tighter set that the answer keeps, and what is refuted for one set is refuted for every tighter one. So base
layouts that differ in the ZeRO stage of embedding and head, families of partitions and allowances of
synchronisation share the work.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from galvatron_megatron.search.layer_dp import Assignment, StageSearch

ROUNDING = 1e-12
"""Relative difference of two step times that count as equal."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Limits:
    """What a stage must keep."""

    budget: float
    """Bytes for state, live activations and the largest transient."""
    transient: float
    """Transient bytes of embedding or head, which the largest is at least."""
    sync: float = np.inf
    """Seconds of synchronisation that its layers may take."""
    host: float = np.inf
    """Bytes that its layers may keep in host memory."""

    def covers(self, other: "Limits") -> bool:
        """True where whatever keeps the other limits keeps these."""
        looser = other.budget <= self.budget and other.transient >= self.transient
        return looser and other.sync <= self.sync and other.host <= self.host

    @property
    def in_turn(self) -> tuple["Limits", ...]:
        """What to ask for: without a limit on sync the problem has a dimension less, and as a rule its answer
        keeps that limit."""
        return replace(self, sync=np.inf), self


@dataclass(slots=True)
class StageAnswers:
    """Everything learnt about one stage."""

    solved: list[tuple[Limits, Assignment]] = field(default_factory=list)
    refuted: list[tuple[Limits, float]] = field(default_factory=list)
    """Nothing that keeps the limits is faster than these seconds, or as fast."""
    searches: dict[Limits, StageSearch] = field(default_factory=dict)
    """Begun, for limits that were asked for."""

    def exact(self, limits: Limits) -> Assignment | None:
        """The fastest assignment, where known."""
        for known, found in self.solved:
            fits = found.bytes + max(found.transient, limits.transient) <= limits.budget
            if fits and found.sync <= limits.sync and found.host <= limits.host and known.covers(limits):
                return found
        return None

    def lower_bound(self, limits: Limits) -> float:
        """Seconds that a stage within the limits takes at least."""
        bound = 0.0
        for known, found in self.solved:
            if known.covers(limits):
                bound = max(bound, found.seconds)
        for known, seconds in self.refuted:
            if known.covers(limits):
                bound = max(bound, seconds)
        return bound
