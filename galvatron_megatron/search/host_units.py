"""In what units the search counts host memory."""

import numpy as np

UNITS = 1024
"""The unit is about this part of what a layer keeps at most. Amounts that differ by less, as they do by the
norms that a rank has whole, count as equal; they are rounded up, so that no plan is taken that does not fit."""


def counted_in_units(host_bytes: np.ndarray) -> np.ndarray:
    """Host bytes of a layer's strategies [S], rounded up to whole units."""
    most = float(host_bytes.max(initial=0.0))
    unit = 2.0 ** max(0.0, np.floor(np.log2(most / UNITS))) if most else 1.0
    return np.ceil(host_bytes / unit) * unit
