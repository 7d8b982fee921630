"""Estimates of whole plans."""

from dataclasses import replace

import pytest

from galvatron_megatron.cost.estimate import estimate_plan, simulate_estimate
from galvatron_megatron.cost.objective import step_seconds
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.cost.records.values import uniform_plan
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Strategy
from tests.cost.machines import costs, model


def plan(**changes: object) -> Plan:
    content = {"pp": 2, "micro_batch_size": 1, "micro_batches": 8}
    return uniform_plan(model(), Strategy(tp=2, dp=4), **(content | changes))


def test_stage_formula() -> None:
    price, chosen = costs(), plan()
    estimate = estimate_plan(chosen, price)
    stages = estimate.stages
    assert estimate.step_seconds == pytest.approx(
        step_seconds([s.seconds for s in stages], [s.sync_seconds for s in stages], 8)
        + price.step_overhead_seconds()
    )
    for stage in stages:
        assert sum(term.value for term in stage.micro_batch_terms) == pytest.approx(stage.seconds)
        assert sum(term.value for term in stage.sync_terms) == pytest.approx(stage.sync_seconds)
        assert sum(term.value for term in stage.memory_terms) == pytest.approx(stage.peak_bytes)
        assert stage.allocated_bytes < stage.peak_bytes
    # The first rank keeps two micro-batches alive, the last one, but that keeps the logits.
    head = price.head_cost(Setting.of(chosen)).activation_bytes
    embedding = price.embedding_cost(Setting.of(chosen)).activation_bytes
    assert stages[0].activation_bytes - 2 * embedding == 2 * (stages[1].activation_bytes - head)


def test_simulation_agrees() -> None:
    for chosen in (plan(), plan(virtual_stages=2), plan(pp=1), plan(pp=4)):
        estimate = estimate_plan(chosen, costs())
        simulation = simulate_estimate(estimate, chosen.micro_batches)
        assert simulation.step_seconds == pytest.approx(estimate.step_seconds, rel=0.1)
        for stage, peak in zip(estimate.stages, simulation.peak_bytes, strict=True):
            kept = stage.activation_bytes + stage.transient_bytes
            assert kept * 0.6 <= peak <= kept * 1.001


def test_mixed_layouts_pay_for_resharding() -> None:
    narrow, wide = Strategy(tp=1, dp=8), Strategy(tp=2, dp=4)
    even = plan(pp=1)
    mixed = replace(
        even,
        stages=(
            StagePlan(
                layers=tuple(
                    LayerPlan(kind=layer.kind, strategy=narrow if place % 2 else wide)
                    for place, layer in enumerate(even.stages[0].layers)
                )
            ),
        ),
        micro_batch_size=2,
    )
    estimate = estimate_plan(mixed, costs())
    names = {term.name: term.value for term in estimate.stages[0].micro_batch_terms}
    assert names["resharding"] > 0
    assert "resharding" not in {term.name for term in estimate_plan(even, costs()).stages[0].micro_batch_terms}


def test_throughput_and_utilization() -> None:
    price, chosen = costs(), plan()
    estimate = estimate_plan(chosen, price)
    assert estimate.tokens_per_step == 8 * 4 * 2048
    assert estimate.tokens_per_second_per_device == pytest.approx(8 * 4 * 2048 / estimate.step_seconds / 16)
    assert 0.05 < estimate.model_flops_utilization < 0.75


def test_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="8 layers; valid: the 4 of model"):
        estimate_plan(plan(), costs(layers=model().layers[:4]))
