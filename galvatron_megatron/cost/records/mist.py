"""Plans cut between operators, with a degree per stage: Aceso's plans as Mist measured them on L4."""

import re
from dataclasses import dataclass

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.objective import step_seconds
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.cost.records.values import MeasuredRun, RowReader, gpt_layer
from galvatron_megatron.describe.model import Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Strategy

COLUMNS = frozenset(("size", "stages", "num_gpus", "layers", "hidden", "n_recomp", "n_ops", "meas_ms"))
_HEADS = {"1_3B": 32, "2_6B": 32, "6_7B": 32, "13B": 40, "22B": 64}
"""Attention heads by model size, from the operator profiles beside the plans (size of the score matrix)."""
_GPT2_VOCABULARY = 50257
_OPERATORS = (
    ("attention norm",),
    ("qkv projection",),
    ("attention scores",),
    ("attention softmax",),
    ("attention dropout",),
    ("attention context",),
    ("output projection",),
    ("attention residual",),
    ("mlp norm",),
    ("mlp first linear",),
    ("mlp activation",),
    ("mlp second linear",),
    ("mlp residual",),
)
"""The thirteen operators that Aceso cuts a block into, in order, and which counts belong to each."""
_ENTER = ("qkv projection", "mlp first linear")
_LEAVE = ("output projection", "mlp second linear")


@dataclass(kw_only=True, frozen=True, slots=True)
class OperatorStage:
    """A pipeline stage: consecutive operators of the model."""

    tp: int
    dp: int
    first: int
    """Index of the first operator; 0 is the embedding, the last two are final norm and head."""
    count: int
    recomputed: float
    """Fraction of its operators that are computed again."""


@dataclass(kw_only=True, frozen=True, slots=True)
class OperatorPlan:
    """A pipeline whose stages are cut between operators, each with its own degrees."""

    stages: tuple[OperatorStage, ...]
    micro_batch_size: int
    """Samples of a micro-batch over a whole stage."""
    micro_batches: int

    @property
    def world_size(self) -> int:
        """Devices."""
        return sum(stage.tp * stage.dp for stage in self.stages)

    @property
    def global_batch_size(self) -> int:
        """Samples per step."""
        return self.micro_batch_size * self.micro_batches


def _degrees(reader: RowReader, column: str) -> list[int]:
    """One degree per stage from ``2x36 | 4x56``; a stage with several degrees cannot be read."""
    degrees = []
    for stage in reader.text(column).split("|"):
        found = re.findall(r"(\d+)x\d+", stage)
        if len(found) != 1:
            raise DescriptionError(
                f"row {reader.number} column {column}: {stage.strip()!r}; valid: one degree in a stage"
            )
        degrees.append(int(found[0]))
    return degrees


def mist_run(reader: RowReader) -> MeasuredRun:
    """A row: fp16 GPT with dropout and unfused attention, 1F1B, part of the operators recomputed."""
    hidden, layers, size = reader.integer("hidden"), reader.integer("layers"), reader.text("size")
    if size not in _HEADS:
        raise DescriptionError(f"row {reader.number} size: {size!r}; valid: {', '.join(_HEADS)}")
    counts = [int(count) for count in reader.text("n_ops").split("/")]
    again = [int(count) for count in reader.text("n_recomp").split("/")]
    tps, dps = _degrees(reader, "tp"), _degrees(reader, "dp")
    expected = layers * len(_OPERATORS) + 3
    if sum(counts) != expected or not len(counts) == len(again) == len(tps) == len(dps):
        raise DescriptionError(f"row {reader.number} n_ops: {sum(counts)} operators; valid: {expected}")
    stages, first = [], 0
    for count, repeated, tp, dp in zip(counts, again, tps, dps, strict=True):
        stages.append(OperatorStage(tp=tp, dp=dp, first=first, count=count, recomputed=repeated / count))
        first += count
    model = Model(
        name=f"gpt-{size}",
        hidden_size=hidden,
        seq_length=reader.integer("seq"),
        vocab_size=_GPT2_VOCABULARY,
        layers=(gpt_layer(hidden, _HEADS[size]),) * layers,
        precision="fp16",
        hidden_dropout=0.1,
        attention_dropout=0.1,
        fused_attention=False,
    )
    micro = reader.integer("mbs")
    plan = OperatorPlan(
        stages=tuple(stages), micro_batch_size=micro, micro_batches=reader.integer("gbs") // micro
    )
    return MeasuredRun(
        row=reader.number,
        label=reader.text("name"),
        cluster="mist-l4",
        nodes=-(-plan.world_size // 8),
        model=model,
        plan=plan,
        step_seconds=reader.number_of("meas_ms") / 1e3,
        group=f"{model.name} on {plan.world_size} devices",
    )


def operator_plan_prediction(
    plan: OperatorPlan, costs: AnalyticCostModel
) -> tuple[float, tuple[tuple[int, int], ...]]:
    """Step time of an operator plan by the one objective; memory is not predicted.

    Args:
        plan: the stages.
        costs: for the plan's model and cluster.

    Returns:
        (seconds, no memory).
    """
    stage_seconds, sync_seconds = [], []
    layers = len(costs.model.layers)
    last = layers * len(_OPERATORS) + 1
    for position, stage in enumerate(plan.stages):
        strategy = Strategy(tp=stage.tp, dp=stage.dp)
        setting = Setting(
            pp=len(plan.stages),
            virtual_stages=1,
            micro_batch_size=plan.micro_batch_size // stage.dp,
            micro_batches=plan.micro_batches,
            base=strategy,
        )
        operators = costs.operator_seconds(0, strategy, setting)
        priced = costs.priced_layer(0, strategy, setting)
        forward = backward = sync = 0.0
        for number in range(stage.first, stage.first + stage.count):
            if number == 0:
                ends = costs.priced_embedding(setting)
            elif number == last:
                continue  # The final norm is part of the head's price.
            elif number > last:
                ends = costs.priced_head(setting)
            else:
                names = _OPERATORS[(number - 1) % len(_OPERATORS)]
                share = [operators[name] for name in names]
                forward += sum(pair[0] for pair in share)
                backward += sum(pair[1] for pair in share)
                sync += priced.cost.sync_seconds / len(_OPERATORS)
                continue
            forward += ends.forward_seconds
            backward += ends.backward_seconds
            sync += ends.cost.sync_seconds
        send = costs.send_seconds(setting) if position + 1 < len(plan.stages) else 0.0
        stage_seconds.append(forward * (1 + stage.recomputed) + backward + send)
        sync_seconds.append(sync)
    seconds = step_seconds(stage_seconds, sync_seconds, plan.micro_batches) + costs.step_overhead_seconds()
    return seconds, ()
