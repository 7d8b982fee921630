"""Why the chosen plan is what it is: the binding constraint, and what more memory, nodes or bandwidth
would bring."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
    answers = tuple(_WhatIfs(result, cases).answers())
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


class _WhatIfs:
    """Searches that do not depend on each other, one to a core.

    Args:
        result: what the answers are compared with.
        cases: (what is changed, request, cost model).
    """

    def __init__(self, result: SearchResult, cases: Sequence[tuple[str, SearchRequest, CostModel]]) -> None:
        self.result, self.cases = result, cases

    def answers(self) -> list[WhatIf]:
        """The answers in the order of the cases.

        Raises:
            SearchError: a process that searched was ended from outside.
        """
        cores = min(len(self.cases), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        if cores < 2 or "fork" not in multiprocessing.get_all_start_methods():
            return [self(index) for index in range(len(self.cases))]
        # Forked processes share the prices that are known already; what starts anew would price all again.
        context = multiprocessing.get_context("fork")
        try:
            with ProcessPoolExecutor(cores, context, initializer=_answer_for, initargs=(self,)) as pool:
                return list(pool.map(_answer, range(len(self.cases))))
        except BrokenProcessPool:
            raise SearchError(
                "explanation: a process that searched was ended from outside, perhaps for want of memory; "
                "valid: taskset -c 0, to search on one core"
            ) from None

    def __call__(self, index: int) -> WhatIf:
        """The answer to one case."""
        change, request, cost_model = self.cases[index]
        try:
            found = search(replace(request, runners_up=0), cost_model)
        except SearchError:
            return WhatIf(change=change, plan=None, samples_per_second=0.0, gain=-1.0)
        return WhatIf(
            change=change,
            plan=found.plan,
            samples_per_second=found.samples_per_second,
            gain=found.samples_per_second / self.result.samples_per_second - 1,
        )


_asked: _WhatIfs | None = None
"""In a forked process: what it answers."""


def _answer_for(asked: _WhatIfs) -> None:
    global _asked
    _asked = asked


def _answer(index: int) -> WhatIf:
    return _asked(index)
