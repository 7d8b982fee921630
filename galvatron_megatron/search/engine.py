"""The search: best first through the decision tree, with bounds that skip what cannot win."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

import numpy as np

from galvatron_megatron.cost.protocol import CostModel
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.search.branch import Branch
from galvatron_megatron.search.checked_costs import CheckedCosts
from galvatron_megatron.search.decision_tree import Space
from galvatron_megatron.search.evaluation import evaluate, step_overhead_seconds
from galvatron_megatron.search.nearest import nothing_fits
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.result import SearchResult
from galvatron_megatron.search.uniform import UniformPoint, capacity_bound, solve_uniform, uniform_points

_TIE = 1e-12


@dataclass(kw_only=True, frozen=True, slots=True)
class Progress:
    """What a running search can tell."""

    done: int
    total: int
    best: Plan | None
    step_seconds: float
    gap: float
    """How far off the best plan can be at most, as a fraction."""


def search(
    request: SearchRequest,
    cost_model: CostModel,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Finds the fastest plan.

    Args:
        request: the question.
        cost_model: the prices.
        progress: called now and then.

    Returns:
        The plan, proven best unless interrupted (``SearchResult.gap``).

    Raises:
        SearchError: the space is empty, nothing fits, or a price is not a number.
    """
    run = _Run(request, CheckedCosts(cost_model), progress)
    for plan in request.known:
        run.keep(plan)
    try:
        run.uniform()
        if request.layerwise:
            run.layerwise()
        run.competitors()
    except KeyboardInterrupt:
        if run.best is None:
            raise
        run.interrupted = True
    return run.result()


def outer_decisions(plan: Plan) -> tuple:
    """What runners-up differ in: batch, pipeline, virtual stages, micro-batches and base layout.

    The ZeRO stage of embedding and head is not one of them.
    """
    return (plan.global_batch_size, plan.pp, plan.virtual_stages, plan.micro_batches, plan.base.layout)


