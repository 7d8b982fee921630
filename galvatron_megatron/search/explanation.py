"""Why the chosen plan is what it is: the binding constraint, and what more memory, nodes or bandwidth
would bring."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from galvatron_megatron.cost.protocol import CostModel
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.evaluation import evaluate
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.result import SearchResult

_GIB = 2**30


@dataclass(kw_only=True, frozen=True, slots=True)
class WhatIf:
    """A changed machine and the best plan for it."""

    change: str
    plan: Plan | None
    """None where the changed request has no answer."""
    samples_per_second: float
    gain: float
    """Throughput over that of the chosen plan, minus 1."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Explanation:
    """What limits the chosen plan."""

    binding: str
    """The constraint that costs most, in one sentence."""
    fullest_stage: int
    memory_use: float
    """Of the fullest stage, as a fraction of the budget."""
    ample_memory_gain: float
    """How much faster a step would be with four times the memory, as a fraction."""
    bubble: float
    """Fraction of the step in which the slowest pipeline rank waits."""
    sync: float
    """Fraction of the step spent in synchronisation and optimizer."""
    layerwise_gain: float | None
    """How much shorter the step of the best layer-wise plan is than that of the best uniform one, as a
    fraction; None where either is not known."""
    what_if: tuple[WhatIf, ...]


def explain(
    request: SearchRequest,
    cost_model: CostModel,
    result: SearchResult,
    alternatives: Sequence[tuple[str, SearchRequest, CostModel]] = (),
) -> Explanation:
    """Explains a result by searching again with one thing changed at a time.

    Args:
        request: of the result.
        cost_model: of the result.
        result: to explain.
        alternatives: (what is changed, request, cost model), e.g. for one more node or a faster link.
    """
    cost = evaluate(result.plan, cost_model)
    micro_batches = result.plan.micro_batches
    step = result.step_seconds
    fullest = max(range(len(cost.stage_bytes)), key=cost.stage_bytes.__getitem__)
    use = cost.stage_bytes[fullest] / request.memory_bytes
    sync = max(cost.sync_seconds)
    pipeline = cost.step_seconds - sync
    bubble = (pipeline - micro_batches * max(cost.stage_seconds)) / step
    cases = [
        (
            f"{_gigabytes(_GIB)} GB more memory",
            replace(request, memory_bytes=request.memory_bytes + _GIB),
            cost_model,
        ),
        ("four times the memory", replace(request, memory_bytes=request.memory_bytes * 4), cost_model),
        *alternatives,
    ]
    answers = tuple(_what_if(result, *case) for case in cases)
    ample = 1 - 1 / (1 + answers[1].gain)
    gain = None
    if result.best_uniform is not None and result.best_layerwise is not None:
        gain = 1 - result.best_layerwise[1] / result.best_uniform[1]
    shares = {
        f"memory of stage {fullest} ({use:.0%} full): ample memory would shorten a step by {ample:.1%}": ample,
        f"pipeline bubble: {bubble:.1%} of the step": bubble,
        f"synchronisation of gradients and parameters: {sync / step:.1%} of the step": sync / step,
    }
    for answer in answers[2:]:
        if "link" in answer.change:
            saved = 1 - 1 / (1 + answer.gain)
            shares[f"link: with {answer.change} a step would take {saved:.1%} less"] = saved
    return Explanation(
        binding=max(shares, key=shares.__getitem__)
        if max(shares.values()) > 0.01
        else "compute of the devices",
        fullest_stage=fullest,
        memory_use=use,
        ample_memory_gain=ample,
        bubble=bubble,
        sync=sync / step,
        layerwise_gain=gain,
        what_if=(answers[0], *answers[2:]),
    )


def _gigabytes(amount: int) -> str:
    return f"{amount / _GIB:g}"


def _what_if(result: SearchResult, change: str, request: SearchRequest, cost_model: CostModel) -> WhatIf:
    try:
        found = search(replace(request, runners_up=0), cost_model)
    except SearchError:
        return WhatIf(change=change, plan=None, samples_per_second=0.0, gain=-1.0)
    return WhatIf(
        change=change,
        plan=found.plan,
        samples_per_second=found.samples_per_second,
        gain=found.samples_per_second / result.samples_per_second - 1,
    )
