"""Measures collectives over the group shapes that a plan can use."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from galvatron_megatron.describe.profile import CollectiveCurve
from galvatron_megatron.describe.typical import typical
from galvatron_megatron.profiler.clock import Clock
from galvatron_megatron.profiler.fit import latency_bandwidth, uncertainty
from galvatron_megatron.profiler.process_group import answer_timeout, gather

SMALLEST_BYTES = 1 << 10
GROWTH = 8
"""Factor between message sizes; curves are straight on a log scale between."""
LONG_REPEATS = 3
"""How often a message is sent that takes longer than the time for its size."""
UNSURE = 0.04
"""It is sent as often again where the relative standard error is larger."""


@dataclass(kw_only=True, frozen=True, slots=True, order=True)
class GroupShape:
    """A set of sibling groups that together hold every rank."""

    ranks: int
    stride: int

    def groups(self, world_size: int) -> list[list[int]]:
        """The groups of this shape, every rank in exactly one.

        Args:
            world_size: a multiple of ranks * stride.
        """
        block = self.ranks * self.stride
        return [
            [start + offset + self.stride * index for index in range(self.ranks)]
            for start in range(0, world_size, block)
            for offset in range(self.stride)
        ]


def divisors(number: int) -> list[int]:
    """All divisors, rising."""
    return [d for d in range(1, number + 1) if number % d == 0]


def shapes_of_plans(world_size: int, tps: Iterable[int]) -> dict[str, set[GroupShape]]:
    """Group shapes that plans use, by collective.

    Tensor parallelism uses consecutive ranks; data parallelism, and experts exchanged within it, ranks tp
    apart; a pipeline sends between ranks world / pp apart. Data is handed out within tp groups, weights over
    all replicas.
    """
    tps = list(tps)
    tensor = {GroupShape(ranks=tp, stride=1) for tp in tps if tp > 1}
    data = {
        GroupShape(ranks=dp, stride=tp)
        for tp in tps
        if world_size % tp == 0
        for dp in divisors(world_size // tp)
        if dp > 1
    }
    widest = {shape for shape in data if shape.ranks * shape.stride == world_size}
    # Two ranks, the first and last stage, reduce the gradient of a tied embedding.
    tied = {GroupShape(ranks=2, stride=world_size // 2)} if world_size % 2 == 0 else set()
    send = {
        GroupShape(ranks=2, stride=world_size // pp) for pp in divisors(world_size) if pp > 1 and pp % 2 == 0
    }
    return {
        "all_reduce": tensor | data | tied,
        "all_gather": tensor | data,
        "reduce_scatter": tensor | data,
        "all_to_all": tensor | data,
        "broadcast": tensor | widest,
        "send": send,
    }


def message_sizes(largest_bytes: int, *, contention: bool) -> list[int]:
    """Message sizes of one curve, from 1 KB up to the largest; of a group alone every second one of them.

    Plans are priced with all sibling groups at work; a group alone only shows what groups take from each other.
    """
    growth = GROWTH if contention else GROWTH**2
    sizes = [SMALLEST_BYTES]
    while sizes[-1] * growth < largest_bytes:
        sizes.append(sizes[-1] * growth)
    return [*sizes, largest_bytes] if largest_bytes > SMALLEST_BYTES else sizes


@dataclass(kw_only=True, frozen=True, slots=True)
class Siblings:
    """The process groups of one shape on the live ranks."""

    shape: GroupShape
    handle: dist.ProcessGroup
    """The group that this rank is in."""
    first: bool
    """This rank is in the group that is measured alone."""


@contextmanager
def siblings_of(shape: GroupShape) -> Iterator[Siblings]:
    """Makes the groups of a shape for a while; every rank of the job calls this."""
    rank = dist.get_rank()
    groups = shape.groups(dist.get_world_size())
    index = next(index for index, ranks in enumerate(groups) if rank in ranks)
    if dist.get_backend() == "nccl":
        # The other groups need not be known here: at a thousand ranks this is one group instead of hundreds.
        handle = dist.new_group(groups[index], timeout=answer_timeout(), use_local_synchronization=True)
    else:
        handle = [dist.new_group(ranks, timeout=answer_timeout()) for ranks in groups][index]
    yield Siblings(shape=shape, handle=handle, first=index == 0)
    # Not after an error: the others may be gone, and the whole job's groups go down then.
    dist.destroy_process_group(handle)


def _operation(collective: str, group: dist.ProcessGroup, count: int) -> Callable[[], None]:
    """One call of a collective over ``count`` fp32 elements (of the complete tensor)."""
    ranks = dist.get_world_size(group)
    position = dist.get_rank(group)
    whole = torch.zeros(count, device="cuda")
    part = torch.zeros(count // ranks, device="cuda")
    if collective == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if collective == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group)
    if collective == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    if collective == "all_to_all":
        received = torch.zeros(count, device="cuda")
        return lambda: dist.all_to_all_single(received, whole, group=group)
    source = dist.get_global_rank(group, 0)
    if collective == "broadcast":
        return lambda: dist.broadcast(whole, src=source, group=group)
    peer = dist.get_global_rank(group, 1 - position)
    answer = torch.zeros(1, device="cuda")

    def there_and_a_word_back() -> None:
        # All pairs send in one direction at a time, as the stages of a pipeline do: they share the link.
        first, second = (dist.isend, dist.irecv) if position == 0 else (dist.irecv, dist.isend)
        first(whole, peer, group=group).wait()
        second(answer, peer, group=group).wait()

    return there_and_a_word_back


def _measure_size(
    operation: Callable[[], None], clock: Clock, scope: dist.ProcessGroup, budget_seconds: float
) -> tuple[float, float]:
    """Times one call as often as the budget allows, three times at least.

    Args:
        operation: the call.
        clock: the device's.
        scope: the ranks that make the call at the same time.
        budget_seconds: time to spend on it.

    Returns:
        Typical seconds until the last rank was done, as far as this rank knows, and of this rank itself.
    """
    operation()
    clock.synchronize()

    def timed(repeats: int) -> list[float]:
        dist.barrier(group=scope)
        marks = [clock.mark()]
        for _ in range(repeats):
            operation()
            marks.append(clock.mark())
        clock.synchronize()
        return [clock.seconds(a, b) for a, b in pairwise(marks)]

    samples = timed(1)
    first = max(_latest(samples, scope)[0], 1e-6)
    if first < budget_seconds / 3:
        # Short messages still warm up in their second call, which therefore does not count.
        own = typical(timed(int(min(25, budget_seconds / first))))[0]
        return own, own
    # Groups that share a link do not share every message evenly: they start together, and the last one counts.
    samples += [timed(1)[0] for _ in range(LONG_REPEATS - 1)]
    latest = _latest(samples, scope)
    if uncertainty(typical(latest)[1], len(latest)) > UNSURE:
        samples += [timed(1)[0] for _ in range(LONG_REPEATS)]
        latest = _latest(samples, scope)
    return typical(latest)[0], typical(samples)[0]


def _latest(samples: list[float], scope: dist.ProcessGroup) -> list[float]:
    """Of every sample the largest of all ranks'."""
    found = torch.tensor(samples, device="cuda", dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=scope)
    return found.tolist()


