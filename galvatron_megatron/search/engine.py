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
from galvatron_megatron.search.decision_tree import Space
from galvatron_megatron.search.evaluation import evaluate
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.result import SearchResult
from galvatron_megatron.search.uniform import solve_uniform, uniform_points

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
    started = time.perf_counter()
    run = _Run(request, cost_model, progress)
    try:
        run.uniform()
        if request.layerwise:
            run.layerwise()
    except KeyboardInterrupt:
        if run.best is None:
            raise
        run.interrupted = True
    return run.result(started)


class _Run:
    def __init__(self, request: SearchRequest, cost_model: CostModel, progress) -> None:
        self.request, self.cost_model, self.progress = request, cost_model, progress
        self.space = Space(request=request)
        self.branches = [Branch(self.space, cost_model, outer) for outer in self.space.outers()]
        self.branches = [branch for branch in self.branches if branch.is_possible]
        # Steps of different batches are compared by the time of one sample.
        self.best: tuple[float, Plan] | None = None
        self.best_uniform: tuple[float, Plan] | None = None
        self.found: dict[tuple, tuple[float, Plan]] = {}
        self.open_bound = np.inf
        self.interrupted = False
        self.points = self.solved = 0

    def _keep(self, plan: Plan) -> float:
        value = evaluate(plan, self.cost_model).step_seconds / plan.global_batch_size
        if self.best is None or value < self.best[0] * (1 - _TIE):
            self.best = (value, plan)
        family = (plan.global_batch_size, plan.pp, plan.virtual_stages, plan.micro_batches, plan.base.layout)
        if family not in self.found or value < self.found[family][0]:
            self.found[family] = (value, plan)
        return value

    def uniform(self) -> None:
        """Best uniform plan."""
        points = [point for branch in self.branches for point in uniform_points(branch)]
        points.sort(key=lambda point: point.bound / point.branch.outer.global_batch_size)
        for point in points:
            batch = point.branch.outer.global_batch_size
            cutoff = np.inf if self.best_uniform is None else self.best_uniform[0] * batch
            if point.bound >= cutoff:
                break
            plan = solve_uniform(point, cutoff)
            if plan is not None:
                self.best_uniform = (self._keep(plan), plan)

    def layerwise(self) -> None:
        """Best plan of the whole space."""
        ticket = count()
        heap = []
        for branch in self.branches:
            self.points += len(branch.bases) * len(branch.virtual_stages)
            bound = branch.least_time() / branch.outer.global_batch_size
            heap.append((bound, next(ticket), branch, None, None))
        heapify(heap)
        while heap:
            bound, _, branch, virtual, base = heappop(heap)
            self.open_bound = bound
            best = np.inf if self.best is None else self.best[0]
            if bound >= best * (1 - _TIE):
                break
            batch = branch.outer.global_batch_size
            if virtual is None:
                for number in branch.virtual_stages:
                    lower = max(bound, branch.relaxed_bound(number) / batch)
                    heappush(heap, (lower, next(ticket), branch, number, None))
            elif base is None:
                for candidate in branch.useful_bases(virtual):
                    lower = branch.base_bound(bound * batch, virtual, candidate) / batch
                    heappush(heap, (lower, next(ticket), branch, virtual, candidate))
            else:
                self.solved += 1
                plan = branch.solve(virtual, base, best * batch)
                if plan is not None:
                    self._keep(plan)
        else:
            self.open_bound = np.inf

    def result(self, started: float) -> SearchResult:
        """Puts the answer together."""
        if self.best is None:
            raise SearchError(f"nothing fits {self.request.memory_bytes} bytes")
        value, plan = self.best
        layerwise = (plan, value * plan.global_batch_size)
        uniform = None
        if self.best_uniform is not None:
            uniform = (self.best_uniform[1], self.best_uniform[0] * self.best_uniform[1].global_batch_size)
            if value >= self.best_uniform[0] * (1 - max(self.request.uniform_margin, _TIE)):
                value, plan = self.best_uniform
        cost = evaluate(plan, self.cost_model)
        others = (
            sorted((v, p) for v, p in self.found.values() if p != plan)
            if False
            else sorted(((v, p) for v, p in self.found.values() if p != plan), key=lambda entry: entry[0])
        )
        gap = 0.0 if not self.interrupted else max(0.0, 1 - self.open_bound / value)
        return SearchResult(
            plan=plan,
            step_seconds=cost.step_seconds,
            memory_bytes=list(cost.stage_bytes),
            samples_per_second=plan.global_batch_size / cost.step_seconds,
            search_seconds=time.perf_counter() - started,
            runners_up=[(p, v * p.global_batch_size) for v, p in others[: self.request.runners_up]],
            best_uniform=uniform,
            best_layerwise=layerwise if self.request.layerwise else None,
            gap=gap,
            outer_points=self.points,
            solved_points=self.solved,
        )
