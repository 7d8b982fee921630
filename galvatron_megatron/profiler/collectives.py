"""Measures collectives over the group shapes that a plan can use."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from galvatron_megatron.describe.profile import CollectiveCurve
from galvatron_megatron.profiler.clock import Clock
from galvatron_megatron.profiler.fit import latency_bandwidth, undisturbed
from galvatron_megatron.profiler.process_group import gather

SMALLEST_BYTES = 1 << 10
GROWTH = 8
"""Factor between message sizes; curves are straight on a log scale between."""


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
    """Group shapes that uniform plans use, by collective.

    Tensor parallelism uses consecutive ranks; data parallelism ranks tp apart; a pipeline sends between ranks
    world / pp apart.
    """
    tensor = {GroupShape(ranks=tp, stride=1) for tp in tps if tp > 1}
    data = {
        GroupShape(ranks=dp, stride=tp)
        for tp in tps
        if world_size % tp == 0
        for dp in divisors(world_size // tp)
        if dp > 1
    }
    # Two ranks, the first and last stage, reduce the gradient of a tied embedding.
    tied = {GroupShape(ranks=2, stride=world_size // 2)} if world_size % 2 == 0 else set()
    send = {
        GroupShape(ranks=2, stride=world_size // pp) for pp in divisors(world_size) if pp > 1 and pp % 2 == 0
    }
    return {
        "all_reduce": tensor | data | tied,
        "all_gather": tensor | data,
        "reduce_scatter": tensor | data,
        "broadcast": tensor,
        "send": send,
    }


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
    operation: Callable[[], None], clock: Clock, group: dist.ProcessGroup, budget_seconds: float
) -> float:
    """Undisturbed seconds of one call on this rank; as many repeats as the budget allows."""
    for _ in range(2):
        operation()
    clock.synchronize()
    dist.barrier(group=group)
    start = clock.mark()
    operation()
    end = clock.mark()
    clock.synchronize()
    first = torch.tensor([clock.seconds(start, end)], device="cuda", dtype=torch.float64)
    dist.all_reduce(first, op=dist.ReduceOp.MAX, group=group)
    repeats = int(min(25, max(3, budget_seconds / max(first.item(), 1e-6))))
    marks = [clock.mark()]
    for _ in range(repeats):
        operation()
        marks.append(clock.mark())
    clock.synchronize()
    return undisturbed([clock.seconds(a, b) for a, b in pairwise(marks)])[0]


def measure_curve(
    collective: str,
    shape: GroupShape,
    *,
    largest_bytes: int,
    nodes: int = 1,
    contention: bool = True,
    seconds_per_size: float = 0.08,
) -> tuple[CollectiveCurve, list[float]]:
    """Measures one collective over one group shape; every rank of the job calls this.

    Args:
        collective: its name.
        shape: the group shape.
        largest_bytes: largest message; sizes grow from 1 KB by a factor of 8 up to it.
        nodes: nodes that one group spans, for the record.
        contention: run all sibling groups at once; otherwise the first group alone, the others wait.
        seconds_per_size: time to spend on one message size.

    Returns:
        The curve, equal on every rank: the lower quartile over repeats, the maximum over ranks. And the seconds
        of every rank for all sizes, by rank.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    groups = shape.groups(world_size)
    # use_local_synchronization would save time for many groups, but gloo's needs every rank here.
    handles = [dist.new_group(ranks) for ranks in groups]
    mine, handle = next((g, h) for g, h in zip(groups, handles, strict=True) if rank in g)
    clock = Clock()
    sizes = []
    size = SMALLEST_BYTES
    while size < largest_bytes:
        sizes.append(size)
        size *= GROWTH
    sizes.append(max(largest_bytes, SMALLEST_BYTES))
    times = []
    for size in sizes:
        count = max(size // 4 // shape.ranks, 1) * shape.ranks
        dist.barrier()
        seconds = 0.0
        if contention or mine is groups[0]:
            operation = _operation(collective, handle, count)
            seconds = _measure_size(operation, clock, handle, seconds_per_size)
        times.append(seconds)
    if collective == "send":
        # The word back takes as long as the shortest message there; where the machine was disturbed during the
        # shortest one, a longer one may seem to take less than that.
        times = [max(seconds - times[0] / 2, times[0] / 2) for seconds in times]
    by_rank = gather(times)
    for group in handles:
        if rank in dist.get_process_group_ranks(group):
            dist.destroy_process_group(group)
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
    return curve, [sum(times) for times in by_rank]
