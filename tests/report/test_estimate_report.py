"""An estimate says how sure it is, of time and of memory, and says so where it is not."""

from dataclasses import replace

import pytest

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.estimate import Estimate, estimate_plan
from galvatron_megatron.cost.records.values import gpt_layer, uniform_plan
from galvatron_megatron.describe.cluster import Calibration, read_cluster
from galvatron_megatron.describe.model import Model
from galvatron_megatron.plan.strategy import Strategy
from galvatron_megatron.report.estimate_report import confidence, estimate_document, memory_confidence

CLUSTER = read_cluster("b200")


def estimate() -> Estimate:
    layer = gpt_layer(1024, 16)
    model = Model(name="gpt", hidden_size=1024, seq_length=1024, vocab_size=50257, layers=(layer,) * 4)
    plan = uniform_plan(model, Strategy(tp=2, dp=2), pp=2, micro_batch_size=2, micro_batches=4)
    return estimate_plan(plan, AnalyticCostModel(model, CLUSTER))


def test_bands_of_a_calibrated_device() -> None:
    found, calibration = estimate(), CLUSTER.calibration
    document = estimate_document(found, CLUSTER)
    assert document["calibrated"] and document["memory_calibrated"]
    assert document["step_seconds_band"] == pytest.approx(
        [found.step_seconds * calibration.low, found.step_seconds * calibration.high]
    )
    assert len(document["memory_gb_band"]) == len(found.stages)
    for stage, (low, high) in zip(found.stages, document["memory_gb_band"], strict=True):
        assert low * 2**30 < stage.peak_bytes < high * 2**30
        assert (high - low) * 2**30 == pytest.approx(
            stage.allocated_bytes * (calibration.memory_high - calibration.memory_low)
        )
    assert "megatron_b200.csv" in confidence(calibration)
    assert "megatron_b200.csv" in memory_confidence(calibration)


def test_a_device_without_runs_is_uncalibrated() -> None:
    document = estimate_document(estimate(), replace(CLUSTER, calibration=Calibration()))
    assert not document["calibrated"] and not document["memory_calibrated"]
    assert "step_seconds_band" not in document and "memory_gb_band" not in document
    assert confidence(Calibration()).startswith("uncalibrated")
    assert memory_confidence(Calibration()).startswith("uncalibrated")


def test_memory_can_be_calibrated_where_time_is_not() -> None:
    memory = replace(CLUSTER.calibration, runs=0)
    document = estimate_document(estimate(), replace(CLUSTER, calibration=memory))
    assert not document["calibrated"] and document["memory_calibrated"]
