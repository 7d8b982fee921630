"""Tables of step times of uniform GPT plans: vTrain's and those of the Megatron papers."""

from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.records.values import MeasuredRun, RowReader, gpt_layer, uniform_plan
from galvatron_megatron.describe.model import Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

_SIZES = ("hidden", "heads", "layers", "seq", "tp", "pp", "gpus", "global_batch", "micro_batch")
VTRAIN_COLUMNS = frozenset((*_SIZES, "dp", "iter_ms"))
PAPER_COLUMNS = frozenset((*_SIZES, "vocab", "vpp", "recompute", "iter_s"))
_GPT2_VOCABULARY = 50257


def _dense_gpt(reader: RowReader, vocabulary: int) -> Model:
    """GPT as Megatron built it in 2021-22: fp16, dropout 0.1, learned positions, unfused attention."""
    hidden = reader.integer("hidden")
    layer = gpt_layer(hidden, reader.integer("heads"))
    return Model(
        name=f"gpt-{reader.integer('layers')}x{hidden}",
        hidden_size=hidden,
        seq_length=reader.integer("seq"),
        vocab_size=vocabulary,
        layers=(layer,) * reader.integer("layers"),
        precision="fp16",
        hidden_dropout=0.1,
        attention_dropout=0.1,
        fused_attention=False,
    )


def vtrain_run(reader: RowReader) -> MeasuredRun:
    """A row of vTrain's ground truth: Megatron-DeepSpeed, 1F1B, fp16 gradients.

    DeepSpeed's pipeline engine cuts what it sends over the tensor-parallel group (``is_pipe_partitioned``). The
    models on many nodes only fit with full recomputation. Those on one node ran without: one more sample cost a
    layer of hidden size 2048 at tp 1 1.88 ms, in which recomputation (447 GFLOP) would take 95 % of the
    device's peak beside memory traffic at full bandwidth; without it (335 GFLOP) that is 66 %.
    """
    model = _dense_gpt(reader, _GPT2_VOCABULARY)
    tp, dp, pp, micro = (reader.integer(name) for name in ("tp", "dp", "pp", "micro_batch"))
    gpus, batch = reader.integer("gpus"), reader.integer("global_batch")
    if tp * dp * pp != gpus or batch % (dp * micro):
        raise DescriptionError(
            f"row {reader.number}: tp {tp} x dp {dp} x pp {pp} on {gpus} devices, batch {batch} of {micro}; "
            "valid: degrees whose product is the devices and whose dp x micro_batch divides the batch"
        )
    strategy = Strategy(tp=tp, dp=dp, recompute=Recompute.FULL if gpus > 8 else Recompute.NONE)
    return MeasuredRun(
        row=reader.number,
        label=f"{model.name} tp{tp} dp{dp} pp{pp} micro-batch {micro} batch {batch}",
        cluster="vtrain-multi" if gpus > 8 else "vtrain-single",
        nodes=max(1, gpus // 8),
        model=model,
        plan=uniform_plan(model, strategy, pp=pp, micro_batch_size=micro, micro_batches=batch // (dp * micro)),
        options=RunOptions(gradients_in_fp32=False, scatter_gather_sends=True),
        step_seconds=reader.number_of("iter_ms") / 1e3,
        group=f"{model.name} on {gpus} devices, batch {batch}",
    )


def paper_run(reader: RowReader) -> MeasuredRun:
    """A row of arXiv 2205.05198, tables 3 to 5: interleaved 1F1B, with and without sequence parallelism."""
    model = _dense_gpt(reader, reader.integer("vocab"))
    tp, pp, virtual = (reader.integer(name) for name in ("tp", "pp", "vpp"))
    gpus, batch, micro = (reader.integer(name) for name in ("gpus", "global_batch", "micro_batch"))
    dp = gpus // (tp * pp)
    strategy = Strategy(
        tp=tp,
        dp=dp,
        sequence_parallel=SequenceParallel.MEGATRON
        if reader.flag("sequence_parallel")
        else SequenceParallel.NONE,
        recompute=Recompute(reader.text("recompute")),
    )
    return MeasuredRun(
        row=reader.number,
        label=f"{reader.text('model')} {strategy} pp{pp} x{virtual}",
        cluster="selene",
        nodes=max(1, gpus // 8),
        model=model,
        plan=uniform_plan(
            model,
            strategy,
            pp=pp,
            micro_batch_size=micro,
            micro_batches=batch // (dp * micro),
            virtual_stages=virtual,
        ),
        options=RunOptions(gradients_in_fp32=False, scatter_gather_sends=True),
        step_seconds=reader.number_of("iter_s"),
        group=f"{reader.text('model')}",
    )
