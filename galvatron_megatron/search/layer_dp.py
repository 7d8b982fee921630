"""The fastest strategies for the layers of one pipeline rank under a memory budget: exact label setting.

A label is (seconds, sync, bytes, largest transient) of a path through the first layers, with the layout it
ends in.
Labels that another one of the same layout equals or beats in everything are dropped; so are labels whose
Lagrangian bound (``chain``) says that they cannot be completed within the time allowed. The time allowed starts
just above the lower bound of the whole rank and widens until a path is found, so that as a rule only a
handful of labels per layer exist. Bytes are never rounded and the work does not depend on their number.
"""

import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np

from galvatron_megatron.search.chain import BOUNDARY, BYTES_ROW, SYNC_ROW, Chain
from galvatron_megatron.search.dual import DualRow, best_dual
from galvatron_megatron.search.host_room import HostRoom, can_fit, host_rooms

_FIRST_WINDOW = 0.0006
_WIDENING = 2.0
_SLACK = 1e-12
_FEW = 16
_BLOCK = 256


class LateError(Exception):
    """There is no more time to solve a problem."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Assignment:
    """Strategies of the layers of one rank."""

    seconds: float
    """Without the constant part (embedding, head, sends)."""
    sync: float
    bytes: float
    """State and live activations."""
    transient: float
    choices: tuple[int, ...]
    """Index of the strategy of every layer element, boundaries left out."""
    host: float = 0.0
    """Bytes in host memory, where these are limited."""


class StageSearch:
    """Finds the fastest path through one sequence; among equally fast ones the one with least sync.

    Attributes:
        dual: rows of the best multipliers, once the bound was asked for.
    """

    def __init__(
        self,
        chain: Chain,
        sequence: tuple[int, ...],
        position: int,
        budget: float,
        *,
        constant_transient: float = 0.0,
        sync_limit: float = np.inf,
        host_limit: float = np.inf,
    ) -> None:
        """Sets the limits.

        Args:
            chain: prices and bounds.
            sequence: elements and boundaries of the rank.
            position: class of the pipeline position, an index into ``chain.live``.
            budget: bytes for state, live activations and the largest transient.
            constant_transient: transient bytes of embedding or head, which the largest is at least.
            sync_limit: seconds of synchronisation that the layers may take.
            host_limit: bytes that the layers may keep in host memory.
        """
        self.chain = chain
        self.sequence = sequence
        self.position = position
        self.budget = budget
        self.transient = constant_transient
        self.sync_limit = sync_limit
        self.host_limit = host_limit
        self.limits_sync = bool(np.isfinite(sync_limit))
        self.limits_host = bool(np.isfinite(host_limit))
        self.dual: list[DualRow] = []
        self.rooms: list[HostRoom] = []
        self._lower = -np.inf

    def lower_bound(self, time_limit: float = np.inf) -> float:
        """Bound of the time of the fastest path, by the best multipliers; infinite where nothing fits.

        Args:
            time_limit: a bound above this many seconds need not be sharper.
        """
        chain = self.chain
        whole = chain.tail(self.sequence)[:, self.position, chain.base]
        floor = max(chain.least_transient, self.transient)
        if whole[BYTES_ROW] + floor > self.budget or whole[SYNC_ROW] > self.sync_limit * (1 + _SLACK):
            self._lower = np.inf
            return np.inf
        if self.limits_host:
            spare = self.budget - floor
            self.rooms = host_rooms(chain, self.sequence, self.position, spare, self.host_limit)
            if any(room.lacking > 0 for room in self.rooms):
                self._lower = np.inf
                return np.inf
        self.dual, ascended = best_dual(
            chain,
            self.sequence,
            self.position,
            self.budget - floor,
            self.sync_limit,
            time_limit,
            host_limit=self.host_limit,
        )
        self._lower = max(self._lower, ascended)
        return self._lower

    def fastest(self, time_limit: float = np.inf, deadline: float = np.inf) -> Assignment | None:
        """Finds the fastest path, None where every one takes more than ``time_limit`` seconds.

        Raises:
            LateError: ``time.perf_counter`` passed ``deadline`` before it was found.
        """
        lower = self._lower if self.dual else self.lower_bound(time_limit)
        if lower > time_limit:
            return None
        window = max(lower, 0.0) * _FIRST_WINDOW + 1e-12
        while True:
            allowed = min(time_limit, lower + window)
            found = self.run(allowed, deadline)
            if found is not None or allowed >= time_limit:
                return found
            window *= _WIDENING
            if window > 64 * (abs(lower) + 1e-9):
                return self.run(time_limit, deadline)

    def run(self, allowed: float, deadline: float = np.inf) -> Assignment | None:
        """Label setting with a given time allowed.

        Raises:
            LateError: it is past the deadline.
        """
        chain = self.chain
        rows = 5 if self.limits_host else 4
        labels = np.array([[0.0], [0.0], [0.0], [self.transient], [0.0]])[:rows]
        layouts = np.array([chain.base], dtype=np.intp)
        history: list[tuple[np.ndarray, np.ndarray] | None] = []
        limit = allowed + _SLACK * abs(allowed) if np.isfinite(allowed) else np.inf
        for index, element in enumerate(self.sequence):
            if time.perf_counter() > deadline:
                raise LateError
            if element == BOUNDARY:
                labels = labels.copy()
                labels[0] += chain.reshard[layouts, chain.base]
                layouts = np.full(labels.shape[1], chain.base, dtype=np.intp)
                kept = _undominated(labels, layouts, self.limits_sync, chain.detour)
                labels, layouts = labels[:, kept], layouts[kept]
                history.append((kept, np.full(len(kept), -1)))
                continue
            options = chain.elements[element]
            count, width = labels.shape[1], len(options.strategies)
            new = np.empty((rows, count, width))
            new[0] = labels[0][:, None] + chain.reshard[layouts][:, options.layouts] + options.seconds
            new[1] = labels[1][:, None] + options.sync
            new[2] = labels[2][:, None] + chain.bytes_of(element)[self.position]
            np.maximum(labels[3][:, None], options.transient, out=new[3])
            if self.limits_host:
                new[4] = labels[4][:, None] + options.host
            rest = chain.tail(self.sequence[index + 1 :])[:, self.position, :][:, options.layouts]  # [R, S]
            keep = self._can_finish(new, rest, limit, index, options.layouts)
            flat = np.flatnonzero(keep)
            if not len(flat):
                return None
            labels = new.reshape(rows, -1)[:, flat]
            parents, choices = np.divmod(flat, width)
            layouts = options.layouts[choices]
            kept = _undominated(labels, layouts, self.limits_sync, chain.detour)
            labels, layouts = labels[:, kept], layouts[kept]
            history.append((parents[kept], choices[kept]))
        seconds = labels[0] + chain.reshard[layouts, chain.base]
        fits = (labels[2] + labels[3] <= self.budget) & (labels[1] <= self.sync_limit) & (seconds <= limit)
        if self.limits_host:
            fits &= labels[4] <= self.host_limit
        ends = np.flatnonzero(fits)
        if not len(ends):
            return None
        end = int(ends[np.lexsort((labels[2][ends], labels[1][ends], seconds[ends]))[0]])
        return self._trace(end, float(seconds[end]), labels[:, end], history)

    def _can_finish(
        self, new: np.ndarray, rest: np.ndarray, limit: float, index: int, layouts: np.ndarray
    ) -> np.ndarray:
        spare = self.budget - new[2] - np.maximum(new[3], self.chain.least_transient)
        keep = spare >= rest[BYTES_ROW]
        if self.limits_sync:
            keep &= new[1] + rest[SYNC_ROW] <= self.sync_limit * (1 + _SLACK)
        if self.limits_host:
            keep &= new[4] <= self.host_limit
            for room in self.rooms:
                keep &= can_fit(room, index, spare, self.host_limit - new[4])
        if not np.isfinite(limit):
            return keep
        for row in self.dual:
            beta, kappa, tail = row.beta, row.kappa, row.tails[index + 1][layouts]
            bound = new[0] + tail * (1 - _SLACK)
            if beta:
                bound -= beta * spare + _SLACK * np.abs(beta * spare)
            if kappa:
                bound -= kappa * (self.sync_limit - new[1])
            if row.mu:
                bound -= row.mu * (self.host_limit - new[4]) * (1 + _SLACK)
            keep &= bound <= limit
        return keep

    def _trace(self, end: int, seconds: float, label: np.ndarray, history: list) -> Assignment:
        choices = []
        for parents, chosen in reversed(history):
            if chosen[end] >= 0:
                choices.append(int(chosen[end]))
            end = int(parents[end])
        return Assignment(
            seconds=seconds,
            sync=float(label[1]),
            bytes=float(label[2]),
            transient=float(label[3]),
            choices=tuple(reversed(choices)),
            host=float(label[4]) if self.limits_host else self._kept_on_host(choices),
        )

    def _kept_on_host(self, choices: list[int]) -> float:
        """Bytes in host memory of a path, given from its end."""
        elements = [element for element in self.sequence if element != BOUNDARY]
        return float(
            sum(
                self.chain.elements[element].host[choice]
                for element, choice in zip(reversed(elements), choices, strict=True)
            )
        )


def _undominated(labels: np.ndarray, layouts: np.ndarray, with_sync: bool, detour: np.ndarray) -> np.ndarray:
    """Indices of labels [4 or 5, n] that no other equals or beats, wherever both go from their layouts.

    Where sync is not limited it only breaks ties between labels of one layout that are equal in everything
    else.

    Args:
        labels: seconds, sync, bytes and largest transient of every label, and bytes in host memory where these
            are limited.
        layouts: layout of every label.
        with_sync: sync is limited.
        detour: [K, K] most seconds that a label in the first layout must be ahead of one in the second to
            stay so.
    """
    order = np.lexsort((*labels[4:], labels[1], labels[3], labels[2], labels[0], layouts))
    if len(order) == 1:
        return order
    bounds = np.flatnonzero(np.diff(layouts[order])) + 1
    kept = []
    for group in np.split(order, bounds):
        kept.append(group if len(group) == 1 else group[_front(labels[:, group], with_sync)])
    is_plain = len(labels) == 4 and not with_sync and labels[3].min() == labels[3].max()
    if len(kept) > 1 and is_plain and len(order) > _FEW:
        kept = _across(labels, layouts, kept, detour)
    return np.concatenate(kept)


def _across(
    labels: np.ndarray, layouts: np.ndarray, groups: list[np.ndarray], detour: np.ndarray
) -> list[np.ndarray]:
    """Drops labels that one of another layout beats strictly even after the worst detour.

    Args:
        labels: as in ``_undominated``; of one transient, so that seconds and bytes decide.
        layouts: layout of every label.
        groups: indices of the undominated labels of every layout, the fastest first.
        detour: as in ``_undominated``.
    """
    for index, group in enumerate(groups):
        seconds, bytes_ = labels[0, group], labels[2, group]
        beaten = np.zeros(len(group), dtype=bool)
        for other in groups:
            if other is group or not len(other):
                continue
            ahead = labels[0, other] + detour[layouts[other[0]], layouts[group[0]]]
            if ahead[0] >= seconds[-1]:
                continue
            # Within a layout the faster label has more bytes: the last one fast enough has the least.
            count = np.searchsorted(ahead, seconds, side="left")
            least = np.concatenate([[np.inf], labels[2, other]])
            beaten |= least[count] <= bytes_
        if beaten.any() and not beaten.all():
            groups[index] = group[~beaten]
        elif beaten.all():
            groups[index] = group[:0]
    return [group for group in groups if len(group)]


def _front(labels: np.ndarray, with_sync: bool) -> np.ndarray:
    """Mask of undominated labels [4 or 5, n] already sorted by seconds, then bytes, transient and sync."""
    if len(labels) > 4 and not with_sync:
        return _front(labels[[0, 4, 2, 3]], with_sync=True)  # in the place of sync, which only breaks ties
    if len(labels) > 4:
        return _front_of_many(labels)
    bytes_, transient, sync = labels[2], labels[3], labels[1]
    if not with_sync and transient.min() == transient.max():
        keep = np.ones(len(bytes_), dtype=bool)
        keep[1:] = bytes_[1:] < np.minimum.accumulate(bytes_)[:-1]
        return keep
    keep = np.zeros(labels.shape[1], dtype=bool)
    for level in np.unique(transient):
        inside = np.flatnonzero(transient <= level)
        at_level = transient[inside] == level
        if with_sync:
            alive = _staircase(bytes_[inside], sync[inside])
        else:
            values = bytes_[inside]
            alive = np.ones(len(values), dtype=bool)
            alive[1:] = values[1:] < np.minimum.accumulate(values)[:-1]
        keep[inside[alive & at_level]] = True
    return keep


def _front_of_many(labels: np.ndarray) -> np.ndarray:
    """Mask of undominated labels [k, n], block by block; what beats a label comes before it."""
    keep = np.zeros(labels.shape[1], dtype=bool)
    front = labels[:, :0]
    for start in range(0, labels.shape[1], _BLOCK):
        block = labels[:, start : start + _BLOCK]
        beaten = _beats(front, block).any(0) | np.triu(_beats(block, block), 1).any(0)
        keep[start : start + _BLOCK] = ~beaten
        front = np.concatenate([front, block[:, ~beaten]], axis=1)
    return keep


def _beats(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """[n, m] which of n labels [k, n] equal or beat which of m others in everything."""
    found = np.ones((these.shape[1], those.shape[1]), dtype=bool)
    for mine, theirs in zip(these, those, strict=True):
        found &= mine[:, None] <= theirs[None, :]
    return found


def _staircase(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Marks entries for which no earlier entry is <= in both arrays."""
    steps_first: list[float] = []
    steps_second: list[float] = []
    alive = np.zeros(len(first), dtype=bool)
    for index, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        at = bisect_right(steps_first, a)
        if at and steps_second[at - 1] <= b:
            continue
        alive[index] = True
        begin = bisect_left(steps_first, a)
        end = begin
        while end < len(steps_first) and steps_second[end] >= b:
            end += 1
        steps_first[begin:end] = [a]
        steps_second[begin:end] = [b]
    return alive
