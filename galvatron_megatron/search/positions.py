"""What differs between the ranks of a pipeline, and the stages that a search finds for them."""

from dataclasses import dataclass

import numpy as np

from galvatron_megatron.search.layer_dp import Assignment


@dataclass(kw_only=True, frozen=True, slots=True)
class Positions:
    """What differs between the ranks of a pipeline; arrays of length P."""

    classes: np.ndarray
    """Class of live micro-batches, an index into ``Chain.live``."""
    budget: np.ndarray
    """Bytes for state, live activations and the largest transient of the layers."""
    seconds: np.ndarray
    """Constant part of the stage time: embedding, head, sends."""
    sync: np.ndarray
    """Constant part of the synchronisation."""
    transient: np.ndarray
    """Transient bytes of embedding or head."""
    host: np.ndarray
    """Bytes that the layers may keep in host memory, infinite where these are not limited."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Partition:
    """Stages of one pipeline and the strategies in them."""

    step_seconds: float
    cuts: tuple[int, ...]
    """P + 1 places on the width of the spans, from 0."""
    assignments: tuple[Assignment, ...]