def measure_curve(
    collective: str,
    siblings: Siblings,
    *,
    largest_bytes: int,
    nodes: int = 1,
    contention: bool = True,
    seconds_per_size: float = 0.08,
) -> tuple[CollectiveCurve, list[float]]:
    """Measures one collective over one group shape; every rank of the job calls this.

    Args:
        collective: its name.
        siblings: the groups of the shape.
        largest_bytes: largest message, see :func:`message_sizes`.
        nodes: nodes that one group spans, for the record.
        contention: run all sibling groups at once; otherwise the first group alone, the others wait.
        seconds_per_size: time to spend on one message size.

    Returns:
        The curve, equal on every rank: the mean of the middle half of the repeats, the maximum over ranks. And
        the seconds of every rank for all sizes, by rank; zero where it did not take part.
    """
    shape = siblings.shape
    clock = Clock()
    sizes = message_sizes(largest_bytes, contention=contention)
    times = []
    own_seconds = 0.0
    scope = dist.group.WORLD if contention else siblings.handle
    for size in sizes:
        count = max(size // 4 // shape.ranks, 1) * shape.ranks
        dist.barrier()
        seconds = 0.0
        if contention or siblings.first:
            operation = _operation(collective, siblings.handle, count)
            seconds, own = _measure_size(operation, clock, scope, seconds_per_size)
            own_seconds += own
        times.append(seconds)
    if collective == "send":
        # The word back takes as long as the shortest message there; where the machine was disturbed during the
        # shortest one, a longer one may seem to take less than that.
        times = [max(seconds - times[0] / 2, times[0] / 2) for seconds in times]
    answers = gather((times, own_seconds))
    by_rank = [entry for entry, _ in answers]
    points = tuple(zip(sizes, map(max, zip(*by_rank, strict=True)), strict=True))
    latency, slope, residual = latency_bandwidth(points)
    curve = CollectiveCurve(
        collective=collective,
        ranks=shape.ranks,
        stride=shape.stride,
        nodes=nodes,
        contention=contention,
        latency_seconds=latency,
        seconds_per_byte=slope,
        residual=residual,
        points=points,
    )
    return curve, [own for _, own in answers]
