"""Traffic of a change of layout."""

import pytest

from galvatron_megatron.cost.resharding import reshard_transfer


@pytest.mark.parametrize(
    ("before", "after", "fraction", "group"),
    [
        # A replicated source holds everything that the split target needs.
        ((4, 1, 1, False), (4, 1, 1, True), 0, 4),
        ((2, 1, 2, False), (1, 1, 4, False), 0, 2),
        # From slices of the sequence to whole samples: three of four quarters of a quarter are elsewhere.
        ((4, 1, 1, True), (1, 1, 4, False), 3 / 16, 4),
        # Everybody needs everything.
        ((1, 1, 4, False), (4, 1, 1, False), 3 / 4, 4),
        ((1, 1, 8, False), (2, 1, 4, False), 1 / 8, 2),
    ],
)
def test_known_moves(before: tuple, after: tuple, fraction: float, group: int) -> None:
    moved = reshard_transfer(before, after)
    assert moved.fraction == pytest.approx(fraction)
    assert moved.group_ranks == group
