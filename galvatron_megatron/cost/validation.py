"""Holds the cost model against measured runs: errors, rank correlation, regret."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from math import log
from pathlib import Path

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.estimate import estimate_plan
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.cost.records.mist import OperatorPlan, operator_plan_prediction
from galvatron_megatron.cost.records.tables import Table, Unread, fitting_rows
from galvatron_megatron.cost.records.values import MeasuredRun
from galvatron_megatron.cost.statistics import (
    ErrorFigures,
    error_figures,
    expected_correlation,
    rank_correlation,
    regret,
    spread_within,
)
from galvatron_megatron.describe.cluster import Cluster, read_cluster
from galvatron_megatron.errors import GalvatronError

_LEAST_GROUP = 4
"""Rows that a rank correlation needs."""


@dataclass(kw_only=True, frozen=True, slots=True)
class RunPrediction:
    """A run and what the model says of it."""

    run: MeasuredRun
    step_seconds: float
    allocated_bytes: tuple[tuple[int, int], ...]
    """(pipeline rank, bytes), for the ranks that were measured."""
    fitted: bool
    """The constants were fitted on this row, so it proves nothing."""


@dataclass(kw_only=True, frozen=True, slots=True)
class TableReport:
    """What a table says about the model; figures over held-out rows."""

    table: Table
    predictions: tuple[RunPrediction, ...]
    """Of every run without doubt."""
    time: ErrorFigures | None
    worst_time: str
    """Label of the row with the worst time."""
    memory: ErrorFigures | None
    worst_memory: str
    rank_correlations: tuple[tuple[str, float, int], ...]
    """(model and devices, Spearman of time per sample, rows)."""
    layer_spread: float
    """How far measured / predicted of runs of one model with equal layers (same kernels on same shapes) lies
    apart, as a standard deviation: what no model of the layers can follow. 0 where no layers are repeated."""
    reachable: tuple[tuple[str, float, float], ...]
    """(model and devices, Spearman expected of a model whose only error is ``layer_spread``, at random; how
    often it would be ``GOOD_CORRELATION``)."""
    regrets: tuple[tuple[str, float, int], ...]
    """(model, devices and batch, regret, rows)."""
    unexplained: tuple[Unread, ...]
    """Rows apart, with their reasons."""

    @property
    def mean_regret(self) -> float | None:
        """Mean over the groups."""
        return sum(value for _, value, _ in self.regrets) / len(self.regrets) if self.regrets else None


def shipped_test_bed(name: str) -> Cluster:
    """The shipped description of the cluster that a table's runs were made on."""
    return read_cluster(
        Path(str(files("galvatron_megatron.data") / "validation" / "test_beds" / f"{name}.yaml"))
    )


class Predictor:
    """Predicts measured runs; models of equal kind share their prices."""

    def __init__(self, cluster_of: Callable[[str], Cluster] = shipped_test_bed) -> None:
        self._cluster_of = cluster_of
        self._clusters: dict[tuple[str, int], Cluster] = {}
        self._models: dict[tuple, AnalyticCostModel] = {}

    def __call__(self, run: MeasuredRun) -> tuple[float, tuple[tuple[int, int], ...]]:
        """Step time in seconds and allocated bytes of the pipeline ranks that were measured.

        Raises:
            GalvatronError: the run cannot be priced.
        """
        model = self.cost_model(run)
        if isinstance(run.plan, OperatorPlan):
            return operator_plan_prediction(run.plan, model)
        estimate = estimate_plan(run.plan, model)
        memory = tuple((stage, estimate.stages[stage].allocated_bytes) for stage, _ in run.peak_bytes)
        return estimate.step_seconds, memory

    def cost_model(self, run: MeasuredRun) -> AnalyticCostModel:
        """The cost model that prices a run; runs of one model on one cluster share it."""
        place = (run.cluster, run.nodes)
        if place not in self._clusters:
            self._clusters[place] = self._cluster_of(run.cluster).with_nodes(run.nodes)
        key = (run.model, run.cluster, run.nodes, run.options)
        if key not in self._models:
            self._models[key] = AnalyticCostModel(run.model, self._clusters[place], run.options)
        return self._models[key]


