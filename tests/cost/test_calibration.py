"""Calibration finds constants again, resists odd rows and reports what it did not see."""

from dataclasses import replace

import pytest

from galvatron_megatron.commands.validate import shipped_table
from galvatron_megatron.cost.calibration import calibrate, fit_constants, fit_workspace
from galvatron_megatron.cost.layer_factors import LEAST_RUNS
from galvatron_megatron.cost.records.tables import read_table
from galvatron_megatron.cost.records.values import MeasuredRun
from galvatron_megatron.cost.validation import Predictor, shipped_test_bed
from galvatron_megatron.describe.cluster import Calibration, Cluster
from galvatron_megatron.errors import DescriptionError

BED = shipped_test_bed("simumax-b200")


def measured_on(cluster: Cluster) -> list[MeasuredRun]:
    """The B200 runs with the times and memory that the model itself gives them on a cluster."""
    predict = Predictor(lambda _: cluster)
    runs = []
    for run in read_table(shipped_table("megatron_b200")).runs:
        seconds, memory = predict(run)
        runs.append(replace(run, step_seconds=seconds, peak_bytes=memory))
    return runs


def changed(**constants: float) -> Cluster:
    return replace(BED, constants=replace(BED.constants, **constants))


def test_constants_are_found_again() -> None:
    truth = changed(gemm_efficiency=0.62, attention_efficiency=0.5)
    fitted = fit_constants(BED, measured_on(truth))
    assert fitted.constants.gemm_efficiency == pytest.approx(0.62, rel=0.03)
    assert fitted.constants.attention_efficiency == pytest.approx(0.5, rel=0.05)
    assert fitted == fit_constants(BED, measured_on(truth))


def test_an_odd_run_does_not_pull() -> None:
    runs = measured_on(changed(gemm_efficiency=0.62))
    runs[0] = replace(runs[0], step_seconds=runs[0].step_seconds * 5)
    assert fit_constants(BED, runs).constants.gemm_efficiency == pytest.approx(0.62, rel=0.05)


def test_workspace_is_the_missing_memory() -> None:
    assert fit_workspace(
        BED, measured_on(changed(workspace_mib=200.0))
    ).constants.workspace_mib == pytest.approx(200, abs=0.2)
    assert fit_workspace(BED, [replace(run, peak_bytes=()) for run in measured_on(BED)]) is BED


def test_band_and_errors() -> None:
    runs = measured_on(changed(gemm_efficiency=0.6))
    slower = [replace(run, step_seconds=run.step_seconds * 1.1) for run in runs[10:]]
    fit = calibrate(BED, runs[:6], "runs.csv", held_out=slower, folds=2)
    calibration = fit.cluster.calibration
    assert (calibration.runs, calibration.table) == (6, "runs.csv")
    assert fit.fitted_error < 0.02
    assert calibration.mean_error == pytest.approx(1 - 1 / 1.1, abs=0.03)
    assert calibration.low <= calibration.high
    assert calibration.high == pytest.approx(1.1, abs=0.05)


def test_band_of_memory() -> None:
    runs = measured_on(BED)
    larger = [
        replace(run, peak_bytes=tuple((rank, int(1.2 * size)) for rank, size in run.peak_bytes))
        for run in runs[10:]
    ]
    calibration = calibrate(BED, runs[:6], "runs.csv", held_out=larger, folds=2).cluster.calibration
    assert (calibration.memory_runs, calibration.memory_table) == (6, "runs.csv")
    assert calibration.memory_low == pytest.approx(1.2, abs=0.01)
    assert calibration.memory_high == pytest.approx(1.2, abs=0.01)
    assert calibration.memory_mean_error == pytest.approx(1 - 1 / 1.2, abs=0.01)
    timed = [replace(run, peak_bytes=()) for run in runs[:6]]
    assert (
        calibrate(
            replace(BED, calibration=Calibration()), timed, "runs.csv", folds=2
        ).cluster.calibration.memory_runs
        == 0
    )


def test_layer_factors_beside_the_constants() -> None:
    """Without factors, constants bend towards a layer that several runs share and are further off in all."""
    bed = replace(shipped_test_bed("vtrain-single"), layer_factors=())
    table = read_table(shipped_table("vtrain_a100_single")).runs
    runs = [run for run in table if run.plan.base.tp == 4 and run.model.hidden_size == 2048][:24]
    predict = Predictor(lambda _: bed)
    slow = [run.plan.micro_batch_size == 2 for run in runs]
    assert LEAST_RUNS < sum(slow) < len(runs) - LEAST_RUNS
    runs = [
        replace(run, step_seconds=predict(run)[0] * (1.3 if odd else 1.0))
        for run, odd in zip(runs, slow, strict=True)
    ]
    fit = calibrate(bed, runs[::2], "runs.csv", held_out=runs[1::2], folds=2)
    alone = Predictor(lambda _: replace(fit.cluster, layer_factors=()))
    errors = [abs(alone(run)[0] / run.step_seconds - 1) for run in runs[1::2]]
    assert fit.cluster.layer_factors
    assert fit.cluster.calibration.mean_error < 0.6 * sum(errors) / len(errors)
    plain = calibrate(bed, runs[:4], "runs.csv", layer_factors=False, folds=2)
    assert plain.cluster.layer_factors == ()


def test_runs_without_times() -> None:
    runs = [replace(run, step_seconds=0.0) for run in measured_on(BED)]
    with pytest.raises(DescriptionError, match="no run has a measured step time"):
        fit_constants(BED, runs)
    with pytest.raises(DescriptionError, match="0 runs with a measured time"):
        calibrate(BED, [replace(run, peak_bytes=()) for run in runs], "runs.csv")
