"""Rank sets of a plan: complete, without repetition, agreed on by all ranks."""

import pytest

from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import SequenceParallel, Strategy
from galvatron_megatron.runtime.groups import layout_changes, planned_sets, replica_sets, tensor_sets


def plan(*degrees, base=1, ranks=4, pp=1):
    layers = tuple(LayerPlan(kind=LayerKind.BLOCK, strategy=Strategy(tp=tp, dp=ranks // tp)) for tp in degrees)
    size = len(layers) // pp
    return Plan(
        pp=pp,
        micro_batch_size=8,
        micro_batches=2,
        base=Strategy(tp=base, dp=ranks // base),
        stages=tuple(StagePlan(layers=layers[i * size : (i + 1) * size]) for i in range(pp)),
    )


def test_tensor_sets_are_consecutive():
    assert list(tensor_sets(2, 4, 8)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    with pytest.raises(ValueError, match="do not fit"):
        list(tensor_sets(3, 4, 8))


def test_replicas_stay_inside_their_stage():
    assert list(replica_sets(2, 4, 8)) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert list(replica_sets(1, 4, 8)) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_no_set_is_planned_twice():
    sets = planned_sets(plan(1, 2, 4, 2, 1, 4, base=2, ranks=8, pp=2))
    assert len(sets) == len(set(sets))
    assert all(list(ranks) == sorted(set(ranks)) for ranks in sets)


def test_every_rank_is_in_one_set_of_each_kind():
    made = plan(1, 2, 4, base=2)
    for tp in (1, 2, 4):
        for sets in (list(tensor_sets(tp, 4, 4)), list(replica_sets(tp, 4, 4))):
            assert sorted(rank for ranks in sets for rank in ranks) == [0, 1, 2, 3]
            assert set(sets) <= set(planned_sets(made))


def test_the_number_of_communicators_does_not_grow_with_the_layers():
    assert set(planned_sets(plan(1, 2, 4))) == set(planned_sets(plan(*(1, 2, 4) * 20)))


def test_changes_go_back_to_the_base_at_the_end_of_a_stage():
    changes = layout_changes(plan(2, 4, base=1, pp=2))
    degrees = {(source.tp, target.tp) for source, target in changes}
    assert degrees == {(1, 2), (2, 1), (1, 4), (4, 1)}


def test_ulysses_replicates_weights_over_the_stage():
    strategy = Strategy(tp=2, dp=2, sequence_parallel=SequenceParallel.ULYSSES)
    made = Plan(
        pp=1,
        micro_batch_size=4,
        micro_batches=1,
        base=Strategy(tp=2, dp=2),
        stages=(StagePlan(layers=(LayerPlan(kind=LayerKind.BLOCK, strategy=strategy),)),),
    )
    assert {(0, 1), (2, 3), (0, 1, 2, 3), (0,)} <= set(planned_sets(made))
