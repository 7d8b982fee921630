"""Measures how much computation and communication slow each other down while they run together."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from galvatron_megatron.describe.profile import Overlap
from galvatron_megatron.device import on_cpu
from galvatron_megatron.profiler.clock import Clock
from galvatron_megatron.profiler.fit import undisturbed
from galvatron_megatron.profiler.process_group import gather

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
REPEATS = 4
LONG_SECONDS = 0.05
"""A collective that takes longer is repeated half as often."""


def slowdown(computation: float, communication: float, together: float) -> float:
    """Factor by which both slow down while both run, from three times.

    Inverts ``together = max + (slowdown - 1) * min`` of :mod:`galvatron_megatron.cost.overlap`.

    Args:
        computation: seconds alone.
        communication: seconds alone.
        together: seconds until both are done, started at once.

    Returns:
        1 (free overlap) to 2 (one after the other, or worse).
    """
    longer, shorter = max(computation, communication), min(computation, communication)
    if shorter <= 0:
        return 1.0
    return min(2.0, max(1.0, 1 + (together - longer) / shorter))


def measure_overlap(collective: str, message_bytes: int) -> Overlap:
    """Runs matrix products beside a collective over all ranks; every rank of the job calls this.

    Args:
        collective: one of ``COLLECTIVES``.
        message_bytes: of the complete tensor.

    Returns:
        The slow-down, the largest of all ranks'.
    """
    clock = Clock()
    ranks = dist.get_world_size()
    count = message_bytes // 4 // ranks * ranks
    whole, part = torch.zeros(count, device="cuda"), torch.zeros(count // ranks, device="cuda")
    other = torch.empty_like(whole)
    rank = dist.get_rank()
    # As between the stages of a pipeline: every rank sends to the next one and receives from the one before.
    sends = [
        dist.P2POp(dist.isend, whole, (rank + 1) % ranks),
        dist.P2POp(dist.irecv, other, (rank - 1) % ranks),
    ]
    start: Callable[[], list[dist.Work]] = {
        "all_reduce": lambda: [dist.all_reduce(whole, async_op=True)],
        "all_gather": lambda: [dist.all_gather_into_tensor(whole, part, async_op=True)],
        "reduce_scatter": lambda: [dist.reduce_scatter_tensor(part, whole, async_op=True)],
        "all_to_all": lambda: [dist.all_to_all_single(other, whole, async_op=True)],
        "send": lambda: dist.batch_isend_irecv(sends),
    }[collective]
    size = 128 if on_cpu() else 4096
    a, b = (torch.ones((size, size), device="cuda") for _ in range(2))

    def seconds(products: int, *, communicate: bool, repeats: int) -> float:
        samples = []
        for _ in range(repeats):
            dist.barrier()
            begin = clock.mark()
            works = start() if communicate else []
            for _ in range(products):
                torch.mm(a, b)
            for work in works:
                work.wait()
            end = clock.mark()
            clock.synchronize()
            samples.append(clock.seconds(begin, end))
        return undisturbed(samples)[0]

    warm_up = max(gather(seconds(1, communicate=True, repeats=1)))
    repeats = REPEATS if warm_up < LONG_SECONDS else REPEATS // 2
    communication = seconds(0, communicate=True, repeats=repeats)
    one = max(seconds(20, communicate=False, repeats=REPEATS) / 20, 1e-7)
    # Both sides of about the same length, the same number of products on every rank.
    products = max(1, round(max(gather(communication)) / max(gather(one))))
    computation = seconds(products, communicate=False, repeats=repeats)
    together = seconds(products, communicate=True, repeats=repeats)
    return Overlap(collective=collective, slowdown=max(gather(slowdown(computation, communication, together))))
