"""The B200 table of SimuMax: Megatron-core with Transformer Engine on eight devices."""

import re

from galvatron_megatron.cost.records.values import MeasuredRun, RowReader, gpt_layer, uniform_plan
from galvatron_megatron.describe.model import Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import SequenceParallel, Strategy

COLUMNS = frozenset(("case", "model", "parallel", "mbc", "real_ms", "real_alloc_gib", "rank_alloc_gib"))
_DEVICES = 8
_DEGREES = re.compile(r"(?:^|_)(tp|pp|cp|dp)(\d+)(?=_)")


def b200_run(reader: RowReader) -> MeasuredRun:
    """A row: ZeRO-1, sequence parallelism, fused cross entropy, no recomputation, no overlap."""
    case = reader.text("case")
    degree = {name: int(value) for name, value in _DEGREES.findall(case)}
    tp, pp, cp = (degree.get(name, 1) for name in ("tp", "pp", "cp"))
    if reader.text("model") != "llama3-70b":
        raise DescriptionError(f"row {reader.number} model: {reader.text('model')!r}; valid: llama3-70b")
    length = re.search(r"seq(\d+)", case)
    model = Model(
        name="llama3-70b-12-layers",
        hidden_size=8192,
        seq_length=int(length.group(1)) if length else 4096,
        vocab_size=128256,
        layers=(gpt_layer(8192, 64, groups=8, ffn=28672, gated=True, bias=False),) * reader.integer("layers"),
        normalization="RMSNorm",
        position_embedding="rope",
        tied_embeddings=False,
    )
    strategy = Strategy(
        tp=tp,
        cp=cp,
        dp=_DEVICES // (tp * pp * cp),
        zero=1,
        sequence_parallel=SequenceParallel.MEGATRON if tp > 1 else SequenceParallel.NONE,
    )
    micro_batches = reader.integer("mbc")
    ranks = [float(value) for value in reader.text("rank_alloc_gib").split("/")]
    per_stage = len(ranks) // pp
    return MeasuredRun(
        row=reader.number,
        label=case,
        cluster="simumax-b200",
        nodes=1,
        model=model,
        plan=uniform_plan(model, strategy, pp=pp, micro_batch_size=1, micro_batches=micro_batches),
        step_seconds=reader.number_of("real_ms") / 1e3,
        peak_bytes=tuple(
            (stage, int(max(ranks[stage * per_stage : (stage + 1) * per_stage]) * 2**30)) for stage in range(pp)
        ),
        group=f"sequence {model.seq_length}, {micro_batches * strategy.dp} samples",
    )
