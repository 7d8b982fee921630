"""Learns from measured runs how much longer the work of a layer takes than the constants say.

Runs that differ in depth, pipeline and data parallelism share layers: the same kernels on the same shapes.
Where several runs tell the same of such a layer, that is a measurement of it, and it is kept beside the
constants as the efficiencies of measured GEMM shapes are (``Cluster.layer_factors``).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.cost.records.mist import OperatorPlan
from galvatron_megatron.cost.records.values import MeasuredRun
from galvatron_megatron.cost.validation import Predictor
from galvatron_megatron.describe.cluster import Cluster

LEAST_RUNS = 3
"""Runs that must share a layer before it is corrected, so that no factor exists for the sake of single rows."""
_RUN_NOISE = 0.05
"""Relative error of one run that a factor must not follow."""
_SPREAD = 0.15
"""Relative distance of a layer from the constants that is as likely as not; pulls factors towards 1."""
_ROUNDS = 4
_STEP = 0.05
_DIGITS = 4

Work = tuple[int, int, int]


def fit_layer_factors(cluster: Cluster, runs: Sequence[MeasuredRun], scale: float) -> Cluster:
    """Fits a factor for every layer and head that at least ``LEAST_RUNS`` runs share; deterministic.

    Minimises the robust squares of log(measured / predicted) with a Gaussian prior of factor 1 (ridge
    regression), by Gauss-Newton steps over the logarithms of the factors.

    Args:
        cluster: with fitted constants; its factors are replaced.
        runs: with measured step times. Plans by operator are passed over.
        scale: relative error beyond which a run counts less.

    Returns:
        The cluster with the factors; without any where no work is shared by enough runs.
    """
    cluster = replace(cluster, layer_factors=())
    runs = [run for run in runs if not isinstance(run.plan, OperatorPlan)]
    shared = _shared_work(cluster, runs)
    if not shared:
        return cluster
    works = sorted(shared)
    logs = np.zeros(len(works))
    prior = (_RUN_NOISE / _SPREAD) ** 2 * np.eye(len(works))
    for _ in range(_ROUNDS):
        errors = _log_errors(_with(cluster, works, logs), runs)
        slopes = np.zeros((len(runs), len(works)))
        for column, work in enumerate(works):
            moved = logs.copy()
            moved[column] += _STEP
            rows = shared[work]
            changed = _log_errors(_with(cluster, works, moved), [runs[row] for row in rows])
            slopes[rows, column] = (changed - errors[rows]) / _STEP
        weights = 1 / (1 + (errors / scale) ** 2)
        normal = slopes.T @ (weights[:, None] * slopes) + prior
        logs -= np.linalg.solve(normal, slopes.T @ (weights * errors) + prior @ logs)
    return _with(cluster, works, logs, digits=_DIGITS)


def _shared_work(cluster: Cluster, runs: Sequence[MeasuredRun]) -> dict[Work, list[int]]:
    """Work of layers and heads -> the runs that have it, where these are enough."""
    predict = Predictor(lambda _: cluster)
    shared: dict[Work, set[int]] = defaultdict(set)
    for number, run in enumerate(runs):
        model, setting = predict.cost_model(run), Setting.of(run.plan)
        shared[model.head_work(setting)].add(number)
        strategies = (layer.strategy for layer in run.plan.layers)
        kinds = {kind: at for at, kind in enumerate(zip(model.model.layers, strategies, strict=True))}
        for (_, strategy), at in kinds.items():
            shared[model.layer_work(at, strategy, setting)].add(number)
    return {work: sorted(numbers) for work, numbers in shared.items() if len(numbers) >= LEAST_RUNS}


def _with(cluster: Cluster, works: Sequence[Work], logs: np.ndarray, digits: int = 12) -> Cluster:
    factors = (float(f"{factor:.{digits}g}") for factor in np.exp(logs))
    return replace(
        cluster, layer_factors=tuple((*work, factor) for work, factor in zip(works, factors, strict=True))
    )


def _log_errors(cluster: Cluster, runs: Sequence[MeasuredRun]) -> np.ndarray:
    predict = Predictor(lambda _: cluster)
    return np.array([np.log(predict(run)[0] / run.step_seconds) for run in runs])
