"""Choosing among the best plans by their simulated schedules."""

from dataclasses import replace

import pytest

from galvatron_megatron.cost.records.values import uniform_plan
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Recompute, Strategy
from galvatron_megatron.search.evaluation import evaluate
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.reranking import rerank, simulated_seconds
from galvatron_megatron.search.result import SearchResult
from tests.cost.machines import costs, model

MODEL = replace(model(), layers=model().layers[:1] * 16)
COSTS = costs(layers=MODEL.layers)


def planned(pp: int, virtual: int = 1, recompute: Recompute = Recompute.NONE, split=None) -> Plan:
    strategy = Strategy(dp=8 // pp, recompute=recompute)
    return uniform_plan(
        MODEL,
        strategy,
        pp=pp,
        virtual_stages=virtual,
        micro_batch_size=1,
        micro_batches=4 * pp,
        split=split,
    )


def result_of(plan: Plan, *others: Plan) -> SearchResult:
    seconds = {
        entry: evaluate(entry, COSTS).step_seconds + COSTS.step_overhead_seconds() for entry in (plan, *others)
    }
    cost = evaluate(plan, COSTS)
    return SearchResult(
        plan=plan,
        step_seconds=seconds[plan],
        stage_seconds=list(cost.stage_seconds),
        sync_seconds=list(cost.sync_seconds),
        memory_bytes=list(cost.stage_bytes),
        samples_per_second=plan.global_batch_size / seconds[plan],
        search_seconds=0.0,
        runners_up=[(entry, seconds[entry]) for entry in others],
        best_uniform=None,
        best_layerwise=None,
        gap=0.0,
        outer_points=1,
        solved_points=1,
    )


def request(**changes) -> SearchRequest:
    values = {
        "model": MODEL,
        "world_size": 8,
        "devices_per_node": 8,
        "memory_bytes": 2**40,
        "global_batch_size": 32,
        **changes,
    }
    return SearchRequest(**values)


PLANS = (planned(2), planned(4), planned(4, 2), planned(4, split=(5, 4, 4, 3)), planned(2, 4), planned(8))


@pytest.mark.parametrize("first", range(len(PLANS)))
def test_the_fastest_schedule_wins_whatever_came_first(first: int) -> None:
    plan, *others = (*PLANS[first:], *PLANS[:first])
    result = rerank(result_of(plan, *others), request(), COSTS)
    seconds = {entry: simulated_seconds(entry, COSTS) for entry in PLANS}
    assert dict(result.simulated) == seconds
    best = min(seconds, key=seconds.__getitem__)
    assert seconds[result.plan] <= seconds[best] * 1.0011
    cost = evaluate(result.plan, COSTS)
    assert result.step_seconds == pytest.approx(cost.step_seconds + COSTS.step_overhead_seconds())
    assert result.memory_bytes == list(cost.stage_bytes)
    assert result.plan not in [entry for entry, _ in result.runners_up]
    assert {entry for entry, _ in result.runners_up} | {result.plan} == set(PLANS)
    assert (result.searched is None) == (result.plan == plan)
    assert result.searched is None or result.searched[0] == plan


def test_uneven_stages_take_less_than_the_formula_says() -> None:
    """The formula charges the slowest stage for every micro-batch and every stage for the fill."""
    uneven = planned(4, split=(1, 1, 1, 13))
    formula = evaluate(uneven, COSTS).step_seconds + COSTS.step_overhead_seconds()
    assert simulated_seconds(uneven, COSTS) <= formula * (1 + 1e-9)


def test_a_uniform_plan_is_preferred_by_the_margin() -> None:
    steady = planned(4, recompute=Recompute.FULL)
    layers = steady.layers
    free = replace(layers[0], strategy=replace(layers[0].strategy, recompute=Recompute.NONE, zero=1))
    stages = tuple(
        StagePlan(
            layers=(free, *(LayerPlan(kind=layer.kind, strategy=layer.strategy) for layer in stage.layers[1:]))
        )
        for stage in steady.stages
    )
    mixed = replace(steady, stages=stages)
    assert simulated_seconds(mixed, COSTS) < simulated_seconds(steady, COSTS)
    assert rerank(result_of(steady, mixed), request(), COSTS).plan == mixed
    assert rerank(result_of(mixed, steady), request(uniform_margin=0.5), COSTS).plan == steady
