"""Plans that keep states in host memory where that is worth it, and no more of them than a node has.

Few answers fill a host, so that the search does without that limit first; where its answer does not fit, it
searches once more under the limit, see ``host_shares``.
"""

from collections.abc import Callable
from dataclasses import replace

from galvatron_megatron.cost.estimate import TermCostModel
from galvatron_megatron.cost.host_memory import node_host_bytes
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.search.host_spread import fitting_plan
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.result import SearchResult

_GIB = 2**30
_NOTHING_LEFT = "host memory: a node has none beside that of its devices, which may use all of it"

MOST_SECONDS = 30.0
"""Time for a search under the limit, which takes many times as long as one without it."""

Find = Callable[[SearchRequest], SearchResult]
"""Answers a request, or raises a ``SearchError``."""


def offloads(plan: Plan) -> bool:
    """Whether any states of a plan lie in host memory."""
    return any(strategy.offload is not Offload.NONE for strategy in (plan.base, *plan.strategies))


def offloading_no_more(request: SearchRequest, plan: Plan) -> SearchRequest:
    """The same question where nothing else may offload than what a plan offloads, and without a limit."""
    stays = (index for index, layer in enumerate(plan.layers) if layer.strategy.offload is Offload.NONE)
    ends = plan.base.offload is Offload.NONE
    return replace(request, on_device_layers=frozenset(stays), on_device_ends=ends)


def search_within_hosts(
    request: SearchRequest, cost_model: TermCostModel, host_bytes: int | None, find: Find
) -> tuple[SearchResult, str | None]:
    """Searches; where a plan that offloads is fastest, within host memory and beside plans that do not.

    A plan that keeps everything on the device is preferred unless the other one is faster by more than
    ``request.uniform_margin``.

    Args:
        request: the question.
        cost_model: the prices.
        host_bytes: what a node has for offloaded states; None where that is not known, and not checked.
        find: the search.

    Returns:
        An answer that fits, its runners-up too, and a line about what did not; None where the first did.

    Raises:
        SearchError: nothing fits.
    """
    on_device = replace(request, offloads=(Offload.NONE,))
    if request.offloads == on_device.offloads:
        return find(request), None
    if host_bytes == 0:
        try:
            return find(on_device), f"{_NOTHING_LEFT}; nothing is offloaded"
        except SearchError as error:
            raise SearchError(f"{error}; {_NOTHING_LEFT}") from None
    result = find(request)
    if not offloads(result.plan):
        return result, None
    found, excess = _within(request, result, cost_model, host_bytes, find)
    try:
        plain = find(replace(on_device, names_nearest=found is None))
    except SearchError as error:
        if found is None:
            raise SearchError(f"{excess}; valid: less offloaded, or more of it; {error}") from None
    else:
        margin = 1 - request.uniform_margin
        if found is None or found.samples_per_second * margin <= plain.samples_per_second:
            return plain, excess and f"{excess}; nothing is offloaded"
    count = sum(layer.strategy.offload is not Offload.NONE for layer in found.plan.layers)
    slower = result.samples_per_second / found.samples_per_second - 1
    shares = f"{count} of {len(found.plan.layers)} layers are offloaded, {slower:.1%} slower"
    return found, excess and f"{excess}; {shares}"


def _within(
    request: SearchRequest,
    result: SearchResult,
    cost_model: TermCostModel,
    host_bytes: int | None,
    find: Find,
) -> tuple[SearchResult | None, str | None]:
    """The best answer that fits in host memory.

    Args:
        request: the question.
        result: its answer without that limit.
        cost_model: the prices.
        host_bytes: what a node has; None where that is not known.
        find: the search.

    Returns:
        The answer with no runners-up but those that fit, None where there is none; and what did not fit, in
        words.
    """

    def kept(plan: Plan) -> int:
        return node_host_bytes(plan, cost_model, request.devices_per_node)

    if host_bytes is None:
        return result, None
    size = kept(result.plan)
    if size <= host_bytes:
        return _without(result, lambda plan: kept(plan) > host_bytes), None
    excess = (
        f"host memory: the fastest plan would keep {size / _GIB:.1f} GiB on a node that has "
        f"{host_bytes / _GIB:.1f}"
    )
    known = None
    if request.layerwise:  # alike, all layers offload or none
        known = fitting_plan(request, host_bytes / size, lambda plan: kept(plan) <= host_bytes, find)
    limited = replace(request, host_bytes=host_bytes, names_nearest=False, most_seconds=MOST_SECONDS)
    try:
        found = find(replace(limited, known=() if known is None else (known,)))
    except SearchError:
        return None, excess
    return found, f"{excess}; not proven fastest, at most {found.gap:.1%} off" if found.gap else excess


def _without(result: SearchResult, refused: Callable[[Plan], bool]) -> SearchResult:
    """A result without some plans beside its own."""
    kept = {
        name: entry if entry is None or not refused(entry[0]) else None
        for name in ("best_uniform", "best_layerwise", "searched")
        for entry in (getattr(result, name),)
    }
    others = [entry for entry in result.runners_up if not refused(entry[0])]
    return replace(result, runners_up=others, **kept)
