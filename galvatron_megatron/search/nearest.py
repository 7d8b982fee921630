"""When nothing fits: the plan that comes nearest, and what it lacks."""

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from galvatron_megatron.cost.protocol import CostModel
from galvatron_megatron.errors import GalvatronError, SearchError
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Strategy
from galvatron_megatron.search.branch import Branch
from galvatron_megatron.search.chain import BOUNDARY
from galvatron_megatron.search.decision_tree import Space
from galvatron_megatron.search.evaluation import evaluate
from galvatron_megatron.search.layer_dp import Assignment
from galvatron_megatron.search.positions import Partition
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.stage_partition import PipelineProblem

_GIB = 2**30


class NothingFitsError(SearchError):
    """No plan keeps the memory budget.

    Attributes:
        nearest_plan: the plan whose fullest stage lacks least.
        needed_bytes: memory it needs on a device.
    """

    def __init__(self, message: str, nearest_plan: Plan, needed_bytes: int) -> None:
        super().__init__(message)
        self.nearest_plan = nearest_plan
        self.needed_bytes = needed_bytes


def smallest_plan(branches: Sequence[Branch], cost_model: CostModel) -> tuple[Plan, int] | None:
    """The plan whose fullest rank needs the least memory, and its bytes; None where there is no plan at all.

    In every setting each layer takes the strategy of least bytes and the stages are cut so that the fullest is
    least full. Only the largest transient of a stage is left out of that choice (both ways of counting it are
    tried), so that the answer can be a little larger than the true minimum, never smaller.
    """
    best: tuple[Plan, int] | None = None
    for branch in branches:
        for virtual in branch.virtual_stages:
            for base in branch.bases:
                for with_transient in (False, True):
                    plan = _smallest_in_setting(branch, virtual, base, with_transient)
                    if plan is not None:
                        needed = max(evaluate(plan, cost_model).stage_bytes)
                        if best is None or needed < best[1]:
                            best = (plan, needed)
    return best


def _smallest_in_setting(branch: Branch, virtual: int, base: Strategy, with_transient: bool) -> Plan | None:
    live, positions = branch.positions(virtual, base)
    options = {}
    for key, entry in branch.options.items():
        held = entry.state + live.mean() * entry.activation + (entry.transient if with_transient else 0.0)
        options[key] = entry.take(np.array([int(held.argmin())]))
    chain, element_of = branch.chain(options, virtual, live, positions, base)
    for spans in branch.spans(virtual):
        problem = PipelineProblem(chain, spans, positions, element_of, branch.outer.micro_batches)
        if not problem.is_possible:
            continue
        cuts = problem.least_full()
        if cuts is None:
            continue
        assignments = []
        for begin, end in itertools.pairwise(cuts):
            count = sum(entry != BOUNDARY for entry in spans.sequence(begin, end))
            assignments.append(
                Assignment(seconds=0.0, sync=0.0, bytes=0.0, transient=0.0, choices=(0,) * count)
            )
        found = Partition(step_seconds=0.0, cuts=tuple(cuts), assignments=tuple(assignments))
        return branch.plan(found, spans, virtual, base, options)
    return None


def nothing_fits(request: SearchRequest, branches: Sequence[Branch], cost_model: CostModel) -> SearchError:
    """Explains an infeasible request: the nearest plan, the stage, the GB it lacks and what would make it
    fit."""
    found = smallest_plan(branches, cost_model)
    if found is None:
        return SearchError(
            f"search: no partition keeps the decisions made by hand; valid: leave free one of "
            f"{_by_hand(request.constraints)}"
        )
    plan, needed = found
    stage_bytes = evaluate(plan, cost_model).stage_bytes
    worst = int(np.argmax(stage_bytes))
    missing = (needed - request.memory_bytes) / _GIB
    strategies = ", ".join(str(strategy) for strategy in plan.strategies)
    message = (
        f"search: nothing fits {request.memory_bytes / _GIB:.2f} GB of memory; nearest is pp {plan.pp}, "
        f"{plan.micro_batches} micro-batches of {plan.micro_batch_size}, layers {strategies}: stage "
        f"{worst} needs "
        f"{needed / _GIB:.2f} GB and lacks {missing:.2f} GB; to fit: {_remedy(request, needed, cost_model)}"
    )
    return NothingFitsError(message, plan, needed)


def _remedy(request: SearchRequest, needed: int, cost_model: CostModel) -> str:
    remedies = [f"at least {needed / _GIB:.2f} GB a device", "more devices"]
    if not request.constraints.is_free:
        free = replace(
            request,
            constraints=Constraints(),
            global_batch_size=request.batch_sizes[0],
            global_batch_sizes=(),
        )
        space = Space(request=free)
        try:
            branches = [Branch(space, cost_model, outer) for outer in space.outers()]
        except GalvatronError:
            return "; or ".join(remedies)  # a table may hold prices for the decisions made by hand alone
        found = smallest_plan([branch for branch in branches if branch.is_possible], cost_model)
        if found is not None and found[1] <= request.memory_bytes:
            strategies = ", ".join(str(strategy) for strategy in found[0].strategies)
            remedies.insert(
                0, f"leave free {_by_hand(request.constraints)}: pp {found[0].pp} with {strategies} fits"
            )
    return "; or ".join(remedies)


def _by_hand(constraints: Constraints) -> str:
    fixed = ((entry.name, getattr(constraints, entry.name)) for entry in fields(constraints))
    return ", ".join(f"{name} {value}" for name, value in fixed if value is not None)
