"""Reads times and bytes off a profile, between its points where it has none."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter, itemgetter
from statistics import fmean

import numpy as np

from galvatron_megatron.describe.profile import CollectiveCurve, PartPoint, Profile, StepPoint
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel

NOT_MEASURED = "not measured"


@dataclass(kw_only=True, frozen=True, slots=True)
class PartCost:
    """A part of the model under one setting, on one rank and for one micro-batch."""

    forward_seconds: float
    backward_seconds: float
    activation_bytes: int
    transient_bytes: int
    parameters: int
    tensors: int
    source: str
    """``measured`` where the micro-batch size lies within the measured ones, else ``modelled``."""


class PartTable:
    """The measured parts of a profile by setting and micro-batch size.

    Args:
        profile: the profile.
    """

    def __init__(self, profile: Profile) -> None:
        self._points: dict[tuple, list[PartPoint]] = defaultdict(list)
        self._failures: dict[tuple, list[PartPoint]] = defaultdict(list)
        for point in profile.parts:
            group = self._failures if point.failure else self._points
            group[point.key[:-1]].append(point)
        for points in (*self._points.values(), *self._failures.values()):
            points.sort(key=lambda point: point.micro_batch_size)

    def lookup(
        self, part: str, tp: int, kind: SequenceParallel, recompute: Recompute, micro_batch_size: int
    ) -> PartCost | str:
        """Finds or interpolates one setting.

        Between two measured micro-batch sizes every number lies on the line through them; above the largest
        it goes on along the last line (through the origin where there is one point only). Recomputation is
        measured at fewer sizes: what it adds to the time without it lies on the line through them. Ulysses is
        measured for what it adds to a layer on one rank, where that was measured; recomputed, it is only known
        where a job was observed.

        Returns:
            The cost, or the reason why there is none: Megatron's refusal, ``out of memory`` (also for all
            larger micro-batches) or ``not measured``.
        """
        if kind is SequenceParallel.ULYSSES and self._on_one_rank(part, recompute):
            own = self._points[part, tp, kind.value, recompute.value]
            if recompute is Recompute.NONE or not own:
                return self._exchanged(part, tp, recompute, micro_batch_size)
        return self._found(part, tp, kind, recompute, micro_batch_size)

    @property
    def has_exchanges(self) -> bool:
        """Whether layers under Ulysses were measured."""
        return any(key[2] == SequenceParallel.ULYSSES.value for key, found in self._points.items() if found)

    def _on_one_rank(self, part: str, recompute: Recompute) -> list[PartPoint]:
        return self._points[part, 1, SequenceParallel.NONE.value, recompute.value]

    def _exchanged(self, part: str, ranks: int, recompute: Recompute, samples: int) -> PartCost | str:
        """A layer under Ulysses: what one rank computes for samples / ranks, and what Ulysses adds to that.

        With b samples on t ranks, every rank has b s / t tokens in front of and behind the attention and, in
        it, h / t heads of b samples over all s tokens: the operations of b / t samples on one rank, T(b / t).
        What is added, A(b), was measured without recomputation as U(b) - T(b / t): four all-to-alls forward and
        four backward (arXiv 2309.14509), whose time is a latency and a part that is proportional to b, copies
        on both sides of them, and the overhead of short tensors. Between the measured sizes A lies on the line
        through them, and goes on along it.

        Attention is recomputed with its exchanges. Where recomputation repeats the part r of one rank's forward
        pass F, it adds r F(b / t) and the forward part of A(b). Full recomputation repeats all of it; else r is
        the average over the sizes at which one rank was measured, since a line through its points, which are
        noisy, says little below them.

        Exchanged tensors are kept in place of the others and are as large, so that the kept bytes are those of
        b / t samples on one rank, where no library holds on to what was sent.
        """
        key = (part, ranks, SequenceParallel.ULYSSES.value, Recompute.NONE.value)
        points = self._points[key]
        for failed in self._failures[key]:
            if not points or (recompute is Recompute.NONE and samples >= failed.micro_batch_size):
                return failed.failure
        alone = self._on_one_rank(part, Recompute.NONE)
        if not points or not alone:
            return NOT_MEASURED
        held = self._found(part, 1, SequenceParallel.NONE, recompute, samples / ranks)
        if isinstance(held, str):
            return held

        def computed(name: str, size: float) -> float:
            return _read(alone, size / ranks, attrgetter(name))

        def added(name: str) -> float:
            more = [(p.micro_batch_size, getattr(p, name) - computed(name, p.micro_batch_size)) for p in points]
            return _line(more, samples)

        forward, backward = (
            max(computed(name, samples) + added(name), 0.0) for name in ("forward_seconds", "backward_seconds")
        )
        if recompute is not Recompute.NONE:
            share = self._recomputed_share(part, recompute)
            backward += max(forward - (1 - share) * computed("forward_seconds", samples), 0.0)
        is_inside = points[0].micro_batch_size <= samples <= points[-1].micro_batch_size
        return PartCost(
            forward_seconds=forward,
            backward_seconds=backward,
            activation_bytes=held.activation_bytes,
            transient_bytes=held.transient_bytes + max(round(added("transient_bytes")), 0),
            parameters=points[-1].parameters,
            tensors=points[-1].tensors,
            source="measured" if is_inside and recompute is Recompute.NONE else "modelled",
        )

    def _recomputed_share(self, part: str, recompute: Recompute) -> float:
        """Which part of a forward pass is computed again: on average over what was measured on one rank."""
        if recompute is Recompute.FULL:
            return 1.0
        plain, shares = self._on_one_rank(part, Recompute.NONE), []
        for point in self._on_one_rank(part, recompute):
            forward, backward = (
                _read(plain, point.micro_batch_size, attrgetter(name))
                for name in ("forward_seconds", "backward_seconds")
            )
            more = point.forward_seconds + point.backward_seconds - forward - backward
            shares.append(min(max(more / forward, 0.0), 1.0) if forward else 0.0)
        return fmean(shares)

    def _found(
        self, part: str, tp: int, kind: SequenceParallel, recompute: Recompute, micro_batch_size: float
    ) -> PartCost | str:
        key = (part, tp, kind.value, recompute.value)
        for failed in self._failures[key]:
            if micro_batch_size >= failed.micro_batch_size or not self._points[key]:
                return failed.failure
        points = self._points[key]
        if not points:
            return NOT_MEASURED
        plain = self._points[part, tp, kind.value, Recompute.NONE.value]

        def time(name: str) -> float:
            if recompute is Recompute.NONE or not plain:
                return _read(points, micro_batch_size, attrgetter(name))
            added = _read(
                points,
                micro_batch_size,
                lambda point: getattr(point, name) - _read(plain, point.micro_batch_size, attrgetter(name)),
            )
            return added + _read(plain, micro_batch_size, attrgetter(name))

        inside = points[0].micro_batch_size <= micro_batch_size <= points[-1].micro_batch_size
        held = {
            name: round(max(_read(points, micro_batch_size, attrgetter(name)), 0.0))
            for name in ("activation_bytes", "transient_bytes")
        }
        return PartCost(
            forward_seconds=max(time("forward_seconds"), 0.0),
            backward_seconds=max(time("backward_seconds"), 0.0),
            parameters=points[-1].parameters,
            tensors=points[-1].tensors,
            source="measured" if inside else "modelled",
            **held,
        )


def _read(points: Sequence[PartPoint], size: float, value: Callable[[PartPoint], float]) -> float:
    """A value at a micro-batch size, see ``_line``.

    Args:
        points: by rising size.
        size: samples.
        value: what to read off a point.
    """
    return _line([(point.micro_batch_size, value(point)) for point in points], size)


def _line(values: Sequence[tuple[int, float]], size: float) -> float:
    """A value at a micro-batch size, on the lines through (size, value); the outer lines go on beyond them.

    Args:
        values: by rising size; of a single one the line goes through the origin.
        size: samples.
    """
    if len(values) == 1:
        ((only, value),) = values
        return value * size / only
    index = min(max(bisect_left(values, size, key=itemgetter(0)), 1), len(values) - 1)
    (left, low), (right, high) = values[index - 1 : index + 1]
    return low + (size - left) / (right - left) * (high - low)


class CurveTable:
    """The collective curves of a profile.

    Args:
        profile: the profile.
    """

    def __init__(self, profile: Profile) -> None:
        self._curves = profile.collectives
        self._ranks_per_node = profile.provenance.ranks_per_node

    def _crosses(self, ranks: int, stride: int) -> bool:
        return (ranks - 1) * stride >= self._ranks_per_node

    def find(self, collective: str, ranks: int, stride: int) -> CollectiveCurve | None:
        """The curve of a group shape; of the nearest stride on the same side of the node where it is missing.

        None where nothing comparable was measured.
        """
        same = [
            curve
            for curve in self._curves
            if curve.contention
            and (curve.collective, curve.ranks) == (collective, ranks)
            and self._crosses(ranks, curve.stride) == self._crosses(ranks, stride)
        ]
        return min(same, key=lambda curve: abs(curve.stride - stride), default=None)

    def curve(self, collective: str, ranks: int, stride: int) -> CollectiveCurve:
        """The curve that :meth:`find` finds.

        Raises:
            DescriptionError: nothing comparable was measured.
        """
        found = self.find(collective, ranks, stride)
        if found is None:
            raise DescriptionError(
                f"profile: {collective} over {ranks} ranks, {stride} apart, was not measured; "
                "valid: measure again with galvatron profile --again"
            )
        return found

    def seconds(self, collective: str, message_bytes: float, ranks: int, stride: int) -> float:
        """Time of one collective; zero for a group of one and for an empty message."""
        if ranks == 1 or message_bytes <= 0:
            return 0.0
        return self.curve(collective, ranks, stride).seconds(message_bytes)


@dataclass(kw_only=True, frozen=True, slots=True)
class StepLine:
    """Time of zeroing gradients and of the optimizer as a sum of proportional parts."""

    constant_seconds: float
    seconds_per_tensor: float
    seconds_per_update: float
    """Per parameter that the rank updates."""

    def seconds(self, tensors: float, updated: float) -> float:
        """Time of a rank's step."""
        return self.constant_seconds + tensors * self.seconds_per_tensor + updated * self.seconds_per_update


def fit_steps(points: Sequence[StepPoint]) -> StepLine:
    """Fits a line with no negative part through measured optimizer steps, least relative squares.

    Args:
        points: of one ZeRO stage; at least one.

    Returns:
        The line. With fewer points than unknowns the parts per parameter and per tensor come first.
    """
    design = np.array([[point.updated, point.tensors, 1.0] for point in points], dtype=float)
    seconds = np.array([max(point.seconds, 1e-9) for point in points])
    design, target = design / seconds[:, None], np.ones(len(points))
    best, parts = np.inf, np.zeros(3)
    # Non-negative least squares over three unknowns: the best of the subsets whose solution is not negative.
    for count in range(1, min(3, len(points)) + 1):
        for columns in combinations(range(3), count):
            solution, *_ = np.linalg.lstsq(design[:, columns], target, rcond=None)
            error = float(((design[:, columns] @ solution - target) ** 2).sum())
            if (solution >= 0).all() and error < best * (1 - 1e-9) - 1e-15:
                best, parts = error, np.zeros(3)
                parts[list(columns)] = solution
    return StepLine(
        seconds_per_update=float(parts[0]), seconds_per_tensor=float(parts[1]), constant_seconds=float(parts[2])
    )
