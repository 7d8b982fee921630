"""Robust statistics and the latency-bandwidth fit."""

from collections.abc import Sequence

import numpy as np


def undisturbed(samples: Sequence[float]) -> tuple[float, float]:
    """Time without disturbances, which only ever add to it: the lower quartile.

    Args:
        samples: at least one positive number.

    Returns:
        The lower quartile and the relative interquartile range.
    """
    low, high = np.percentile(np.asarray(samples, dtype=float), (25, 75))
    return float(low), float((high - low) / low) if low > 0 else 0.0


def latency_bandwidth(points: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """Fits seconds = latency + bytes * slope, with equal weight on the relative error of every point.

    Args:
        points: (bytes, seconds), seconds > 0.

    Returns:
        Latency in seconds (>= 0), slope in seconds per byte (>= 0), and the root mean square relative error.
    """
    sizes = np.array([size for size, _ in points], dtype=float)
    times = np.array([seconds for _, seconds in points], dtype=float)
    design = np.stack([1 / times, sizes / times], axis=1)
    target = np.ones(len(times))
    if len(points) == 1:
        return float(times[0]), 0.0, 0.0
    latency, slope = np.linalg.lstsq(design, target, rcond=None)[0]
    if slope < 0:
        latency, slope = 1 / np.mean(1 / times), 0.0
    elif latency < 0:
        ratio = sizes / times
        latency, slope = 0.0, float(ratio.sum() / (ratio @ ratio))
    error = design @ np.array([latency, slope]) - target
    return float(latency), float(slope), float(np.sqrt(np.mean(error**2)))
