"""Plans that keep no more in host memory than a node has.

The search holds plans to the memory of devices. What all ranks of a node keep together couples stages that it
solves one by one, so host memory is checked on its answers.
"""

from collections.abc import Callable
from dataclasses import replace

from galvatron_megatron.cost.estimate import TermCostModel
from galvatron_megatron.cost.host_memory import node_host_bytes
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.result import SearchResult

_GIB = 2**30


def search_within_hosts(
    request: SearchRequest,
    cost_model: TermCostModel,
    host_bytes: int,
    find: Callable[[SearchRequest], SearchResult],
) -> tuple[SearchResult, str | None]:
    """Searches, and again with less offloaded while the answer does not fit in host memory.

    Args:
        request: the question.
        cost_model: the prices.
        host_bytes: memory of a node; 0 where it is not known, and not checked.
        find: the search.

    Returns:
        An answer that fits, its runners-up too, and a line about what did not; None where the first did.

    Raises:
        SearchError: nothing fits.
    """
    note = None
    for most in range(len(request.offloads), 0, -1):
        allowed = replace(request, offloads=request.offloads[:most])
        try:
            result = find(allowed)
        except SearchError as error:
            raise SearchError(f"{error}; {note}") if note else error from None
        if not host_bytes:
            return result, None

        def fits(plan: Plan) -> bool:
            return node_host_bytes(plan, cost_model, request.devices_per_node) <= host_bytes

        if fits(result.plan):
            kept = {
                name: entry if entry is None or fits(entry[0]) else None
                for name in ("best_uniform", "best_layerwise", "searched")
                for entry in (getattr(result, name),)
            }
            others = [entry for entry in result.runners_up if fits(entry[0])]
            return replace(result, runners_up=others, **kept), note
        if note is None:
            size = node_host_bytes(result.plan, cost_model, request.devices_per_node)
            note = (
                f"host memory: the fastest plan would keep {size / _GIB:.1f} GiB on a node that has "
                f"{host_bytes / _GIB:.1f}; valid: less offloaded, or a larger host.memory_gib"
            )
    raise SearchError(note or "host memory: nothing fits; valid: offload none")
