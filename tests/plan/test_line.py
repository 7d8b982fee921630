from dataclasses import replace

from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.line import plan_line
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import SequenceParallel, Strategy

WHOLE = Strategy(tp=1, dp=4)
SPLIT = Strategy(tp=2, dp=2, sequence_parallel=SequenceParallel.MEGATRON)


def plan(*strategies: Strategy, base: Strategy = WHOLE) -> Plan:
    layers = tuple(LayerPlan(kind=LayerKind.BLOCK, strategy=strategy) for strategy in strategies)
    return Plan(pp=1, micro_batch_size=2, micro_batches=4, base=base, stages=(StagePlan(layers=layers),))


def test_equal_layers_are_one_strategy():
    assert plan_line(plan(WHOLE, WHOLE)) == "pp1 tp1 dp4 micro-batch 2 x 4"


def test_chunks_are_named():
    stage = plan(WHOLE).stages[0]
    two = replace(plan(WHOLE), pp=2, virtual_stages=2, stages=(stage,) * 4)
    assert plan_line(two) == "pp2 x2 chunks tp1 dp4 micro-batch 2 x 4"


def test_layers_that_differ_are_counted_beside_embedding_and_head():
    mixed = plan(SPLIT, WHOLE, SPLIT)
    assert plan_line(mixed) == (
        "pp1 micro-batch 2 x 4: 2 x (tp2+megatron dp2), 1 x (tp1 dp4); embedding and head tp1 dp4"
    )
    # Equal layers in another layout than the ends are no uniform plan either.
    assert plan_line(plan(WHOLE, base=SPLIT)).endswith(": 1 x (tp1 dp4); embedding and head tp2+megatron dp2")
