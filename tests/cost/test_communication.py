"""Collectives against measured curves and against each other."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.cost.communication import collective_seconds
from galvatron_megatron.errors import DescriptionError
from tests.cost.machines import cluster

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all")


@pytest.mark.parametrize(
    ("ranks", "megabytes", "measured_us"),
    [(8, 64, 579.9), (8, 1024, 8193.0), (4, 64, 543.8), (4, 1024, 7259.4), (2, 1024, 5442.8)],
)
def test_all_reduce_inside_a_node_is_near_nccl(ranks: int, megabytes: int, measured_us: float) -> None:
    """Measured on 8 x A100 by VIA-Research/vTrain (MIT)."""
    seconds = collective_seconds("all_reduce", megabytes * 2**20, ranks, 1, cluster("a100-80g", 1))
    assert seconds * 1e6 == pytest.approx(measured_us, rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_or_empty_is_free(kind: str) -> None:
    assert collective_seconds(kind, 10**6, 1, 1, cluster()) == 0
    assert collective_seconds(kind, 0, 8, 1, cluster()) == 0


@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(1, 10**9),
    ranks=st.sampled_from([2, 4, 8, 16]),
    stride=st.sampled_from([1, 2, 8]),
)
def test_larger_messages_take_longer(kind: str, size: int, ranks: int, stride: int) -> None:
    place = cluster("a100-80g", 16)
    one, two = (collective_seconds(kind, count, ranks, stride, place) for count in (size, 2 * size))
    assert 0 < one < two <= 2 * one


def test_all_reduce_is_reduce_scatter_and_all_gather() -> None:
    place, size = cluster("h100"), 10**9
    parts = sum(collective_seconds(kind, size, 8, 1, place) for kind in ("reduce_scatter", "all_gather"))
    assert collective_seconds("all_reduce", size, 8, 1, place) == pytest.approx(parts, rel=0.02)


def test_groups_share_the_adapters_of_a_node() -> None:
    """Two nodes: one group of 16 drives all eight adapters, eight groups of 2 drive one each."""
    place, size = cluster("h100", 2), 10**9
    whole = collective_seconds("all_reduce", size, 16, 1, place)
    pairs = collective_seconds("all_reduce", size, 2, 8, place)
    assert 3 < pairs / whole < 8


def test_rings_that_leave_by_the_adapter_they_came_in_by() -> None:
    """Groups of some devices of a node drive one share of its adapters; whole nodes and single devices all."""
    spread, size = cluster("h100", 4), 10**9
    bound = replace(spread, inter_node=replace(spread.inter_node, spreads_groups=False))
    for stride, ranks, slower in ((1, 32, 1), (2, 16, 4), (4, 8, 2), (8, 4, 1)):
        before, after = (
            collective_seconds("all_reduce", size, ranks, stride, place) for place in (spread, bound)
        )
        assert after / before == pytest.approx(slower, rel=0.02)
    with pytest.raises(DescriptionError, match="spreads_groups"):
        replace(spread.inter_node, spreads_groups="no")


def test_between_nodes_is_slower() -> None:
    place, size = cluster("h100", 2), 10**8
    for kind in KINDS:
        assert collective_seconds(kind, size, 2, 8, place) > 2 * collective_seconds(kind, size, 2, 1, place)
    assert collective_seconds("send", size, 2, 8, place) > 2 * collective_seconds("send", size, 2, 1, place)


def test_unknown_kind() -> None:
    with pytest.raises(DescriptionError, match="'gather' is unknown"):
        collective_seconds("gather", 1, 2, 1, cluster())
