"""Decides at which micro-batch sizes layers are measured: enough for a curve, fewer where it is straight."""

from collections.abc import Iterable, Mapping, Sequence

from galvatron_megatron.describe.profile import HEAD, PartPoint
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.profiler.needs import ProfileNeeds

STRAIGHT = 0.1
"""A curve is straight where its middle is this close to the line through its ends, relative to the line (of
all that is measured together: a head that takes a hundredth of a pass may well be bent). A smooth curve is then
within a quarter of that from the two lines through ends and middle."""
FAR = 4
"""What recomputation adds is measured up to the middle of a straight curve where that is as many times the
smallest size; nearer, a disturbance of the two points would turn the line through them."""

type Times = Mapping[int, tuple[float, ...] | None]
"""Seconds of what is measured together by micro-batch size; None where the measurement failed."""


def middle(sizes: Sequence[int]) -> int | None:
    """The size that tells whether the curve between the first and the last is straight."""
    inner = sizes[1:-1]
    return inner[len(inner) // 2] if inner else None


def is_straight(times: Times, sizes: Sequence[int]) -> bool:
    """True where ends and middle are measured and lie on one line."""
    first, last, between = sizes[0], sizes[-1], middle(sizes)
    low, high, inside = (times.get(size) for size in (first, last, between or first))
    if between is None or low is None or high is None or inside is None:
        return False
    share = (between - first) / (last - first)
    lines = [a + share * (b - a) for a, b in zip(low, high, strict=True)]
    return all(abs(found - line) <= STRAIGHT * sum(lines) for found, line in zip(inside, lines, strict=True))


def sizes_to_measure(times: Times, sizes: Sequence[int]) -> list[int]:
    """Sizes that a curve still lacks: its ends and its middle, and the same of both halves if it is bent.

    Args:
        times: what is measured.
        sizes: candidates, rising; one at least.

    Returns:
        Sizes to measure next, rising; empty where all candidates can be read off. What lies above a size that
        failed is not asked for.
    """
    if times.get(sizes[0], ()) is None:
        return []
    ends = sorted({sizes[0], sizes[-1]})
    between = middle(sizes)
    missing = [size for size in (*ends, between) if size is not None and size not in times]
    if missing:
        return sorted(missing)
    if between is None or is_straight(times, sizes):
        return []
    split = sizes.index(between)
    halves = (sizes[: split + 1], sizes[split:])
    return sorted({size for half in halves for size in sizes_to_measure(times, half)})


def settings_to_measure(
    points: Iterable[PartPoint],
    layer_name: str,
    tp: int,
    sequence_parallel: SequenceParallel,
    needs: ProfileNeeds,
) -> list[tuple[Recompute, int]]:
    """(recomputation, micro-batch size) pairs that one kind of layer lacks under one layout.

    What recomputation adds is the forward pass of the same operators. Where time without it was found straight,
    that is measured at the smallest size and at the middle; else at the largest size as well.

    Args:
        points: of the whole profile.
        layer_name: digest of the kind of layer.
        tp: tensor-parallel degree.
        sequence_parallel: with it.
        needs: what the search will ask for.

    Returns:
        What to measure next; once that is in the profile there may be more. Empty at the end.
    """
    times: dict[tuple[str, Recompute], dict[int, tuple[float, ...] | None]] = {}
    for point in points:
        if (point.tp, point.sequence_parallel) == (tp, sequence_parallel):
            seconds = None if point.failure else (point.forward_seconds + point.backward_seconds,)
            times.setdefault((point.part, point.recompute), {})[point.micro_batch_size] = seconds
    if needs.is_added(sequence_parallel):
        have = times.get((layer_name, Recompute.NONE), {})
        wanted = needs.settings(tp, sequence_parallel)
        # What has no room at the smallest size has none at a larger one.
        return [] if None in have.values() else [(how, size) for how, size in wanted if size not in have]
    sizes = needs.sizes(tp)
    plain = _together(times.get((layer_name, Recompute.NONE), {}), times.get((HEAD, Recompute.NONE), {}))
    missing = []
    for recompute in needs.recomputes:
        if recompute is Recompute.NONE:
            missing += [(recompute, size) for size in sizes_to_measure(plain, sizes)]
            continue
        have = times.get((layer_name, recompute), {})
        wanted = _recomputed_sizes(plain, have, sizes, needs)
        missing += [(recompute, size) for size in wanted if size not in have]
    return missing


def _together(layer: Times, head: Times) -> Times:
    """Times of layers and head, which one pass measures: both must be straight."""
    if not layer.keys() <= head.keys():
        return layer
    return {
        size: None if seconds is None or head[size] is None else (*seconds, *head[size])
        for size, seconds in layer.items()
    }


def _recomputed_sizes(plain: Times, have: Times, sizes: Sequence[int], needs: ProfileNeeds) -> list[int]:
    """Sizes at which a kind of recomputation is measured, as far as they are known."""
    if Recompute.NONE in needs.recomputes and sizes_to_measure(plain, sizes):
        return [sizes[0]]
    between = middle(sizes)
    if between is not None and between >= FAR * sizes[0] and is_straight(plain, sizes):
        return [sizes[0], between]
    if have.get(sizes[-1], ()) is None:
        # The largest has no room: look for the largest that has.
        return sizes_to_measure(have, sizes)
    return sorted({sizes[0], sizes[-1]})
