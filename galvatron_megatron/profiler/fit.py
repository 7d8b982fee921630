"""Robust statistics and the latency-bandwidth fit."""

from collections.abc import Sequence

import numpy as np


def undisturbed(samples: Sequence[float]) -> tuple[float, float]:
    """Time without disturbances, which only ever add to it: the lower quartile, one of the samples.

    Args:
        samples: at least one positive number. Of up to four the smallest is the lower quartile.

    Returns:
        The lower quartile and the relative interquartile range.
    """
    values = np.asarray(samples, dtype=float)
    low, high = np.percentile(values, 25, method="lower"), np.percentile(values, 75)
    return float(low), float((high - low) / low) if low > 0 else 0.0


def uncertainty(spread: float, count: int) -> float:
    """Relative standard error of ``describe.typical.typical``, as for a normal distribution.

    The interquartile range is then 1.35 standard deviations, and the mean of the middle half varies 1.09 times
    as much as the mean of all (a test draws samples and compares).

    Args:
        spread: the relative interquartile range.
        count: of samples.
    """
    return 1.09 * spread / 1.35 / count**0.5


def latency_bandwidth(points: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """Fits seconds = latency + bytes * slope.

    The slope is that between the two largest messages, where bandwidth alone decides (on the way there, buffers
    let messages pass faster than the link can carry on). The latency then has the least relative error over
    all points.

    Args:
        points: (bytes, seconds) by rising size, seconds > 0.

    Returns:
        Latency in seconds (>= 0), slope in seconds per byte (>= 0), and the root mean square relative error.
    """
    sizes = np.array([size for size, _ in points], dtype=float)
    times = np.array([seconds for _, seconds in points], dtype=float)
    slope = 0.0
    if len(points) > 1:
        slope = float((times[-1] - times[-2]) / (sizes[-1] - sizes[-2]))
        if slope <= 0:
            # The smaller of the two was disturbed, for a larger message cannot be faster.
            slope = max(0.0, float((times[-1] - times[0]) / (sizes[-1] - sizes[0])))
    weights = 1 / times
    latency = max(0.0, float((weights * (1 - slope * sizes * weights)).sum() / (weights**2).sum()))
    error = (latency + slope * sizes) * weights - 1
    return latency, slope, float(np.sqrt(np.mean(error**2)))
