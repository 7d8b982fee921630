"""Whether layers fit in device and host memory together: bounds that need no time.

What a layer gives up in one memory it needs in the other. For every rho >= 0, layers that keep within B bytes
of the device's memory and H of the host's have

    sum of min over strategies of (bytes + rho * host)  <=  B + rho * H

The left side is concave and piecewise linear in rho, with its corners at the slopes of the layers' trade-offs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from galvatron_megatron.search.chain import BOUNDARY, Chain
from galvatron_megatron.search.multipliers import lower_hull

_KEPT = 3
_TOLERANCE = 1e-9


@dataclass(kw_only=True, frozen=True, slots=True)
class HostRoom:
    """The bound for one rho."""

    rho: float
    """Bytes on the device per byte in host memory."""
    rests: np.ndarray
    """[n + 1] what the elements from i on need at least, host memory counted rho-fold."""
    lacking: float
    """Bytes that the whole sequence lacks at least; negative where it may fit."""


def host_rooms(
    chain: Chain, sequence: tuple[int, ...], position: int, spare: float, host_limit: float
) -> list[HostRoom]:
    """The sharpest bounds for a sequence, the sharpest first.

    Args:
        chain: prices.
        sequence: elements and boundaries.
        position: class of the pipeline position.
        spare: bytes for state and live activations.
        host_limit: bytes in host memory.
    """
    used = {e: (chain.bytes_of(e)[position], chain.elements[e].host) for e in set(sequence) if e != BOUNDARY}
    found = []
    for rho in _slopes(used.values()):
        least = {element: float((bytes_ + rho * host).min()) for element, (bytes_, host) in used.items()}
        each = [least.get(element, 0.0) for element in sequence]
        rests = np.concatenate([np.cumsum(each[::-1])[::-1], [0.0]])
        slack = _TOLERANCE * (abs(spare) + rho * host_limit)
        found.append(HostRoom(rho=rho, rests=rests, lacking=rests[0] - spare - rho * host_limit - slack))
    return sorted(found, key=lambda room: -room.lacking)[:_KEPT]


def least_host(
    chain: Chain, sequences: Sequence[tuple[int, ...]], classes: np.ndarray, spare: np.ndarray
) -> np.ndarray:
    """Bytes in host memory [P, C] that stages keep there at least.

    Args:
        chain: prices.
        sequences: C of them.
        classes: [P] class of every position.
        spare: [P] bytes for state and live activations.
    """
    count = len(chain.elements)
    counts = np.zeros((len(sequences), count))
    for row, sequence in zip(counts, sequences, strict=True):
        elements, times = np.unique([e for e in sequence if e != BOUNDARY], return_counts=True)
        row[elements] = times
    hosts = [options.host for options in chain.elements]
    # However much the devices have room for.
    found = np.tile(counts @ [float(host.min()) for host in hosts], (len(classes), 1))
    for group in np.unique(classes):
        used = [(chain.bytes_of(element)[group], hosts[element]) for element in range(count)]
        at = np.flatnonzero(classes == group)
        for rho in _slopes(used):
            needed = counts @ [float((bytes_ + rho * host).min()) for bytes_, host in used]
            lacking = needed - spare[at, None] - _TOLERANCE * np.abs(needed)
            found[at] = np.maximum(found[at], lacking / rho)
    return found


def _slopes(used: Iterable[tuple[np.ndarray, np.ndarray]]) -> set[float]:
    """The values of rho at which some layer's cheapest strategy changes, from bytes on device and host."""
    hulls = [lower_hull(host, bytes_) for bytes_, host in used]
    return {(b0 - b1) / (h1 - h0) for hull in hulls for (h0, b0), (h1, b1) in pairwise(hull)}


def can_fit(room: HostRoom, index: int, spare: np.ndarray, host_left: np.ndarray) -> np.ndarray:
    """Marks labels behind element ``index`` whose rest may fit.

    Args:
        room: a bound.
        index: of the last element that the labels hold.
        spare: bytes that they leave on the device.
        host_left: bytes that they leave in host memory.
    """
    left = spare + room.rho * host_left
    return room.rests[index + 1] <= left + _TOLERANCE * np.abs(left)
