"""Figures that say how good predictions are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

GOOD_CORRELATION = 0.9
"""Rank correlation from which predictions put plans in a good order."""
_DRAWS = 2000


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


def spread_within(groups: Iterable[Sequence[float]]) -> float:
    """Standard deviation about the mean of each group, pooled over groups; 0 where none has two values."""
    squares, free = 0.0, 0
    for group in groups:
        values = np.asarray(group, float)
        squares += float(((values - values.mean()) ** 2).sum())
        free += len(values) - 1
    return (squares / free) ** 0.5 if free else 0.0


def expected_correlation(measured: Sequence[float], spread: float) -> tuple[float, float]:
    """Spearman's rank correlation that predictions reach whose only error is random.

    Args:
        measured: the times.
        spread: standard deviation of the logarithm of predicted / measured.

    Returns:
        (mean correlation, fraction of draws of at least ``GOOD_CORRELATION``), over draws from a fixed seed.
    """
    logs = np.log(np.asarray(measured, float))
    noise = np.random.default_rng(0).normal(0.0, spread, (_DRAWS, len(logs)))
    drawn = (logs + noise).argsort(axis=1).argsort(axis=1)
    right = _ranks(logs)
    left, right = drawn - drawn.mean(axis=1, keepdims=True), right - right.mean()
    found = (left @ right) / np.sqrt((left**2).sum(axis=1) * (right**2).sum())
    return float(found.mean()), float((found >= GOOD_CORRELATION).mean())


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Measured time of what the predictions would choose over the best measured time; at least 1."""
    chosen = int(np.asarray(predicted, float).argmin())
    return float(measured[chosen]) / float(min(measured))
