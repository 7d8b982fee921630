"""Fits a cluster's constants to measured runs, with cross-validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from galvatron_megatron.cost.layer_factors import fit_layer_factors
from galvatron_megatron.cost.records.values import MeasuredRun
from galvatron_megatron.cost.validation import Predictor
from galvatron_megatron.describe.cluster import Calibration, Cluster
from galvatron_megatron.errors import DescriptionError

_BOUNDS = {
    "constants.gemm_efficiency": (0.2, 0.98),
    "constants.attention_efficiency": (0.1, 0.98),
    "constants.memory_efficiency": (0.2, 0.95),
    "constants.kernel_us": (1.0, 40.0),
    "constants.host_us": (1.0, 200.0),
    "constants.step_ms": (0.1, 200.0),
    "intra_node.efficiency": (0.1, 0.8),
    "intra_node.base_us": (5.0, 500.0),
    "inter_node.efficiency": (0.1, 0.95),
}
"""What time is fitted by: physical constants and the range in which each makes sense (NCCL's rings reach about
0.76 of NVLink's rate on A100 and 0.74 on B200)."""
_WORKSPACE_MIB = (0.0, 512.0)
"""Range of the one constant that memory is fitted by."""
_DIGITS = 4
"""Significant digits of a fitted constant."""
_ROUNDS = 25
_STEP = 0.03
_PRIOR = 0.3
"""A constant that the runs say nothing about stays where it was: an e-fold away from its start costs as much as
this fraction of the scale as the relative error of one run."""
_SCALE = 0.1
"""Relative error beyond which a run counts less: odd runs must not pull the constants."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Fit:
    """A calibrated cluster and how well it predicts runs that it was not fitted on."""

    cluster: Cluster
    fitted_error: float
    """Mean absolute relative error over the runs that the constants were fitted on."""
    cross_error: float
    """The same in cross-validation: every run predicted by constants fitted on the others."""
    folds: int


def _get(cluster: Cluster, name: str) -> float:
    part, field = name.split(".")
    return getattr(getattr(cluster, part), field)


def _with(cluster: Cluster, names: Sequence[str], logs: np.ndarray) -> Cluster:
    """The cluster with the named constants set to exp(logs), within their bounds."""
    changes: dict[str, dict[str, float]] = {}
    for name, value in zip(names, logs, strict=True):
        part, field = name.split(".")
        low, high = _BOUNDS[name]
        changes.setdefault(part, {})[field] = _rounded(float(np.clip(np.exp(value), low, high)))
    return replace(
        cluster, **{part: replace(getattr(cluster, part), **fields) for part, fields in changes.items()}
    )


def _rounded(value: float) -> float:
    return float(f"{value:.12g}")


def _log_errors(cluster: Cluster, runs: Sequence[MeasuredRun]) -> np.ndarray:
    predict = Predictor(lambda _: cluster)
    return np.array([np.log(predict(run)[0] / run.step_seconds) for run in runs])


def _free_constants(cluster: Cluster, runs: Sequence[MeasuredRun]) -> list[str]:
    """The constants that the runs can say something about."""
    names = list(_BOUNDS)
    if all(run.plan.world_size <= cluster.devices_per_node for run in runs):
        names.remove("inter_node.efficiency")
    if all(run.model.fused_attention is False for run in runs):
        names.remove("constants.attention_efficiency")
    return names


def fit_constants(cluster: Cluster, runs: Sequence[MeasuredRun]) -> Cluster:
    """Fits the constants that decide time; deterministic.

    Minimises a robust (Cauchy) sum of the logarithms of predicted / measured by the Levenberg-Marquardt method
    over the logarithms of the constants, with a weak pull towards where they started.

    Args:
        cluster: the test bed with constants to start from.
        runs: with measured step times.

    Returns:
        The cluster with fitted constants.

    Raises:
        DescriptionError: no run has a measured time.
    """
    runs = [run for run in runs if run.step_seconds and not run.doubt]
    if not runs:
        raise DescriptionError("calibration: no run has a measured step time; valid: at least one")
    names = _free_constants(cluster, runs)
    start = np.log([_get(cluster, name) for name in names])
    low, high = np.log([_BOUNDS[name] for name in names]).T
    point = np.clip(start, low, high)

    def errors_at(at: np.ndarray) -> np.ndarray:
        return _log_errors(_with(cluster, names, at), runs)

    point = _minimise(errors_at, point, start, low, high)
    return _with(cluster, names, np.log([float(f"{value:.{_DIGITS}g}") for value in np.exp(point)]))


def _minimise(
    errors_at: Callable[[np.ndarray], np.ndarray],
    point: np.ndarray,
    start: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    """Minimises sum log(1 + (error / _SCALE)^2) plus the pull to ``start`` within bounds, from ``point``."""

    def residuals(at: np.ndarray) -> np.ndarray:
        return np.concatenate([errors_at(at), _PRIOR * _SCALE * (at - start)])

    def cost(errors: np.ndarray) -> float:
        return float(np.log1p((errors / _SCALE) ** 2).sum())

    errors = residuals(point)
    best, damping = cost(errors), 1e-2
    for _ in range(_ROUNDS):
        columns = []
        for index in range(len(point)):
            moved = point.copy()
            step = _STEP if point[index] + _STEP <= high[index] else -_STEP
            moved[index] += step
            columns.append((residuals(moved) - errors) / step)
        jacobian = np.stack(columns, axis=1)
        weights = 1 / (1 + (errors / _SCALE) ** 2)
        normal = jacobian.T @ (weights[:, None] * jacobian)
        gradient = jacobian.T @ (weights * errors)
        before = best
        for _ in range(6):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -gradient)
            trial = np.clip(point + step, low, high)
            trial_errors = residuals(trial)
            if cost(trial_errors) < best:
                point, errors, best, damping = trial, trial_errors, cost(trial_errors), damping / 3
                break
            damping *= 4
        if before - best <= 1e-4 * before:
            break
    return point


def fit_workspace(cluster: Cluster, runs: Sequence[MeasuredRun]) -> Cluster:
    """Sets the library workspaces to the median of what is missing in predicted memory; deterministic.

    Args:
        cluster: the test bed.
        runs: with or without measured memory.

    Returns:
        The cluster with another ``workspace_mib``; the same where no run has a measured memory.
    """
    predict = Predictor(lambda _: cluster)
    missing = [
        measured - predicted
        for run in runs
        if run.peak_bytes and not run.doubt
        for (_, measured), (_, predicted) in zip(run.peak_bytes, predict(run)[1], strict=True)
    ]
    if not missing:
        return cluster
    workspace = np.clip(cluster.constants.workspace_mib + np.median(missing) / 2**20, *_WORKSPACE_MIB)
    return replace(cluster, constants=replace(cluster.constants, workspace_mib=round(float(workspace), 1)))


def calibrate(
    cluster: Cluster,
    runs: Sequence[MeasuredRun],
    table: str,
    *,
    held_out: Sequence[MeasuredRun] = (),
    folds: int = 3,
    layer_factors: bool = True,
) -> Fit:
    """Fits the constants and says by cross-validation how far estimates with them are off.

    Args:
        cluster: the test bed with constants to start from.
        runs: with measured step times or memory.
        table: name of the runs' source, for the description.
        held_out: other runs of the same test bed: the confidence bands of the calibrated cluster are those of
            its errors on them, or of the cross-validation where there are none.
        folds: parts of the cross-validation, at most the number of runs.
        layer_factors: also learn what layers took that several runs share, beside the constants.

    Returns:
        The calibrated cluster, its ``calibration`` filled, and the errors.

    Raises:
        DescriptionError: there are runs, but fewer than two have a measured time or any measured memory.
    """
    certain = [run for run in runs if not run.doubt]
    fitted = fit_workspace(cluster, certain)
    fitted = replace(fitted, calibration=_memory_calibration(fitted, certain, held_out, table))
    timed = [run for run in certain if run.step_seconds]
    if len(timed) < 2:
        if timed or not any(run.peak_bytes for run in certain):
            raise DescriptionError(
                f"calibration: {len(timed)} runs with a measured time; valid: at least 2, or measured memory"
            )
        return Fit(cluster=fitted, fitted_error=0.0, cross_error=0.0, folds=0)

    def fit_time(start: Cluster, chosen: Sequence[MeasuredRun]) -> Cluster:
        # Constants are fitted without factors, so that these hold what constants cannot.
        constants = fit_constants(replace(start, layer_factors=()), chosen)
        return fit_layer_factors(constants, chosen, _SCALE) if layer_factors else constants

    folds = min(folds, len(timed))
    crossed = np.concatenate(
        [
            _log_errors(
                fit_time(cluster, [run for index, run in enumerate(timed) if index % folds != fold]),
                timed[fold::folds],
            )
            for fold in range(folds)
        ]
    )
    fitted = fit_time(fitted, timed)
    others = [run for run in held_out if run.step_seconds and not run.doubt]
    mean_error, low, high = _band(_log_errors(fitted, others) if others else crossed)
    return Fit(
        cluster=replace(
            fitted,
            calibration=replace(
                fitted.calibration, runs=len(timed), table=table, mean_error=mean_error, low=low, high=high
            ),
        ),
        fitted_error=float(np.abs(np.exp(_log_errors(fitted, timed)) - 1).mean()),
        cross_error=float(np.abs(np.exp(crossed) - 1).mean()),
        folds=folds,
    )


def _band(log_errors: np.ndarray) -> tuple[float, float, float]:
    """(mean absolute relative error, 10th and 90th percentile of measured / predicted)."""
    low, high = np.percentile(np.exp(-log_errors), [10, 90])
    return round(float(np.abs(np.exp(log_errors) - 1).mean()), 4), round(float(low), 4), round(float(high), 4)


def _memory_calibration(
    cluster: Cluster, runs: Sequence[MeasuredRun], held_out: Sequence[MeasuredRun], table: str
) -> Calibration:
    """The cluster's calibration, with the errors of memory on the held-out runs, or on the runs themselves."""
    fitted = [run for run in runs if run.peak_bytes]
    if not fitted:
        return cluster.calibration
    predict = Predictor(lambda _: cluster)
    judged = [run for run in held_out if run.peak_bytes and not run.doubt] or fitted
    logs = [
        np.log(predicted / measured)
        for run in judged
        for (_, measured), (_, predicted) in zip(run.peak_bytes, predict(run)[1], strict=True)
    ]
    mean_error, low, high = _band(np.array(logs))
    return replace(
        cluster.calibration,
        memory_runs=len(fitted),
        memory_table=table,
        memory_mean_error=mean_error,
        memory_low=low,
        memory_high=high,
    )
