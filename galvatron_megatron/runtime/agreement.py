"""What one rank meets ends all ranks alike, so that none waits for another in a collective."""

from typing import Any

import torch.distributed as dist

from galvatron_megatron.errors import PlanError


class AgreedError(PlanError):
    """An error that all ranks raise together: one of them is enough to say it."""


def agree(problem: str, value: Any = None) -> list[Any]:
    """Tells all ranks how the work of each went; all ranks call this together.

    Args:
        problem: what went wrong on this rank; empty where nothing did.
        value: what came out, for the others.

    Returns:
        The values of all ranks.

    Raises:
        AgreedError: something went wrong on a rank; the same on every rank.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (problem, value))
    if first := next((found for found, _ in everyone if found), ""):
        raise AgreedError(first)
    return [found for _, found in everyone]
