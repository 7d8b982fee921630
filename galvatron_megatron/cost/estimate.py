"""The estimate of one plan: step time and peak memory per pipeline rank, term by term."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.objective import live_micro_batches, step_seconds
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.cost.schedule import ChunkWork, ScheduleKind, Simulation, simulate
from galvatron_megatron.cost.terms import PricedLayer, Term
from galvatron_megatron.describe.model import Layer
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Strategy

TermCostModel = AnalyticCostModel | MeasuredCostModel
"""A cost model that also gives the terms of its prices."""

Totals = dict[tuple[str, str], float]
"""(name, source) of a term -> its sum."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ChunkEstimate:
    """One virtual pipeline stage: the work of one micro-batch."""

    forward_seconds: float
    backward_seconds: float
    send_seconds: float
    """Exposed send to the next stage and of the gradient back; zero behind the last stage."""
    activation_bytes: int = 0
    """Of one live micro-batch."""
    transient_bytes: int = 0

    @property
    def seconds(self) -> float:
        """What the objective counts for the chunk."""
        return self.forward_seconds + self.backward_seconds + self.send_seconds


@dataclass(kw_only=True, frozen=True, slots=True)
class StageEstimate:
    """One pipeline rank."""

    chunks: tuple[ChunkEstimate, ...]
    sync_seconds: float
    state_bytes: int
    activation_bytes: int
    """Of all live micro-batches."""
    transient_bytes: int
    overhead_bytes: int
    slack_bytes: int
    """Allocator rounding and fragmentation, part of the activations and the transient."""
    context_bytes: int
    """Outside the allocator, part of the overhead."""
    micro_batch_totals: Totals
    """Seconds of one micro-batch."""
    sync_totals: Totals
    """Seconds once per step."""
    memory_totals: Totals
    """Bytes; they add up to ``peak_bytes``."""

    @property
    def micro_batch_terms(self) -> tuple[Term, ...]:
        """Seconds of one micro-batch by name."""
        return _terms(self.micro_batch_totals)

    @property
    def sync_terms(self) -> tuple[Term, ...]:
        """Seconds once per step by name."""
        return _terms(self.sync_totals)

    @property
    def memory_terms(self) -> tuple[Term, ...]:
        """Bytes by name; they add up to ``peak_bytes``."""
        return _terms(self.memory_totals)

    @property
    def seconds(self) -> float:
        """Seconds of one micro-batch over all chunks: t_p of the objective."""
        return sum(chunk.seconds for chunk in self.chunks)

    @property
    def peak_bytes(self) -> int:
        """Peak memory of a rank."""
        return self.state_bytes + self.activation_bytes + self.transient_bytes + self.overhead_bytes

    @property
    def allocated_bytes(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` shows: the peak without slack and context."""
        return self.peak_bytes - self.slack_bytes - self.context_bytes


@dataclass(kw_only=True, frozen=True, slots=True)
class Estimate:
    """Prediction for one plan."""

    step_seconds: float
    """By the objective's formula, with what is paid outside all layers."""
    pipeline_seconds: float
    """Part of it in which micro-batches run."""
    bubble_seconds: float
    """Part of ``pipeline_seconds`` in which the slowest pipeline rank waits."""
    sync_seconds: float
    overhead_seconds: float
    stages: tuple[StageEstimate, ...]
    tokens_per_step: int
    model_flops: float
    """FLOPs of one step of all ranks without recomputation, causal attention counted half."""
    world_size: int
    peak_flops: float
    """Of one device."""

    @property
    def tokens_per_second_per_device(self) -> float:
        """Throughput."""
        return self.tokens_per_step / self.step_seconds / self.world_size

    @property
    def model_flops_utilization(self) -> float:
        """MFU: useful operations over what the devices could do in the same time."""
        return self.model_flops / (self.step_seconds * self.peak_flops * self.world_size)

    @property
    def peak_bytes(self) -> int:
        """Memory of the fullest pipeline rank."""
        return max(stage.peak_bytes for stage in self.stages)


def estimate_plan(plan: Plan, costs: TermCostModel) -> Estimate:
    """Predicts step time and memory of a plan with the formulas the search optimises.

    Args:
        plan: what to price.
        costs: for the plan's model and cluster.

    Returns:
        The prediction.

    Raises:
        PlanError: the plan has another number of layers than the model.
    """
    if len(plan.layers) != len(costs.model.layers):
        raise PlanError(
            f"plan: {len(plan.layers)} layers; valid: the {len(costs.model.layers)} of model {costs.model.name}"
        )
    setting = Setting.of(plan)
    starts = [0]
    for stage in plan.stages:
        starts.append(starts[-1] + len(stage.layers))
    stages = tuple(_stage(plan, costs, setting, position, starts) for position in range(plan.pp))
    sync = max(stage.sync_seconds for stage in stages)
    overhead = costs.step_overhead_seconds()
    pipeline = step_seconds([stage.seconds for stage in stages], [0.0], plan.micro_batches, plan.virtual_stages)
    slowest = max(stage.seconds for stage in stages)
    return Estimate(
        step_seconds=pipeline + sync + overhead,
        pipeline_seconds=pipeline,
        bubble_seconds=pipeline - plan.micro_batches * slowest,
        sync_seconds=sync,
        overhead_seconds=overhead,
        stages=stages,
        tokens_per_step=plan.global_batch_size * costs.model.seq_length,
        model_flops=costs.flops_per_sample() * plan.global_batch_size,
        world_size=plan.world_size,
        peak_flops=costs.cluster.device.peak_flops(costs.model.precision),
    )


@dataclass(slots=True)
class _Sums:
    """Adds up the parts of one pipeline rank."""

    forward: float = 0.0
    backward: float = 0.0
    chunk_activation: int = 0
    chunk_transient: int = 0
    resharding: Totals = field(default_factory=dict)
    sends: float = 0.0
    sync: float = 0.0
    state: int = 0
    activation: int = 0
    slack: int = 0
    transient: int = 0
    time_totals: Totals = field(default_factory=dict)
    sync_totals: Totals = field(default_factory=dict)
    memory_totals: Totals = field(default_factory=dict)

    def start_chunk(self) -> None:
        """Starts the sums of the next chunk."""
        self.forward = self.backward = 0.0
        self.chunk_activation = self.chunk_transient = 0

    def add(self, part: PricedLayer, times: int, live: int) -> None:
        """Adds ``times`` equal layers with ``live`` micro-batches alive."""
        self.forward += times * part.forward_seconds
        self.backward += times * part.backward_seconds
        self.sync += times * part.cost.sync_seconds
        self.state += times * part.cost.state_bytes
        self.activation += times * live * part.cost.activation_bytes
        self.slack += times * live * part.slack_bytes
        self.transient = max(self.transient, part.cost.transient_bytes)
        self.chunk_activation += times * part.cost.activation_bytes
        self.chunk_transient = max(self.chunk_transient, part.cost.transient_bytes)
        _add(self.time_totals, part.micro_batch_terms, times)
        _add(self.sync_totals, part.sync_terms, times)
        _add(self.memory_totals, part.state_terms, times)
        _add(self.memory_totals, part.activation_terms, times * live)


def simulate_estimate(
    estimate: Estimate, micro_batches: int, kind: ScheduleKind = ScheduleKind.ONE_F_ONE_B
) -> Simulation:
    """Runs the schedule of an estimate event by event, to check it and to place its memory peak.

    Args:
        estimate: of a plan.
        micro_batches: of the plan.
        kind: order of passes.

    Returns:
        The simulation; its peaks are activations and transients alone, without states and overhead.
    """
    ranks = len(estimate.stages)
    chunks = [
        stage.chunks[index] for index in range(len(estimate.stages[0].chunks)) for stage in estimate.stages
    ]
    return simulate(
        [
            ChunkWork(
                forward_seconds=chunk.forward_seconds,
                backward_seconds=chunk.backward_seconds,
                send_seconds=chunk.send_seconds / 2,
                activation_bytes=chunk.activation_bytes,
                transient_bytes=chunk.transient_bytes,
            )
            for chunk in chunks
        ],
        ranks,
        micro_batches,
        sync_seconds=[stage.sync_seconds for stage in estimate.stages],
        kind=kind,
    )


def _add(totals: Totals, terms: Iterable[Term], factor: int) -> None:
    for term in terms:
        key = (term.name, term.source)
        totals[key] = totals.get(key, 0.0) + term.value * factor


def _terms(totals: Totals) -> tuple[Term, ...]:
    """The totals as terms; zeros are left out."""
    return tuple(
        Term(name=name, source=source, value=value) for (name, source), value in totals.items() if value
    )


def _stage(
    plan: Plan, costs: TermCostModel, setting: Setting, position: int, starts: list[int]
) -> StageEstimate:
    live = live_micro_batches(plan.pp, position, plan.micro_batches, plan.virtual_stages)
    send = costs.send_seconds(setting)
    chunks: list[ChunkEstimate] = []
    sums = _Sums()
    for chunk in range(plan.virtual_stages):
        index = chunk * plan.pp + position
        last = index == len(plan.stages) - 1
        sums.start_chunk()
        if index == 0:
            sums.add(costs.priced_embedding(setting), 1, live[chunk])
        moves, before, number = [], plan.base, starts[index]
        for (_, strategy), times in _runs(plan, costs, index, starts):
            moves.append(_resharding(costs, number, before, strategy, setting))
            sums.add(costs.priced_layer(number, strategy, setting), times, live[chunk])
            before, number = strategy, number + times
        moves.append(_resharding(costs, number - 1, before, plan.base, setting))
        moved = sum(move.value for move in moves)
        if last:
            sums.add(costs.priced_head(setting), 1, live[chunk])
        chunks.append(
            ChunkEstimate(
                forward_seconds=sums.forward + moved / 2,
                backward_seconds=sums.backward + moved / 2,
                send_seconds=0.0 if last else send,
                activation_bytes=sums.chunk_activation,
                transient_bytes=sums.chunk_transient,
            )
        )
        _add(sums.resharding, moves, 1)
        sums.sends += 0.0 if last else send
    transient_slack = int(sums.transient * costs.slack_share())
    sums.time_totals |= {**sums.resharding, ("pipeline send", costs.send_source): sums.sends}
    sums.memory_totals |= {
        ("transient", "modelled"): sums.transient - transient_slack,
        ("allocator slack", "modelled"): sums.slack + transient_slack,
        ("workspaces", "modelled"): costs.workspace_bytes(),
        ("context and libraries", "modelled"): costs.context_bytes(),
    }
    return StageEstimate(
        chunks=tuple(chunks),
        sync_seconds=sums.sync,
        state_bytes=sums.state,
        activation_bytes=sums.activation,
        transient_bytes=sums.transient,
        overhead_bytes=costs.overhead_bytes(setting, position),
        slack_bytes=sums.slack + transient_slack,
        context_bytes=costs.context_bytes(),
        micro_batch_totals=sums.time_totals,
        sync_totals=sums.sync_totals,
        memory_totals=sums.memory_totals,
    )


def _resharding(costs: TermCostModel, layer: int, before: Strategy, after: Strategy, setting: Setting) -> Term:
    seconds = costs.reshard_seconds(layer, before, after, setting)
    return Term(name="resharding", value=seconds, source=costs.reshard_source(before, after))


def _runs(
    plan: Plan, costs: TermCostModel, index: int, starts: list[int]
) -> Iterator[tuple[tuple[Layer, Strategy], int]]:
    """Runs of consecutive equal layers of one virtual stage: ((layer, strategy), how many)."""
    layers = costs.model.layers[starts[index] : starts[index + 1]]
    strategies = (layer.strategy for layer in plan.stages[index].layers)
    for key, run in groupby(zip(layers, strategies, strict=True)):
        yield key, sum(1 for _ in run)
