"""Which layers a pipeline rank may hold: the space of partitions.

Without interleaving (v = 1) every partition of the L layers into P non-empty consecutive stages is considered.

With v > 1 chunks per rank, rank p holds the same number of layers in each of its chunks, and ranks may
differ: with
W layers per sweep over the ranks, rank p owns [a, b) of every sweep, so chunk c of it holds layers [cW +
a, cW + b).
Two exceptions, because embedding and head cost time too: the first virtual stage may hold `short_first` layers
fewer and the last one `short_last` fewer, with 0 <= short_first, short_last <= 2 and short_first + short_last =
vW - L. Every virtual stage holds at least one layer. Inside this space the search is exact.

A decision made by hand (layers of the first or last rank, of every virtual stage, or of each one) limits
the space further; where the number of layers of every virtual stage is given, there is one partition.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.search.chain import BOUNDARY

MOST_SHORT = 2
"""Layers that the first and the last virtual stage may lack."""


@dataclass(kw_only=True, frozen=True)
class Spans:
    """One family of partitions: positions 0..width, cut at pp - 1 places.

    Attributes:
        kinds: kind number of every layer of the model.
        pp: pipeline degree.
        virtual_stages: chunks per rank.
        width: layers per sweep over the ranks; pp where the stages are laid out by hand.
        short_first: layers that the first virtual stage lacks.
        short_last: layers that the last virtual stage lacks.
        by_hand: layers of every virtual stage where they are laid out by hand, else empty.
        limits: the decisions made by hand.
    """

    kinds: tuple[int, ...]
    pp: int
    virtual_stages: int
    width: int
    short_first: int = 0
    short_last: int = 0
    by_hand: tuple[int, ...] = ()
    limits: Constraints

    def ranges(self, begin: int, end: int) -> tuple[tuple[int, int], ...]:
        """Layers [first, last) of every chunk of a rank that owns [begin, end) of the width."""
        if self.by_hand:
            starts = [0]
            for count in self.by_hand:
                starts.append(starts[-1] + count)
            stages = range(begin, len(self.by_hand), self.pp)
            return tuple((starts[stage], starts[stage + 1]) for stage in stages)
        last = len(self.kinds)
        found = []
        for chunk in range(self.virtual_stages):
            offset = chunk * self.width - self.short_first
            found.append((max(0, offset + begin), min(last, offset + end)))
        return tuple(found)

    def allowed(self, position: int, begin: int, end: int) -> bool:
        """True where rank ``position`` may own [begin, end)."""
        if self.by_hand and (begin, end) != (position, position + 1):
            return False
        counts = [last - first for first, last in self.ranges(begin, end)]
        if min(counts) < 1:
            return False
        each = self.limits.layers_per_virtual_stage
        if each is not None and any(count != each for count in counts):
            return False
        if position == 0 and self.limits.first_stage_layers not in (None, sum(counts)):
            return False
        return position != self.pp - 1 or self.limits.last_stage_layers in (None, sum(counts))

    def sequence(self, begin: int, end: int) -> tuple[tuple[int, int, bool | None] | int, ...]:
        """What a rank executes: (kind, chunk, forced recomputation) of every layer, BOUNDARY between chunks."""
        count = self.limits.recomputed_layers_per_stage
        found: list = []
        for chunk, (first, last) in enumerate(self.ranges(begin, end)):
            if chunk:
                found.append(BOUNDARY)
            for index in range(first, last):
                forced = None if count is None else index - first < count
                found.append((self.kinds[index], chunk, forced))
        return tuple(found)

    @cached_property
    def is_shift_invariant(self) -> bool:
        """True where the sequence of a rank depends on its length and position in the pipeline alone."""
        return len(set(self.kinds)) == 1 and not self.by_hand


def all_spans(kinds: tuple[int, ...], pp: int, virtual_stages: int, limits: Constraints) -> Iterator[Spans]:
    """Generates the families of partitions of one pipeline degree."""
    count = len(kinds)
    common = {"kinds": kinds, "pp": pp, "virtual_stages": virtual_stages, "limits": limits}
    if limits.stage_layers is not None:
        if len(limits.stage_layers) == pp * virtual_stages and sum(limits.stage_layers) == count:
            yield Spans(width=pp, by_hand=limits.stage_layers, **common)
        return
    if virtual_stages == 1:
        yield Spans(width=count, **common)
        return
    for short_first in range(MOST_SHORT + 1):
        for short_last in range(MOST_SHORT + 1):
            width, rest = divmod(count + short_first + short_last, virtual_stages)
            if not rest and width >= pp:
                yield Spans(width=width, short_first=short_first, short_last=short_last, **common)
