"""Plans that fit in host memory, found soon: so many layers may offload, spread evenly over the model.

Whatever the plan, a layer's states are shared out over all ranks of its stage: how many layers offload says
what a node keeps, but for copies of weights. So that number is searched for. A better plan may have other
shares; the search under the limit, which starts from the plan found here, tells.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.result import SearchResult

_MOST_ANSWERS = 5
"""Searches for each of: embedding and head may offload, and they may not."""


def fitting_plan(
    request: SearchRequest,
    share: float,
    fits: Callable[[Plan], bool],
    find: Callable[[SearchRequest], SearchResult],
) -> Plan | None:
    """The fastest of some plans that fit.

    Args:
        request: the question, without a limit of host memory.
        share: part of what its answer would keep in host memory that a node has.
        fits: whether a plan keeps no more than a node has.
        find: the search.

    Returns:
        The plan; None where none was found.
    """
    guess = int(len(request.model.layers) * share)
    if Offload.NONE not in request.offloads:
        return None  # all layers must offload
    found = [each for on_device in (False, True) for each in _answers(request, guess, on_device, fits, find)]
    best = max(found, key=lambda result: result.samples_per_second, default=None)
    return None if best is None else best.plan


def _answers(
    request: SearchRequest,
    guess: int,
    ends_on_device: bool,
    fits: Callable[[Plan], bool],
    find: Callable[[SearchRequest], SearchResult],
) -> Iterator[SearchResult]:
    """Answers that fit, with ever more layers that may offload."""
    layers = len(request.model.layers)
    low, high, count = -1, layers + ends_on_device, guess
    for _ in range(_MOST_ANSWERS):
        if high - low <= 1:
            return
        count = min(max(count, low + 1), high - 1)
        stay = frozenset(
            index for index in range(layers) if (index + 1) * count // layers == index * count // layers
        )
        asked = replace(
            request, on_device_layers=stay, on_device_ends=ends_on_device, names_nearest=False, runners_up=0
        )
        try:
            result = find(asked)
        except SearchError:
            result = None  # devices cannot hold the rest: more must offload
        if result is None or fits(result.plan):
            if result is not None:
                yield result
            low, step = count, 1
        else:
            high, step = count, -1
        # Its neighbour says whether the guess was right; else halves.
        count = count + step if count == guess else (low + high) // 2
