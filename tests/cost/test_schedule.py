"""The schedule simulator against the closed formulas and against itself."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.cost.objective import live_micro_batches, step_seconds
from galvatron_megatron.cost.schedule import BACKWARD, FORWARD, ChunkWork, ScheduleKind, rank_order, simulate
from galvatron_megatron.errors import PlanError


def even(stages: int, **changes: float) -> list[ChunkWork]:
    return [ChunkWork(**{"forward_seconds": 1.0, "backward_seconds": 2.0, **changes})] * stages


@given(ranks=st.integers(1, 8), rounds=st.integers(1, 5), chunks=st.integers(1, 4))
def test_equal_stages_take_the_objectives_time(ranks: int, rounds: int, chunks: int) -> None:
    chunks = chunks if ranks > 1 else 1
    micro_batches = ranks * rounds
    simulation = simulate(even(ranks * chunks), ranks, micro_batches)
    formula = step_seconds([3.0 * chunks] * ranks, [0.0], micro_batches, chunks)
    assert simulation.pipeline_seconds == pytest.approx(formula)


@given(
    times=st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), min_size=1, max_size=6),
    micro_batches=st.integers(1, 12),
)
def test_uneven_stages(times: list, micro_batches: int) -> None:
    """No less than the slowest rank's work behind what fills it and in front of what drains it.

    The objective's sum t + (m - 1) max t may lie on either side: a slow first stage fills its wait with the
    forward passes of its warm-up, and stages whose forward and backward differ do not interlock.
    """
    work = [ChunkWork(forward_seconds=forward, backward_seconds=backward) for forward, backward in times]
    formula = step_seconds([sum(pair) for pair in times], [0.0], micro_batches)
    simulated = simulate(work, len(work), micro_batches).pipeline_seconds
    for rank, pair in enumerate(times):
        around = sum(map(sum, times[:rank]))
        assert simulated >= (around + micro_batches * sum(pair)) * (1 - 1e-9)
    assert formula / 2 <= simulated <= 2 * formula


@given(ranks=st.integers(2, 8), rounds=st.integers(1, 4), chunks=st.integers(1, 3))
def test_memory_peak_is_the_formulas(ranks: int, rounds: int, chunks: int) -> None:
    micro_batches = ranks * rounds
    simulation = simulate(even(ranks * chunks, activation_bytes=10, transient_bytes=3), ranks, micro_batches)
    for rank, peak in enumerate(simulation.peak_bytes):
        assert peak == 10 * sum(live_micro_batches(ranks, rank, micro_batches, chunks)) + 3


@given(
    ranks=st.integers(1, 5),
    micro_batches=st.integers(1, 9),
    kind=st.sampled_from(ScheduleKind),
    send=st.sampled_from([0.0, 0.3]),
)
def test_dependencies_hold(ranks: int, micro_batches: int, kind: ScheduleKind, send: float) -> None:
    simulation = simulate(even(ranks, send_seconds=send), ranks, micro_batches, kind=kind)
    ends = {(event.rank, event.micro_batch, event.direction): event for event in simulation.events}
    assert len(ends) == len(simulation.events) == 2 * ranks * micro_batches
    for (rank, micro, direction), event in ends.items():
        if direction == FORWARD and rank:
            assert event.start_seconds >= ends[rank - 1, micro, FORWARD].end_seconds + send - 1e-9
        if direction == BACKWARD:
            assert event.start_seconds >= ends[rank, micro, FORWARD].end_seconds - 1e-9
            if rank + 1 < ranks:
                assert event.start_seconds >= ends[rank + 1, micro, BACKWARD].end_seconds + send - 1e-9
    for rank in range(ranks):
        mine = [event for event in simulation.events if event.rank == rank]
        assert all(first.end_seconds <= second.start_seconds + 1e-9 for first, second in pairwise(mine))


def test_gpipe_keeps_every_micro_batch() -> None:
    work = even(4, activation_bytes=1)
    gpipe = simulate(work, 4, 8, kind=ScheduleKind.GPIPE)
    assert gpipe.peak_bytes == (8, 8, 8, 8)
    assert gpipe.pipeline_seconds == simulate(work, 4, 8).pipeline_seconds
    assert max(simulate(work, 4, 8).peak_bytes) == 4


def test_interleaving_shrinks_the_bubble() -> None:
    plain = simulate([ChunkWork(forward_seconds=2, backward_seconds=4)] * 4, 4, 8)
    interleaved = simulate(even(8), 4, 8)
    assert interleaved.bubble_fraction < 0.6 * plain.bubble_fraction
    assert sum(interleaved.busy_seconds) == sum(plain.busy_seconds)


def test_synchronisation_ends_the_step() -> None:
    simulation = simulate(even(2), 2, 4, sync_seconds=[0.5, 1.5])
    assert simulation.step_seconds == simulation.pipeline_seconds + 1.5


def test_order_of_a_rank() -> None:
    forward, backward = (FORWARD, 0), (BACKWARD, 0)
    assert [(direction, chunk) for direction, chunk, _ in rank_order(0, 2, 2)] == [forward] * 2 + [backward] * 2
    assert [micro for _, _, micro in rank_order(1, 2, 3)] == [0, 0, 1, 1, 2, 2]
    # Two micro-batches pass chunk 0, then chunk 1; rank 0 warms up with (2 - 1) * 2 + 2 passes.
    order = rank_order(0, 2, 4, 2)
    assert order[:4] == [(FORWARD, 0, 0), (FORWARD, 0, 1), (FORWARD, 1, 0), (FORWARD, 1, 1)]
    assert order[4:6] == [(FORWARD, 0, 2), (BACKWARD, 1, 0)]


@pytest.mark.parametrize(("stages", "ranks", "micro_batches"), [(3, 2, 4), (0, 1, 1), (2, 2, 0)])
def test_impossible_requests(stages: int, ranks: int, micro_batches: int) -> None:
    with pytest.raises(PlanError, match="schedule:"):
        simulate(even(stages), ranks, micro_batches)
