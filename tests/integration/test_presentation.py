from dataclasses import replace

from test_decision import DECISION, LAYER

from galvatron_megatron.integration.presentation import plan_lines
from galvatron_megatron.plan.plan import StagePlan


def test_a_plan_and_its_prediction_are_one_fact_a_line():
    decision = replace(DECISION, runners_up=(("pp1 tp2 dp1 micro-batch 4 x 2", 0.3), ("pp2", 0.4)))
    assert plan_lines(decision, "--micro-batch-size 2")[1:-1] == [
        "note: a note",
        "2 ranks: pipeline 1, micro-batch 2 x 4, global batch 16",
        "embedding and head: tp1 dp2",
        "layers: layer 0-1: tp1 dp2",
        "runs on: Megatron alone",
        "arguments: --micro-batch-size 2",
        "predicted: 250.0 ms a step (64 samples/s), memory 0.000 GiB",
        "next best: 300.0 ms pp1 tp2 dp1 micro-batch 4 x 2",
        "next best: 400.0 ms pp2",
        "measuring took 1.5 s, searching 0.50 s",
    ]


def test_stages_and_layers_are_counted_through():
    plan = replace(DECISION.plan, pp=2, stages=(StagePlan(layers=(LAYER,)), StagePlan(layers=(LAYER, LAYER))))
    lines = plan_lines(replace(DECISION, plan=plan, step_seconds=None), "")
    assert "stage 0: layer 0: tp1 dp2" in lines and "stage 1: layer 1-2: tp1 dp2" in lines
    assert "predicted: nothing, the plan was not searched here" in lines
