"""Every communicator a job creates, in order, and whose code asked for it; imported on ranks only."""

import sys
from collections.abc import Callable

from torch.distributed import distributed_c10d

OURS = ("/galvatron_megatron/runtime/", "/deepspeed/")
"""In the path of code that runs plans: also what Megatron or torch create when they are called from there."""


def record_communicators(found: list[tuple[tuple[int, ...], bool]]) -> Callable[[], None]:
    """Notes the ranks of every communicator from now on, whichever function of torch is asked for it.

    Args:
        found: filled with the ranks and whether code that runs plans asked, on every rank that takes part.

    Returns:
        Undoes it.
    """
    create = distributed_c10d._new_process_group_helper

    def recorded(size: int, rank: int, ranks: list[int], *arguments, **options):
        frame, ours = sys._getframe(1), False
        while frame is not None and not ours:
            ours = any(part in frame.f_code.co_filename for part in OURS)
            frame = frame.f_back
        found.append((tuple(ranks), ours))
        return create(size, rank, ranks, *arguments, **options)

    distributed_c10d._new_process_group_helper = recorded
    return lambda: setattr(distributed_c10d, "_new_process_group_helper", create)


def created_again(found: list[tuple[tuple[int, ...], bool]], world_size: int) -> list[tuple[int, ...]]:
    """Rank sets for which code that runs plans created a communicator where one was there already.

    Megatron creates several for some sets (its tp and tp_cp without context parallelism); these count as being
    there, not as created again.

    Args:
        found: what ``record_communicators`` noted.
        world_size: the world has a communicator from the start.
    """
    there, again = {tuple(range(world_size))}, []
    for ranks, ours in found:
        if ours and ranks in there:
            again.append(ranks)
        there.add(ranks)
    return again
