from dataclasses import replace

import pytest

from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.runnable import execution_problem
from galvatron_megatron.plan.strategy import Offload, SequenceParallel, Strategy

PLAIN = Strategy(tp=2, dp=4)


def _plan(*strategies: Strategy, base: Strategy = PLAIN, kind: LayerKind = LayerKind.BLOCK) -> Plan:
    layers = tuple(LayerPlan(kind=kind, strategy=strategy) for strategy in strategies)
    return Plan(pp=1, micro_batch_size=8, micro_batches=1, base=base, stages=(StagePlan(layers=layers),))


@pytest.mark.parametrize(
    "plan",
    [
        _plan(PLAIN, PLAIN),
        _plan(PLAIN, Strategy(tp=1, dp=8)),
        _plan(PLAIN, Strategy(tp=2, cp=2, dp=2)),
        _plan(Strategy(dp=8), Strategy(dp=8, expert_parallel=4), kind=LayerKind.MOE),
        _plan(PLAIN, Strategy(tp=4, sequence_parallel=SequenceParallel.ULYSSES, dp=2, zero=1)),
        _plan(PLAIN, Strategy(dp=8), kind=LayerKind.MAMBA),
        _plan(PLAIN, replace(PLAIN, zero=2)),
        _plan(PLAIN, replace(PLAIN, zero=1, offload=Offload.OPTIMIZER)),
        _plan(PLAIN, base=replace(PLAIN, zero=3, offload=Offload.PARAMETERS)),
        _plan(replace(PLAIN, zero=3), base=replace(PLAIN, zero=3)),
        _plan(Strategy(tp=2, cp=2, dp=2), base=Strategy(tp=2, cp=2, dp=2)),
    ],
)
def test_what_can_be_executed(plan):
    assert execution_problem(plan) is None


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (
            _plan(Strategy(dp=8), Strategy(dp=8, zero=1, offload=Offload.OPTIMIZER), kind=LayerKind.MOE),
            "plan layer 1.offload: optimizer with experts; valid: none",
        ),
        (
            _plan(PLAIN, Strategy(tp=2, sequence_parallel=SequenceParallel.ULYSSES, cp=2, dp=2)),
            "plan layer 1.cp: 2 with ulysses; valid: cp 1, or sequence_parallel none or megatron",
        ),
        (
            _plan(PLAIN, base=Strategy(tp=2, cp=2, dp=2)),
            "plan.base.cp: 2; valid for the base of layers that differ: 1",
        ),
        (
            _plan(PLAIN, Strategy(dp=8), Strategy(tp=2, dp=4), kind=LayerKind.MOE),
            "plan layer 0.sequence_parallel: none with tp 2 and experts; valid: megatron, ulysses",
        ),
        (
            _plan(Strategy(dp=8), Strategy(dp=8, zero=2), kind=LayerKind.MOE),
            "plan layer 1.zero: 2 with experts; valid: 0, 1",
        ),
        (
            _plan(Strategy(dp=8), base=Strategy(tp=2, sequence_parallel=SequenceParallel.ULYSSES, dp=4)),
            "plan.base.sequence_parallel: ulysses; valid for the base: none, megatron",
        ),
        (
            _plan(PLAIN, Strategy(tp=2, cp=2, dp=2), kind=LayerKind.MAMBA),
            "plan layer 1.cp: 2 with mamba; valid where layers differ: 1",
        ),
        (
            _plan(
                PLAIN,
                Strategy(tp=2, sequence_parallel=SequenceParallel.ULYSSES, dp=4),
                kind=LayerKind.MAMBA,
            ),
            "plan layer 1.sequence_parallel: ulysses with mamba; valid: none, megatron",
        ),
    ],
)
def test_what_cannot_and_why(plan, problem):
    assert execution_problem(plan) == problem


def test_layers_with_experts_run_beside_layers_that_differ() -> None:
    alone = Strategy(dp=8)
    moe = LayerPlan(kind=LayerKind.MOE_BLOCK, strategy=replace(alone, expert_parallel=4))
    settings = {"pp": 1, "micro_batch_size": 8, "micro_batches": 1, "base": PLAIN}
    for strategy in (alone, PLAIN):
        dense = LayerPlan(kind=LayerKind.BLOCK, strategy=strategy)
        assert execution_problem(Plan(stages=(StagePlan(layers=(dense, moe)),), **settings)) is None
