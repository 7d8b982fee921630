"""Runs the schedules of the best plans event by event and chooses among them by what they then take.

The search optimises a formula for the time of a pipeline, which is exact where all stages take equally long and
an upper estimate for most others; a simulated schedule knows when every pass of every micro-batch runs.
"""

from dataclasses import replace

from galvatron_megatron.cost.estimate import TermCostModel, estimate_plan, simulate_estimate
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.search.evaluation import evaluate
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.result import SearchResult

LEAST_GAIN = 1e-3
"""Another plan must be faster by more than this fraction when simulated, or the proven one stays."""


def simulated_seconds(plan: Plan, cost_model: TermCostModel) -> float:
    """Seconds of a step by event-driven simulation of its schedule.

    Raises:
        PlanError: the plan is not one of the cost model's model.
    """
    estimate = estimate_plan(plan, cost_model)
    return simulate_estimate(estimate, plan.micro_batches).step_seconds + estimate.overhead_seconds


def rerank(result: SearchResult, request: SearchRequest, cost_model: TermCostModel) -> SearchResult:
    """Chooses again among the plans that a search found, by their simulated schedules.

    A uniform plan is preferred by ``request.uniform_margin`` here as it is in the search.

    Args:
        result: of the search.
        request: what was asked.
        cost_model: the prices the search had, with their terms.

    Returns:
        The result with ``simulated``; where another plan is faster, with that one as the plan and the search's
        own among the runners-up.
    """
    found: dict[Plan, float] = {result.plan: result.step_seconds}
    for entry in (result.best_uniform, result.best_layerwise, *result.runners_up):
        if entry is not None:
            found.setdefault(*entry)
    simulated = {plan: simulated_seconds(plan, cost_model) for plan in found}
    per_sample = {plan: seconds / plan.global_batch_size for plan, seconds in simulated.items()}
    best = min(per_sample, key=per_sample.__getitem__)
    uniform = [plan for plan in per_sample if plan.is_uniform]
    if uniform and not best.is_uniform:
        steady = min(uniform, key=per_sample.__getitem__)
        if per_sample[best] >= per_sample[steady] * (1 - request.uniform_margin):
            best = steady
    result = replace(result, simulated=tuple(simulated.items()))
    is_preferred = result.plan.is_uniform or not best.is_uniform
    if best == result.plan or (is_preferred and per_sample[best] >= per_sample[result.plan] * (1 - LEAST_GAIN)):
        return result
    cost = evaluate(best, cost_model)
    others = [(plan, seconds) for plan, seconds in result.runners_up if plan != best]
    return replace(
        result,
        plan=best,
        step_seconds=found[best],
        stage_seconds=list(cost.stage_seconds),
        sync_seconds=list(cost.sync_seconds),
        memory_bytes=list(cost.stage_bytes),
        samples_per_second=best.global_batch_size / found[best],
        runners_up=[(result.plan, result.step_seconds), *others],
        searched=(result.plan, result.step_seconds),
    )