class _Run:
    """State of one search. Plans of different batches are compared by the seconds of one sample."""

    def __init__(
        self, request: SearchRequest, cost_model: CostModel, progress: Callable[[Progress], None] | None
    ) -> None:
        self.started = time.perf_counter()
        self.ends = self.started + (np.inf if request.most_seconds is None else request.most_seconds)
        """When the best plan so far is the answer, if there is one."""
        self.request, self.cost_model, self.progress = request, cost_model, progress
        self.space = Space(request=request)
        self.outside = step_overhead_seconds(cost_model)
        branches = (Branch(self.space, cost_model, outer) for outer in self.space.outers())
        self.branches = [branch for branch in branches if branch.is_possible]
        self.best: tuple[float, Plan] | None = None
        self.best_uniform: tuple[float, Plan] | None = None
        self.found: dict[tuple, tuple[float, Plan]] = {}
        self.other_uniform: list[tuple[float, UniformPoint]] = []
        """Uniform points that are not the best one, with bounds of their seconds per sample."""
        self.open_bound = 0.0
        self.interrupted = False
        self.points = sum(len(b.bases) * len(b.virtual_stages) for b in self.branches)
        self.done = self.solved = 0

    def per_sample(self, seconds: float, branch: Branch) -> float:
        """Seconds of one sample from those of a step without what is outside all layers."""
        return (seconds + self.outside) / branch.outer.global_batch_size

    def cutoff(self, branch: Branch, best: tuple[float, Plan] | None) -> float:
        """Step seconds, without what is outside all layers, that a better plan of a branch stays below."""
        return np.inf if best is None else best[0] * branch.outer.global_batch_size - self.outside

    def keep(self, plan: Plan) -> float:
        """Notes a plan; returns its seconds per sample."""
        seconds = evaluate(plan, self.cost_model).step_seconds + self.outside
        value = seconds / plan.global_batch_size
        if self.best is None or value < self.best[0] * (1 - _TIE):
            self.best = (value, plan)
        family = outer_decisions(plan)
        if family not in self.found or value < self.found[family][0]:
            self.found[family] = (value, plan)
        return value

    def report(self, bound: float) -> None:
        """Tells the progress."""
        self.open_bound = bound
        if self.progress is not None:
            plan = None if self.best is None else self.best[1]
            self.progress(
                Progress(
                    done=self.done,
                    total=self.points,
                    best=plan,
                    step_seconds=np.inf if plan is None else self.best[0] * plan.global_batch_size,
                    gap=self.gap(),
                )
            )

    def gap(self) -> float:
        """How far the best plan can be from the optimum, as a fraction."""
        bound = min(self.open_bound, self.unproven())
        return 1.0 if self.best is None else max(0.0, 1 - bound / self.best[0])

    def is_late(self) -> bool:
        """Whether there is an answer and no more time."""
        late = self.best is not None and time.perf_counter() > self.ends
        self.interrupted |= late
        return late

    def unproven(self) -> float:
        """Seconds per sample that a plan takes at least where the search for one was cut short."""
        return min((self.per_sample(branch.unproven, branch) for branch in self.branches), default=np.inf)

    def uniform(self) -> None:
        """Best uniform plan."""
        ticket = count()
        heap = [
            (self.per_sample(point.bound, branch), next(ticket), point, False)
            for branch in self.branches
            for point in uniform_points(branch)
        ]
        heapify(heap)
        while heap:
            if self.best_uniform is not None and heap[0][0] >= self.best_uniform[0]:
                break
            if self.is_late():
                break
            bound, _, point, is_tight = heappop(heap)
            if not self.request.layerwise:
                self.report(bound)
            branch = point.branch
            cutoff = self.cutoff(branch, self.best_uniform)
            if not is_tight:
                tight = capacity_bound(point, cutoff)
                if tight < cutoff:
                    heappush(heap, (max(bound, self.per_sample(tight, branch)), next(ticket), point, True))
                else:
                    self.other_uniform.append((max(bound, self.per_sample(cutoff, branch)), point))
                continue
            self.solved += 1
            plan = solve_uniform(point, cutoff)
            if plan is not None:
                self.best_uniform = (self.keep(plan), plan)
            else:
                self.other_uniform.append((max(bound, self.per_sample(cutoff, branch)), point))
        self.other_uniform += [(bound, point) for bound, _, point, _ in heap]
        rest = heap[0][0] if heap and self.interrupted else np.inf
        self.open_bound = rest if not self.request.layerwise else 0.0

    def layerwise(self) -> None:
        """Best plan of the whole space: a branch, then its numbers of virtual stages, then their base
        layouts."""
        ticket = count()
        heap = []
        for branch in self.branches:
            heap.append((self.per_sample(branch.least_time(), branch), next(ticket), branch, None, None))
        heapify(heap)
        while heap:
            bound, _, branch, virtual, base = heappop(heap)
            self.report(bound)
            if self.best is not None and bound >= self.best[0] * (1 - _TIE):
                break
            if self.is_late():
                return  # the open bound stays
            cutoff = self.cutoff(branch, self.best)
            if virtual is None:
                for number in branch.virtual_stages:
                    lower = max(bound, self.per_sample(branch.relaxed_bound(number, cutoff), branch))
                    heappush(heap, (lower, next(ticket), branch, number, None))
            elif base is None:
                relaxed = bound * branch.outer.global_batch_size - self.outside
                for candidate in branch.useful_bases(virtual):
                    lower = self.per_sample(branch.base_bound(relaxed, virtual, candidate), branch)
                    heappush(heap, (max(bound, lower), next(ticket), branch, virtual, (candidate, False)))
            elif not base[1]:
                lower = self.per_sample(branch.placed_bound(virtual, base[0], cutoff), branch)
                heappush(heap, (max(bound, lower), next(ticket), branch, virtual, (base[0], True)))
            else:
                self.done += 1
                self.solved += 1
                deadline = np.inf if self.best is None else self.ends
                plan = branch.solve(virtual, base[0], cutoff, deadline=deadline)
                if plan is not None:
                    self.keep(plan)
                if self.is_late():
                    return  # what was cut short takes as long as this bound at least
        self.open_bound = np.inf

    def others(self) -> list[tuple[float, Plan]]:
        """The best plan known of every outer decision but the chosen plan's, the fastest first."""
        own = outer_decisions(self.chosen()[1])
        return sorted((entry for key, entry in self.found.items() if key != own), key=lambda entry: entry[0])

    def competitors(self) -> None:
        """Finds the best uniform plan of other outer decisions, until no further one is among the runners-up.

        What was solved layer by layer to prove the best plan is known already; a branch that a bound excluded
        enters with its best uniform plan.
        """
        wanted = self.request.runners_up
        if self.best is None or not wanted or self.interrupted:
            return
        ticket = count()
        heap = [(bound, next(ticket), point) for bound, point in self.other_uniform]
        heapify(heap)
        own, others = outer_decisions(self.chosen()[1]), self.others()
        while heap:
            bound, _, point = heappop(heap)
            limit = others[wanted - 1][0] if len(others) >= wanted else np.inf
            if bound >= limit:
                break
            branch, base = point.branch, point.base
            outer = branch.outer
            family = (outer.global_batch_size, outer.pp, point.virtual_stages, outer.micro_batches, base.layout)
            if family == own:
                continue
            known = self.found.get(family)
            limit = limit if known is None else min(limit, known[0])
            if bound >= limit:
                continue
            cutoff = limit * outer.global_batch_size - self.outside
            if capacity_bound(point, cutoff) < cutoff:
                plan = solve_uniform(point, cutoff)
                if plan is not None:
                    self.keep(plan)
                    others = self.others()

    def chosen(self) -> tuple[float, Plan]:
        """The answer: the best plan, or the best uniform one where the margin prefers it."""
        margin = max(self.request.uniform_margin, _TIE)
        if self.best_uniform is not None and self.best[0] >= self.best_uniform[0] * (1 - margin):
            return self.best_uniform
        return self.best

    def result(self) -> SearchResult:
        """Puts the answer together.

        Raises:
            SearchError: nothing fits; names the plan that comes nearest.
        """
        if self.best is None:
            if not self.request.names_nearest:
                raise SearchError("search: nothing fits")
            raise nothing_fits(self.request, self.branches, self.cost_model)
        value, plan = self.best
        layerwise = (plan, value * plan.global_batch_size)
        uniform = None
        if self.best_uniform is not None:
            uniform = (self.best_uniform[1], self.best_uniform[0] * self.best_uniform[1].global_batch_size)
        value, plan = self.chosen()
        cost = evaluate(plan, self.cost_model)
        seconds = cost.step_seconds + self.outside
        return SearchResult(
            plan=plan,
            step_seconds=seconds,
            stage_seconds=list(cost.stage_seconds),
            sync_seconds=list(cost.sync_seconds),
            memory_bytes=list(cost.stage_bytes),
            samples_per_second=plan.global_batch_size / seconds,
            search_seconds=time.perf_counter() - self.started,
            runners_up=[(p, v * p.global_batch_size) for v, p in self.others()[: self.request.runners_up]],
            best_uniform=uniform,
            best_layerwise=layerwise if self.request.layerwise else None,
            gap=self.gap(),
            outer_points=self.points,
            solved_points=self.solved,
        )
