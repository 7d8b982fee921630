"""Megatron-LM's functional-test records: memory of the last rank under many flags."""

from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.records.values import MeasuredRun, RowReader, even_split, gpt_layer, uniform_plan
from galvatron_megatron.describe.model import Experts, Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

COLUMNS = frozenset(
    ("case", "tag", "gpu", "mem_max_gib", "num-layers", "tensor-model-parallel-size", "recompute-granularity")
)
_GPT2_VOCABULARY = 50257
_DEVICES = 8
_BOARD_DEVICES = 4
"""Devices of the one-node GB200 jobs."""

_OUTSIDE = {
    "use-megatron-fsdp": "Megatron-FSDP keeps its own buffers",
    "use-torch-fsdp2": "FSDP2 keeps its own buffers",
    "fp8-format": "fp8 keeps scaled copies of weights and activations",
    "multi-latent-attention": "multi-latent attention with flags that the record leaves out",
    "cuda-graph-impl": "captured graphs own their memory",
    "pipeline-model-parallel-layout": "a layout with embedding and loss as stages of their own",
}
_OUTSIDE_NAMES = {
    "frozen": "a reference run of frozen older software",
    "distill": "a teacher model beside the one trained",
    "muon": "another optimizer than Adam",
    "offload": "activations or states offloaded to the host",
    "precision_aware": "optimizer states in another precision",
    "mup": "flags that the record leaves out",
    "inference": "no training",
    "grpo": "no training alone",
    "release": "a release run whose number of devices the record leaves out",
    "_reshard_": "resumed with other degrees than the recorded ones",
    "defer_embedding_wgrad": "inputs of the output layer kept for a deferred gradient",
}


