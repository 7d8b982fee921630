"""The price of one given plan: the objective of the search, term by term from a cost model."""

import math
from dataclasses import dataclass

from galvatron_megatron.cost.objective import live_micro_batches, step_seconds
from galvatron_megatron.cost.protocol import CostModel, Setting
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.plan import Plan


@dataclass(kw_only=True, frozen=True, slots=True)
class PlanCost:
    """Price of a plan; lists have one entry per pipeline rank."""

    step_seconds: float
    stage_seconds: tuple[float, ...]
    sync_seconds: tuple[float, ...]
    stage_bytes: tuple[int, ...]

    def fits(self, memory_bytes: int) -> bool:
        """True where every rank keeps the budget."""
        return max(self.stage_bytes) <= memory_bytes


def evaluate(plan: Plan, cost_model: CostModel) -> PlanCost:
    """Prices a plan exactly as the search does.

    Args:
        plan: the plan.
        cost_model: prices of its model's layers.

    Raises:
        PlanError: a price is not a number, so that the plan has none.
    """
    setting = Setting.of(plan)
    last = plan.pp * plan.virtual_stages - 1
    seconds: list[list[float]] = [[] for _ in range(plan.pp)]
    sync: list[list[float]] = [[] for _ in range(plan.pp)]
    held = [cost_model.overhead_bytes(setting, position) for position in range(plan.pp)]
    transient = [0] * plan.pp
    live = [
        live_micro_batches(plan.pp, position, plan.micro_batches, plan.virtual_stages)
        for position in range(plan.pp)
    ]
    index = 0
    for number, stage in enumerate(plan.stages):
        position, chunk = number % plan.pp, number // plan.pp
        costs = [cost_model.embedding_cost(setting)] if number == 0 else []
        before = plan.base
        for layer in stage.layers:
            seconds[position].append(cost_model.reshard_seconds(index, before, layer.strategy, setting))
            costs.append(cost_model.layer_cost(index, layer.strategy, setting))
            before = layer.strategy
            index += 1
        seconds[position].append(cost_model.reshard_seconds(index, before, plan.base, setting))
        if number == last:
            costs.append(cost_model.head_cost(setting))
        else:
            seconds[position].append(cost_model.send_seconds(setting))
        for cost in costs:
            seconds[position].append(cost.micro_batch_seconds)
            sync[position].append(cost.sync_seconds)
            held[position] += cost.state_bytes + live[position][chunk] * cost.activation_bytes
            transient[position] = max(transient[position], cost.transient_bytes)
    stage_seconds = tuple(math.fsum(parts) for parts in seconds)
    sync_seconds = tuple(math.fsum(parts) for parts in sync)
    total = step_seconds(stage_seconds, sync_seconds, plan.micro_batches, plan.virtual_stages)
    if not math.isfinite(total):
        raise PlanError("plan: its predicted time is not a finite number; valid: finite prices for every layer")
    return PlanCost(
        step_seconds=total,
        stage_seconds=stage_seconds,
        sync_seconds=sync_seconds,
        stage_bytes=tuple(int(a) + int(b) for a, b in zip(held, transient, strict=True)),
    )


def step_overhead_seconds(cost_model: CostModel) -> float:
    """Seconds per step outside all layers, where the cost model knows them; the same for every plan."""
    outside = getattr(cost_model, "step_overhead_seconds", None)
    return 0.0 if outside is None else float(outside())
