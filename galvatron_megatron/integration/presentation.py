"""What rank 0 prints about the plan of a job."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from galvatron_megatron.integration.decision import Decision
from galvatron_megatron.plan.megatron_arguments import runs_on_stock_megatron
from galvatron_megatron.plan.plan import Plan

_RULE = "=" * 20


def plan_lines(decision: Decision, arguments: str) -> list[str]:
    """The plan and its prediction.

    Args:
        decision: the plan and what is predicted.
        arguments: Megatron's arguments for the plan, as a shell reads them.

    Returns:
        Lines to print.
    """
    plan = decision.plan
    lines = [f"{_RULE} galvatron: plan ({decision.source}) {_RULE}"]
    lines += [f"note: {note}" for note in decision.notes]
    chunks = f", {plan.virtual_stages} chunks a rank" if plan.virtual_stages > 1 else ""
    lines.append(
        f"{plan.world_size} ranks: pipeline {plan.pp}{chunks}, micro-batch {plan.micro_batch_size} x "
        f"{plan.micro_batches}, global batch {plan.global_batch_size}"
    )
    lines.append(f"embedding and head: {plan.base}")
    lines += _stage_lines(plan)
    kind = "Megatron alone" if runs_on_stock_megatron(plan) else "Megatron with a strategy per layer"
    lines.append(f"runs on: {kind}")
    lines.append(f"arguments: {arguments}")
    lines.append(_prediction(decision))
    lines += [f"next best: {_milliseconds(seconds)} {name}" for name, seconds in decision.runners_up]
    if decision.profile_seconds or decision.search_seconds:
        lines.append(
            f"measuring took {decision.profile_seconds:.1f} s, searching {decision.search_seconds:.2f} s"
        )
    lines.append(_RULE * 3)
    return lines


def measured_lines(decision: Decision, figures: Mapping[str, Any]) -> list[str]:
    """Measured figures beside the predicted ones.

    Args:
        decision: the plan and what is predicted.
        figures: as ``Measurement`` puts them together.

    Returns:
        Lines to print.
    """
    lines = [f"{_RULE} galvatron: after {figures['iterations']} iterations {_RULE}"]
    measured = figures["measured_step_seconds"]
    if measured is not None:
        text = f"step time: measured {_milliseconds(measured)}"
        if decision.step_seconds:
            off = decision.step_seconds / measured - 1
            text += f", predicted {_milliseconds(decision.step_seconds)} ({off:+.0%})"
        lines.append(text)
    for stage, peak in enumerate(figures["measured_memory_bytes"]):
        text = f"memory, pipeline rank {stage}: measured {_gib(peak)}"
        if stage < len(decision.memory_bytes):
            text += f", predicted {_gib(decision.memory_bytes[stage])}"
        lines.append(text)
    lines.append(_RULE * 3)
    return lines


def _prediction(decision: Decision) -> str:
    if decision.step_seconds is None:
        return "predicted: nothing, the plan was not searched here"
    samples = decision.plan.global_batch_size / decision.step_seconds
    memory = ", ".join(_gib(value) for value in decision.memory_bytes)
    return (
        f"predicted: {_milliseconds(decision.step_seconds)} a step ({samples:.4g} samples/s), memory {memory}"
    )


def _stage_lines(plan: Plan) -> list[str]:
    lines, first = [], 0
    for index, stage in enumerate(plan.stages):
        where = f"stage {index}" if len(plan.stages) > 1 else "layers"
        for strategy, run in groupby(layer.strategy for layer in stage.layers):
            count = len(list(run))
            span = f"{first}-{first + count - 1}" if count > 1 else f"{first}"
            lines.append(f"{where}: layer {span}: {strategy}")
            first += count
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _gib(count: float) -> str:
    return f"{count / 2**30:.3f} GiB"
