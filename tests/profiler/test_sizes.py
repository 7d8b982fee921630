"""Which micro-batch sizes are measured: as few as a curve needs, and all asked-for ones can be read off."""

import itertools
import random
from dataclasses import replace

import pytest
from profiles import layer_point, small_model

from galvatron_megatron.describe.profile import HEAD, PartPoint
from galvatron_megatron.describe.profile_key import layer_digest
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.profiler.needs import ProfileNeeds
from galvatron_megatron.profiler.sizes import settings_to_measure, sizes_to_measure

MODEL = small_model()
NAME = layer_digest(MODEL.layers[0])
SIZES = (1, 2, 4, 8, 16, 32)
NEEDS = ProfileNeeds.for_job(MODEL, 1, 32)


def measured(curve, sizes=SIZES) -> list[int]:
    """Sizes that are measured of a curve, a function of the size."""
    times: dict = {}
    while missing := sizes_to_measure(times, sizes):
        assert not set(missing) & set(times)
        times |= {size: curve(size) for size in missing}
    return sorted(times)


def test_a_straight_curve_needs_its_ends_and_its_middle():
    assert measured(lambda size: (0.5 + size,)) == [1, 8, 32]
    assert measured(lambda size: (0.5 + size,), (1, 2)) == [1, 2]
    assert measured(lambda size: (0.5 + size,), (4,)) == [4]


def test_a_bent_curve_gets_more_points_where_it_is_bent():
    assert measured(lambda size: (1 + max(0, size - 8) * 5,)) == [1, 4, 8, 16, 32]
    # Bent in one of two values that are measured together.
    assert measured(lambda size: (size, 1 + max(0, size - 8))) == [1, 4, 8, 16, 32]
    # Of no weight in both together.
    assert measured(lambda size: (100 * size, 1 + max(0, size - 8))) == [1, 8, 32]
    assert measured(lambda size: (10 if size == 4 else 1 + size,)) == [1, 8, 32]


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.0, 1.2, 1.5, 2.0])
@pytest.mark.parametrize("constant", [0.0, 5.0])
def test_what_was_left_out_of_a_smooth_curve_can_be_read_off(exponent, constant):
    def curve(size: int) -> float:
        return constant + size**exponent

    points = measured(lambda size: (curve(size),))
    for low, high in itertools.pairwise(points):
        for size in (size for size in SIZES if low <= size <= high):
            line = curve(low) + (curve(high) - curve(low)) * (size - low) / (high - low)
            assert line == pytest.approx(curve(size), rel=0.12)


def float_size(recompute: Recompute, size: int) -> float:
    return float(size)


def run(
    needs: ProfileNeeds, seconds, *, tp: int = 1, kind: SequenceParallel = SequenceParallel.NONE
) -> list[tuple[Recompute, int]]:
    """Settings in the order in which they are measured; ``seconds`` of one is None where it fails."""
    points: list[PartPoint] = []
    order = []
    while missing := settings_to_measure(points, NAME, tp, kind, needs):
        assert not set(missing) & set(order)
        order += missing
        for recompute, size in missing:
            time = seconds(recompute, size)
            how = {"failure": "out of memory"} if time is None else {"forward_seconds": time}
            made = layer_point(MODEL, tp, size, recompute, sequence_parallel=kind)
            point = replace(made, backward_seconds=0.0, **how)
            points += [point, *([replace(point, part=HEAD)] if recompute is Recompute.NONE else [])]
    return order


def test_straight_layers_are_recomputed_at_two_small_sizes_only():
    order = run(NEEDS, lambda recompute, size: float(size))
    assert {size for recompute, size in order if recompute is Recompute.NONE} == {1, 8, 32}
    assert {size for recompute, size in order if recompute is Recompute.FULL} == {1, 8}
    # Of few sizes the middle is too near to the smallest.
    few = replace(NEEDS, micro_batch_sizes=(1, 2, 4))
    order = run(few, lambda recompute, size: float(size))
    assert {size for recompute, size in order if recompute is Recompute.SELECTIVE} == {1, 4}


def test_bent_layers_are_recomputed_up_to_the_largest_size():
    order = run(NEEDS, lambda recompute, size: float(size * size))
    assert {size for recompute, size in order if recompute is Recompute.FULL} == {1, 32}


def test_recomputation_is_tried_where_layers_have_no_room_without_it():
    order = run(NEEDS, lambda recompute, size: size if size < 16 or recompute is Recompute.FULL else None)
    assert {size for recompute, size in order if recompute is Recompute.FULL} == {1, 32}
    assert {1, 8, 16, 32} <= {size for recompute, size in order if recompute is Recompute.NONE}
    assert (Recompute.SELECTIVE, 32) in order and (Recompute.SELECTIVE, 8) in order


def test_ulysses_needs_two_sizes_beside_one_rank_and_whole_curves_without():
    order = run(replace(NEEDS, tps=(1, 2)), float_size, tp=2, kind=SequenceParallel.ULYSSES)
    assert order == [(Recompute.NONE, 1), (Recompute.NONE, 8)]
    few = replace(NEEDS, micro_batch_sizes=(4,))
    assert run(few, float_size, tp=2, kind=SequenceParallel.ULYSSES) == [(Recompute.NONE, 4)]
    # No room for the smallest: none for the other.
    failed = run(NEEDS, lambda recompute, size: None, tp=2, kind=SequenceParallel.ULYSSES)
    assert failed == [(Recompute.NONE, 1), (Recompute.NONE, 8)]
    alone = replace(NEEDS, tps=(2,))
    assert run(alone, float_size, tp=2, kind=SequenceParallel.ULYSSES) == run(NEEDS, float_size)


def test_measuring_always_ends_and_asks_for_nothing_above_a_failure_at_the_smallest_size():
    chance = random.Random(1)
    for _ in range(50):
        times = {size: chance.choice([None, chance.uniform(0.1, 9.0)]) for size in SIZES}
        order = run(NEEDS, lambda recompute, size, times=times: times[size])
        assert len(order) == len(set(order)) <= 3 * len(SIZES)
    assert {size for _, size in run(NEEDS, lambda recompute, size: None)} <= {1, 8, 32}
