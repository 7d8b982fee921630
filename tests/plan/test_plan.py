from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from plans import layers, plans, uniform_plan

from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

STRATEGY = Strategy(tp=2, dp=2)
PLAN = uniform_plan(STRATEGY, (2, 1), micro_batch_size=2, micro_batches=3)


def test_sizes() -> None:
    assert PLAN.world_size == 8
    assert PLAN.global_batch_size == 12
    assert len(PLAN.layers) == 3
    assert PLAN.strategies == (STRATEGY,)


@given(plan=plans())
def test_every_layer_fills_its_stage(plan: Plan) -> None:
    assert plan.world_size == plan.pp * plan.base.ranks
    assert plan.global_batch_size == plan.micro_batches * plan.micro_batch_size * plan.base.dp
    assert sum(len(stage.layers) for stage in plan.stages) == len(plan.layers)
    for layer in plan.layers:
        assert layer.strategy.ranks * plan.pp == plan.world_size
        assert plan.micro_batch_size * plan.base.dp % layer.strategy.dp == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pp": 0}, "plan.pp: 0"),
        ({"pp": True}, "plan.pp: True"),
        ({"pp": 3}, "plan.stages: 2 entries; valid: 3"),
        ({"micro_batches": 1.0}, "plan.micro_batches: 1.0"),
        ({"schema_version": 2}, "plan.schema_version: 2"),
        ({"pp": 1, "virtual_stages": 2}, "plan.virtual_stages: 2 needs pp > 1"),
        ({"base": replace(STRATEGY, recompute=Recompute.FULL)}, "plan.base.recompute"),
        ({"base": Strategy(dp=8)}, "plan layer 0: tp 2 x cp 1 x dp 2 = 4 ranks; valid: 8"),
    ],
)
def test_bad_values_are_named(change: dict, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        replace(PLAN, **change)
    assert str(caught.value).startswith(message)


def test_samples_must_divide_over_a_layers_data_parallel_ranks() -> None:
    with pytest.raises(PlanError, match=r"plan layer 1: dp 4 does not divide the 2 samples"):
        Plan(
            pp=1,
            micro_batch_size=1,
            micro_batches=1,
            base=STRATEGY,
            stages=(layers(STRATEGY, Strategy(dp=4)),),
        )


def test_values_are_checked_for_their_type() -> None:
    with pytest.raises(PlanError, match=r"layer.kind: 'blocks' is unknown; valid: block, moe_block"):
        LayerPlan(kind="blocks", strategy=STRATEGY)
    with pytest.raises(PlanError, match=r"layer.strategy: 4"):
        LayerPlan(kind=PLAN.layers[0].kind, strategy=4)
    with pytest.raises(PlanError, match=r"stage.layers: empty"):
        StagePlan(layers=())
    with pytest.raises(FrozenInstanceError):
        PLAN.pp = 3


def test_uniform_means_one_strategy_in_the_base_layout() -> None:
    assert PLAN.is_uniform
    sequence_parallel = replace(STRATEGY, sequence_parallel=SequenceParallel.MEGATRON)
    settings = {"pp": 1, "micro_batch_size": 2, "micro_batches": 1, "base": STRATEGY}
    assert not Plan(stages=(layers(STRATEGY, replace(STRATEGY, zero=1)),), **settings).is_uniform
    assert not Plan(stages=(layers(sequence_parallel),), **settings).is_uniform
    assert not Plan(stages=(layers(Strategy(dp=4)),), **settings).is_uniform
    assert Plan(stages=(layers(replace(STRATEGY, recompute=Recompute.FULL)),), **settings).is_uniform


def test_degrees_of_experts_belong_to_layers_with_experts() -> None:
    shared = replace(STRATEGY, expert_parallel=2)
    moe, dense = (layers(shared, kind=LayerKind.MOE_BLOCK).layers, layers(STRATEGY).layers)
    settings = {"pp": 1, "micro_batch_size": 2, "micro_batches": 1}
    mixed = Plan(base=STRATEGY, stages=(StagePlan(layers=(*dense, *moe)),), **settings)
    assert mixed.is_uniform
    assert mixed.expert_degrees == ((2, None),)
    whole = layers(replace(shared, expert_tensor_parallel=1), kind=LayerKind.MOE_BLOCK).layers
    assert not Plan(base=STRATEGY, stages=(StagePlan(layers=(*moe, *whole)),), **settings).is_uniform
    with pytest.raises(PlanError, match=r"layer of kind block: tp2 dp2 ep2 has no experts .*valid"):
        layers(shared)
    with pytest.raises(PlanError, match=r"plan.base: tp2 dp2 ep2 has no experts .*valid"):
        Plan(base=shared, stages=(StagePlan(layers=moe),), **settings)