def validate_table(table: Table, predict: Predictor | None = None) -> TableReport:
    """Predicts every run of a table and summarises the held-out ones.

    Args:
        table: what was measured.
        predict: made from the shipped test beds by default.
    """
    predict = predict or Predictor()
    fitted = fitting_rows(table.runs)
    predictions: list[RunPrediction] = []
    apart = list(table.unread)
    for run in table.runs:
        if run.doubt:
            apart.append(Unread(row=run.row, reason=run.doubt))
            continue
        try:
            seconds, memory = predict(run)
        except GalvatronError as error:
            apart.append(Unread(row=run.row, reason=str(error)))
            continue
        predictions.append(
            RunPrediction(run=run, step_seconds=seconds, allocated_bytes=memory, fitted=run.row in fitted)
        )
    held_out = [prediction for prediction in predictions if not prediction.fitted] or predictions
    time, worst_time = _time_figures(held_out)
    memory, worst_memory = _memory_figures(held_out)
    timed = [prediction for prediction in held_out if prediction.run.step_seconds]
    spread = spread_within(_equal_layers(predictions, predict))
    return TableReport(
        table=table,
        predictions=tuple(predictions),
        time=time,
        worst_time=worst_time,
        memory=memory,
        worst_memory=worst_memory,
        rank_correlations=_by_group(timed, _model_and_devices, _LEAST_GROUP, _correlation),
        layer_spread=spread,
        reachable=tuple(
            (name, *reached)
            for name, reached, _ in _by_group(
                timed, _model_and_devices, _LEAST_GROUP, lambda members: _reachable(members, spread)
            )
        ),
        regrets=_by_group(timed, lambda run: run.group, 2, _regret),
        unexplained=tuple(sorted(apart, key=lambda row: row.row)),
    )


def _time_figures(predictions: Iterable[RunPrediction]) -> tuple[ErrorFigures | None, str]:
    timed = [prediction for prediction in predictions if prediction.run.step_seconds]
    if not timed:
        return None, ""
    figures = error_figures([p.step_seconds for p in timed], [p.run.step_seconds for p in timed])
    return figures, timed[figures.worst_index].run.label


def _memory_figures(predictions: Iterable[RunPrediction]) -> tuple[ErrorFigures | None, str]:
    pairs = [
        (predicted, measured, prediction.run.label)
        for prediction in predictions
        for (_, predicted), (_, measured) in zip(
            prediction.allocated_bytes, prediction.run.peak_bytes, strict=True
        )
    ]
    if not pairs:
        return None, ""
    figures = error_figures([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return figures, pairs[figures.worst_index][2]


def _model_and_devices(run: MeasuredRun) -> str:
    return f"{run.model.name} on {run.plan.world_size} devices"


def _equal_layers(predictions: Iterable[RunPrediction], predict: Predictor) -> list[list[float]]:
    """Logarithms of measured / predicted time, one list for every layer that runs of one model share."""
    groups: dict[tuple, list[float]] = defaultdict(list)
    for prediction in predictions:
        run = prediction.run
        if run.step_seconds and not isinstance(run.plan, OperatorPlan):
            work = predict.cost_model(run).layer_work(0, run.plan.layers[0].strategy, Setting.of(run.plan))
            groups[run.model.layers[0], work].append(log(run.step_seconds / prediction.step_seconds))
    return list(groups.values())


def _by_group[Figure](
    predictions: Iterable[RunPrediction],
    group_of: Callable[[MeasuredRun], str],
    least: int,
    figure: Callable[[list[RunPrediction]], Figure],
) -> tuple[tuple[str, Figure, int], ...]:
    groups: dict[str, list[RunPrediction]] = defaultdict(list)
    for prediction in predictions:
        groups[group_of(prediction.run)].append(prediction)
    return tuple(
        (name, figure(members), len(members))
        for name, members in sorted(groups.items())
        if len(members) >= least
    )


def _correlation(members: list[RunPrediction]) -> float:
    samples = [member.run.plan.global_batch_size for member in members]
    return rank_correlation(
        [member.step_seconds / count for member, count in zip(members, samples, strict=True)],
        [member.run.step_seconds / count for member, count in zip(members, samples, strict=True)],
    )


def _reachable(members: list[RunPrediction], spread: float) -> tuple[float, float]:
    return expected_correlation(
        [member.run.step_seconds / member.run.plan.global_batch_size for member in members], spread
    )


def _regret(members: list[RunPrediction]) -> float:
    return regret([member.step_seconds for member in members], [member.run.step_seconds for member in members])
