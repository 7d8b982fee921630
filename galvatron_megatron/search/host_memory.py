"""Plans that keep states in host memory where that is worth it, and no more of them than a node has.

The search holds plans to the memory of devices. What all ranks of a node keep together couples stages that it
solves one by one. But whatever the plan, a layer's states are shared out over all ranks of its stage: how many
layers offload says what a node keeps (but for a copy of the weights, which stages 1 and 2 keep there). So that
number is searched for, and the search is exact for each.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from galvatron_megatron.cost.estimate import TermCostModel
from galvatron_megatron.cost.host_memory import node_host_bytes
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.result import SearchResult

_GIB = 2**30
_NOTHING_LEFT = "host memory: a node has none beside that of its devices, which may use all of it"

Find = Callable[[SearchRequest], SearchResult]
"""Answers a request, or raises a ``SearchError``."""


def offloads(plan: Plan) -> bool:
    """Whether any states of a plan lie in host memory."""
    return any(strategy.offload is not Offload.NONE for strategy in (plan.base, *plan.strategies))


def offloading_no_more(request: SearchRequest, plan: Plan) -> SearchRequest:
    """The same question where nothing else may offload than what a plan offloads."""
    chosen = (index for index, layer in enumerate(plan.layers) if layer.strategy.offload is not Offload.NONE)
    ends = plan.base.offload is not Offload.NONE
    return replace(request, offload_layers=frozenset(chosen), offload_ends=ends)


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
    found, excess = _HostSearch(request, cost_model, host_bytes, find).within(result)
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


class _HostSearch:
    """The largest number of layers with whose states in host memory the answer fits there.

    These layers are spread evenly over the model, so that stages of a pipeline have their shares of them.
    """

    def __init__(
        self, request: SearchRequest, cost_model: TermCostModel, host_bytes: int | None, find: Find
    ) -> None:
        self.request, self.costs, self.host_bytes, self.find = request, cost_model, host_bytes, find
        self.layers = len(request.model.layers)

    def kept(self, plan: Plan) -> int:
        """Bytes on the node that keeps most."""
        return node_host_bytes(plan, self.costs, self.request.devices_per_node)

    def fits(self, plan: Plan) -> bool:
        """Whether no node keeps more than it has."""
        return self.host_bytes is None or self.kept(plan) <= self.host_bytes

    def within(self, result: SearchResult) -> tuple[SearchResult | None, str | None]:
        """The best answer that fits in host memory.

        Args:
            result: where all layers may offload.

        Returns:
            The answer with no runners-up but those that fit, None where there is none; and what did not fit,
            in words.
        """
        if self.fits(result.plan):
            return self.cleaned(result), None
        size = self.kept(result.plan)
        excess = (
            f"host memory: the fastest plan would keep {size / _GIB:.1f} GiB on a node that has "
            f"{self.host_bytes / _GIB:.1f}"
        )
        if not self.request.layerwise:
            return None, excess  # alike, all layers offload or none
        guess = int(self.layers * self.host_bytes / size)
        found = [answer for ends in (True, False) for answer in self.answers(guess, ends=ends)]
        best = max(found, key=lambda answer: answer.samples_per_second, default=None)
        return None if best is None else self.cleaned(best), excess

    def answers(self, guess: int, *, ends: bool) -> Iterator[SearchResult]:
        """Answers that fit, among them the one with most layers that may offload.

        Args:
            guess: how many layers that may be.
            ends: embedding and head may offload, too.
        """
        low, high = -1, self.layers + (not ends)
        count = guess
        while high - low > 1:
            count = min(max(count, low + 1), high - 1)
            result = self.answer(count, ends=ends)
            if result is None or self.fits(result.plan):
                if result is not None:
                    yield result
                low, step = count, 1
            else:
                high, step = count, -1
            # Its neighbour says whether the guess was right; else halves.
            count = count + step if count == guess else (low + high) // 2

    def answer(self, count: int, *, ends: bool) -> SearchResult | None:
        """The answer where so many layers may offload; None where devices cannot hold the rest."""
        chosen = frozenset(
            index
            for index in range(self.layers)
            if (index + 1) * count // self.layers > index * count // self.layers
        )
        try:
            asked = replace(self.request, offload_layers=chosen, offload_ends=ends, names_nearest=False)
            return self.find(asked)
        except SearchError:
            return None

    def cleaned(self, result: SearchResult) -> SearchResult:
        """A result without plans beside it that do not fit in host memory."""
        kept = {
            name: entry if entry is None or self.fits(entry[0]) else None
            for name in ("best_uniform", "best_layerwise", "searched")
            for entry in (getattr(result, name),)
        }
        others = [entry for entry in result.runners_up if self.fits(entry[0])]
        return replace(result, runners_up=others, **kept)
