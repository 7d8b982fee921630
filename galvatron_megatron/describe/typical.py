"""What a call takes on average, from samples of which some were disturbed."""

from collections.abc import Sequence

import numpy as np


def typical(samples: Sequence[float]) -> tuple[float, float]:
    """What one of many calls takes on average, whose sum a step is: the mean of the middle half.

    Over a link one call may take twice another's time with nothing wrong. The least of them is then no
    prediction of their sum; the outer quarters are left out for what disturbances do to a mean.

    Args:
        samples: at least one positive number. Of two it is their mean.

    Returns:
        The interquartile mean and the interquartile range relative to it.
    """
    values = np.sort(np.asarray(samples, dtype=float))
    # Samples on the border of the middle half count with the part of them that lies inside.
    edges = np.arange(len(values) + 1) / len(values)
    inside = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    middle = float(values @ inside / inside.sum())
    low, high = np.percentile(values, [25, 75])
    return middle, float((high - low) / middle) if middle > 0 else 0.0
