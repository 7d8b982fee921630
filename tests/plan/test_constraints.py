import pytest
from hypothesis import given
from plans import layers, stock_plans, uniform_plan

from galvatron_megatron.describe.megatron_args import plan_constraints
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.megatron_arguments import command_line, runs_on_stock_megatron
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

STRATEGY = Strategy(tp=2, dp=2, sequence_parallel=SequenceParallel.MEGATRON, zero=1)
PLAN = uniform_plan(STRATEGY, (2, 3, 3, 2), pp=2, virtual_stages=2)


def test_nothing_fixed_accepts_anything() -> None:
    assert Constraints().is_free
    Constraints().check(PLAN)


@pytest.mark.parametrize(
    ("fixed", "other"),
    [
        ({"tp": 2}, {"tp": 4}),
        ({"cp": 1}, {"cp": 2}),
        ({"pp": 2}, {"pp": 4}),
        ({"sequence_parallel": SequenceParallel.MEGATRON}, {"sequence_parallel": SequenceParallel.ULYSSES}),
        ({"zero": 1}, {"zero": 0}),
        ({"recompute": Recompute.NONE}, {"recompute": Recompute.FULL}),
        ({"virtual_stages": 2}, {"virtual_stages": 1}),
        ({"stage_layers": (2, 3, 3, 2)}, {"stage_layers": (3, 2, 3, 2)}),
        ({"first_stage_layers": 5}, {"first_stage_layers": 4}),
        ({"last_stage_layers": 5}, {"last_stage_layers": 6}),
        ({"micro_batch_size": 1}, {"micro_batch_size": 2}),
        ({"global_batch_size": 16}, {"global_batch_size": 32}),
        ({}, {"layers_per_virtual_stage": 2}),
    ],
)
def test_check(fixed: dict, other: dict) -> None:
    Constraints(**fixed).check(PLAN)
    name, value = next(iter(other.items()))
    with pytest.raises(PlanError) as caught:
        Constraints(**other).check(PLAN)
    assert name in str(caught.value)
    assert f"valid: {value}" in str(caught.value)


def test_sequence_parallelism_is_free_where_tp_is_1() -> None:
    Constraints(sequence_parallel=SequenceParallel.MEGATRON).check(uniform_plan(Strategy(dp=4), (2,)))


def test_first_layers_of_every_stage_are_recomputed() -> None:
    full = Strategy(tp=2, dp=2, sequence_parallel=SequenceParallel.MEGATRON, zero=1, recompute=Recompute.FULL)
    fixed = Constraints(recompute=Recompute.FULL, recomputed_layers_per_stage=1)
    settings = {"pp": 2, "micro_batch_size": 1, "micro_batches": 2, "base": STRATEGY}
    fixed.check(Plan(stages=(layers(full, STRATEGY), layers(full)), **settings))
    with pytest.raises(PlanError, match="plan layer 1: recompute"):
        fixed.check(Plan(stages=(layers(full, full), layers(full)), **settings))


MORE = [
    {"zero": True},
    {"first_stage_layers": 0},
    {"last_stage_layers": -1},
    {"stage_layers": (2, 0)},
    {"recomputed_layers_per_stage": -1},
    {"global_batch_size": 2**31},
]


@pytest.mark.parametrize(
    "bad", [{"tp": 0}, {"zero": 4}, {"pp": 2, "stage_layers": (1, 1, 1)}, {"pp": True}, *MORE]
)
def test_impossible_constraints_are_refused(bad: dict) -> None:
    with pytest.raises(PlanError, match=r"constraint .*valid"):
        Constraints(**bad)


@given(plan=stock_plans())
def test_the_command_line_of_a_plan_fixes_that_plan(plan: Plan) -> None:
    assert runs_on_stock_megatron(plan)
    plan_constraints(command_line(plan)).check(plan)
