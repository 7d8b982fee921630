"""Figures that say how good predictions are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(kw_only=True, frozen=True, slots=True)
class ErrorFigures:
    """Relative errors, predicted / measured - 1."""

    rows: int
    mean: float
    """Mean absolute error: MAPE."""
    median: float
    percentile_90: float
    worst: float
    worst_index: int
    """Which of the given pairs is the worst."""
    bias: float
    """Mean signed error."""


def error_figures(predicted: Sequence[float], measured: Sequence[float]) -> ErrorFigures:
    """Summarises predictions.

    Args:
        predicted: one or more values.
        measured: as many, above zero.
    """
    errors = np.asarray(predicted, float) / np.asarray(measured, float) - 1
    absolute = np.abs(errors)
    worst = int(absolute.argmax())
    return ErrorFigures(
        rows=len(errors),
        mean=float(absolute.mean()),
        median=float(np.median(absolute)),
        percentile_90=float(np.percentile(absolute, 90)),
        worst=float(absolute[worst]),
        worst_index=worst,
        bias=float(errors.mean()),
    )


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's rank correlation with average ranks for ties; 1 where either side has one value only."""
    left, right = _ranks(predicted), _ranks(measured)
    left, right = left - left.mean(), right - right.mean()
    scale = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / scale if scale else 1.0


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Measured time of what the predictions would choose over the best measured time; at least 1."""
    chosen = int(np.asarray(predicted, float).argmin())
    return float(measured[chosen]) / float(min(measured))
