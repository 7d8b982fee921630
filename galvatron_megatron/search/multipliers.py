"""Memory multipliers near the dual optimum, for the bounds of ``chain``."""

import itertools
from collections.abc import Sequence

import numpy as np

_STEEPEST = 4.0


def lower_hull(bytes_: np.ndarray, seconds: np.ndarray) -> list[tuple[float, float]]:
    """Vertices of the lower convex hull of (bytes, seconds), from the smallest bytes to the smallest
    seconds."""
    order = np.lexsort((seconds, bytes_))
    hull: list[tuple[float, float]] = []
    for x, y in zip(bytes_[order].tolist(), seconds[order].tolist(), strict=True):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2], hull[-1]
            if (y1 - y0) * (x - x0) >= (y - y0) * (x1 - x0):
                hull.pop()
            else:
                break
        if hull and hull[-1][0] == x:
            hull.pop()
        hull.append((x, y))
    return hull


def memory_multipliers(
    bytes_: Sequence[np.ndarray],
    seconds: Sequence[np.ndarray],
    shares: Sequence[float],
    targets: Sequence[float],
) -> list[float]:
    """Slopes of the best mix of strategies at given average bytes of a layer.

    The best fractional mix of strategies for layers of several kinds takes the segments of the kinds'
    hulls in the
    order of their slopes; the multiplier at a target is the slope of the segment in which it falls.

    Args:
        bytes_: per kind, bytes of every strategy.
        seconds: per kind, seconds of every strategy.
        shares: per kind, its share of the layers.
        targets: average bytes that a layer may take.

    Returns:
        One multiplier (seconds per byte, >= 0) per target.
    """
    segments = []
    start = 0.0
    for x, y, share in zip(bytes_, seconds, shares, strict=True):
        hull = lower_hull(x, y)
        start += hull[0][0] * share
        for (x0, y0), (x1, y1) in itertools.pairwise(hull):
            segments.append(((y0 - y1) / (x1 - x0), (x1 - x0) * share))
    segments.sort(reverse=True)
    found = []
    for target in targets:
        at = start
        slope = segments[0][0] * _STEEPEST if segments and target < start else 0.0
        if target >= start:
            for steepness, width in segments:
                at += width
                if at > target:
                    slope = steepness
                    break
        found.append(slope)
    return found
