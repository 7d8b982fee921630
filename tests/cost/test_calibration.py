"""Calibration finds constants again, resists odd rows and reports what it did not see."""

from dataclasses import replace

import pytest

from galvatron_megatron.commands.validate import shipped_table
from galvatron_megatron.cost.calibration import calibrate, fit_constants, fit_workspace
from galvatron_megatron.cost.records.tables import read_table
from galvatron_megatron.cost.records.values import MeasuredRun
from galvatron_megatron.cost.validation import Predictor, shipped_test_bed
from galvatron_megatron.describe.cluster import Cluster
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


def test_runs_without_times() -> None:
    runs = [replace(run, step_seconds=0.0) for run in measured_on(BED)]
    with pytest.raises(DescriptionError, match="no run has a measured step time"):
        fit_constants(BED, runs)
    with pytest.raises(DescriptionError, match="0 runs with a measured time"):
        calibrate(BED, [replace(run, peak_bytes=()) for run in runs], "runs.csv")