def golden_run(reader: RowReader) -> MeasuredRun:
    """A record; its memory is that of the last rank, the largest that the allocator gave out.

    What the record leaves out is read from the test's name (``rope``, ``disable_bias_linear``, ``1node``) and
    from Megatron's defaults for the small test model (dropout 0.1, GPT-2's vocabulary, eight devices).

    Raises:
        DescriptionError: the row cannot be read, or why it cannot be predicted.
    """
    case, tag = reader.text("case"), reader.text("tag")
    if reader.flag("account-for-embedding-in-pipeline-split"):
        raise DescriptionError("embedding and loss count as layers: a plan has no stage without a layer")
    doubt = _doubt(reader, case)
    if doubt:
        # What the record leaves out may well be a degree, without which there is no plan.
        raise DescriptionError(doubt)
    tp, cp, pp = (
        reader.integer(f"{name}-parallel-size", 1) for name in ("tensor-model", "context", "pipeline-model")
    )
    devices = _BOARD_DEVICES if "1node" in case else _DEVICES
    dp = max(1, devices // (tp * cp * pp))
    layers, hidden = reader.integer("num-layers", 1), reader.integer("hidden-size", 1)
    small = hidden <= 1024
    experts = reader.integer("num-experts", 0)
    # Megatron's grouped experts have no biases, and so no test with experts has any.
    bias = "disable_bias_linear" not in case and small and not experts
    gated = reader.flag("swiglu")
    ffn = reader.integer("ffn-hidden-size", int(hidden * 8 / 3 / 64) * 64 if gated else 4 * hidden)
    heads = reader.integer("num-attention-heads", 1)
    local = reader.text("transformer-impl") == "local"
    model = Model(
        name=f"gpt-{layers}x{hidden}",
        hidden_size=hidden,
        seq_length=reader.integer("seq-length", 1),
        vocab_size=reader.integer("vocab-size", _GPT2_VOCABULARY if small else 256000),
        layers=(
            gpt_layer(
                hidden,
                heads,
                groups=reader.integer("num-query-groups", heads),
                ffn=ffn,
                gated=gated,
                bias=bias,
                experts=_experts(reader, experts, ffn, gated=gated) if experts else None,
            ),
        )
        * layers,
        position_embedding="rope" if "rope" in case or not small else "learned_absolute",
        tied_embeddings=not reader.flag("untie-embeddings-and-output-weights"),
        precision="fp16" if reader.flag("fp16") else "bf16" if reader.flag("bf16") else "fp32",
        hidden_dropout=0.1,
        attention_dropout=0.1,
        fused_attention=not local and _fused_attention(case, tag, small=small, cp=cp, experts=experts > 0),
    )
    recompute = reader.text("recompute-granularity")
    if reader.flag("recompute-activations"):
        recompute = "selective"
    strategy = Strategy(
        tp=tp,
        cp=cp,
        dp=dp,
        zero=1 if reader.flag("use-distributed-optimizer") else 0,
        sequence_parallel=(
            SequenceParallel.MEGATRON if tp > 1 and reader.flag("sequence-parallel") else SequenceParallel.NONE
        ),
        recompute=Recompute(recompute or "none"),
        expert_parallel=reader.integer("expert-model-parallel-size", 1) if experts else 1,
        expert_tensor_parallel=reader.integer("expert-tensor-parallel-size", tp) if experts else None,
    )
    micro = reader.integer("micro-batch-size", 1)
    split, virtual = _stages(reader, layers, pp)
    plan = uniform_plan(
        model,
        strategy,
        pp=pp,
        micro_batch_size=micro,
        micro_batches=max(1, reader.integer("global-batch-size", micro * dp) // (micro * dp)),
        virtual_stages=virtual,
        split=split,
    )
    return MeasuredRun(
        row=reader.number,
        label=f"{case} ({tag})",
        cluster="golden",
        nodes=1,
        model=model,
        plan=plan,
        options=RunOptions(
            gradients_in_fp32=model.precision == "bf16",
            optimizer_instances=reader.integer("num-distributed-optimizer-instances", 1),
        ),
        peak_bytes=((pp - 1, int(reader.number_of("mem_max_gib") * 2**30)),),
    )


def _experts(reader: RowReader, count: int, ffn: int, *, gated: bool) -> Experts:
    return Experts(
        count=count,
        top_k=reader.integer("moe-router-topk", 2),
        ffn_hidden_size=reader.integer("moe-ffn-hidden-size", ffn),
        shared_ffn_hidden_size=int(reader.text("moe-shared-expert-intermediate-size") or 0),
        gated=gated,
        dispatcher=reader.text("moe-token-dispatcher-type") or "allgather",
    )


def _fused_attention(case: str, tag: str, *, small: bool, cp: int, experts: bool) -> bool:
    """Whether Transformer Engine ran a fused kernel, which the records do not say.

    Deterministic mode with attention dropout ruled fused kernels out in the older containers (``dracooci``) and
    in the older tests (those that do not resume); context parallelism works with fused kernels alone. The
    records of experts in the container ``lts`` are older than the others of that container.
    """
    older = "dracooci" in tag or (experts and tag.startswith("lts"))
    return not small or cp > 1 or ("resume" in case and not older)


def _stages(reader: RowReader, layers: int, pp: int) -> tuple[tuple[int, ...] | None, int]:
    """Layers of every virtual stage (None: evenly) and how many virtual stages a rank has."""
    per_stage = reader.text("num-layers-per-virtual-pipeline-stage")
    virtual = reader.integer("num-virtual-stages-per-pipeline-rank", 1)
    if per_stage:
        virtual = max(1, layers // pp // int(per_stage))
    if pp == 1:
        virtual = 1
    first = reader.text("decoder-first-pipeline-num-layers")
    last = reader.text("decoder-last-pipeline-num-layers")
    if first and last and pp > 2:
        middle = even_split(layers - int(first) - int(last), pp - 2)
        return (int(first), *middle, int(last)), 1
    return None, virtual


def _doubt(reader: RowReader, case: str) -> str:
    if not reader.text("num-layers") or not reader.text("micro-batch-size"):
        return "the record does not say how large the model or batch is"
    for column, reason in _OUTSIDE.items():
        if reader.text(column) not in ("", "false"):
            return reason
    if reader.text("kind") not in ("", "gpt", "moe", "mixtral"):
        return f"a {reader.text('kind')} model whose layers the record does not describe"
    if reader.text("recompute-granularity") == "selective" and reader.text("recompute-modules"):
        return "recomputed modules that a plan cannot name"
    for word, reason in _OUTSIDE_NAMES.items():
        if word in case:
            return reason
    return ""
