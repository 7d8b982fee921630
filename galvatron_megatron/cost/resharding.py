"""How much of an activation a rank receives when the layout changes between two layers."""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm

Layout = tuple[int, int, int, bool]
"""``Strategy.layout``: (tp, cp, dp, sequence split over tp)."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Transfer:
    """The busiest rank's part in one reshard."""

    fraction: float
    """Bytes it sends or receives (the larger), as a fraction of the whole activation of all ranks."""
    group_ranks: int
    """Consecutive ranks of the smallest group inside which everything moves."""


def _tile(rank: int, layout: Layout) -> tuple[Fraction, Fraction, Fraction, Fraction]:
    """(batch start, batch end, sequence start, sequence end) of a rank, as fractions of the whole.

    Ranks are tp innermost, then cp, then dp; sequence slices of tp lie inside those of cp.
    """
    tp, cp, dp, split = layout
    inner, context, data = rank % tp, rank // tp % cp, rank // (tp * cp)
    parts = cp * tp if split else cp
    slot = context * tp + inner if split else context
    return Fraction(data, dp), Fraction(data + 1, dp), Fraction(slot, parts), Fraction(slot + 1, parts)


@lru_cache(maxsize=4096)
def reshard_transfer(before: Layout, after: Layout) -> Transfer:
    """The traffic of the busiest rank when every rank receives what it lacks exactly once.

    Where several ranks hold a part, it is sent by one of them, the load spread evenly, so that the receiving
    side is what counts for replicated sources and the sending side where replicas must be fed.

    Args:
        before: layout of the layer in front.
        after: layout of the layer behind, on the same number of ranks.

    Returns:
        Traffic and the group it stays in.
    """
    group = lcm(before[0] * before[1], after[0] * after[1])
    received = Fraction(0)
    for rank in range(group):
        batch_0, batch_1, sequence_0, sequence_1 = _tile(rank, after)
        own_0, own_1, own_s0, own_s1 = _tile(rank, before)
        kept = max(Fraction(0), min(batch_1, own_1) - max(batch_0, own_0)) * max(
            Fraction(0), min(sequence_1, own_s1) - max(sequence_0, own_s0)
        )
        received = max(received, (batch_1 - batch_0) * (sequence_1 - sequence_0) - kept)
    return Transfer(fraction=float(received), group_ranks=group)
