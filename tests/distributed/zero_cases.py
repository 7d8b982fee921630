"""Plans in which DeepSpeed's ZeRO shards layers, held against one rank of stock Megatron; no torch."""

from runtime_cases import FEWER, case

DEEPSPEED = {"late_arguments": {"galvatron_zero_backend": "deepspeed"}}
FOUR = {"micro_batches": 4}
"""Four micro-batches per step."""
OVERLAPPED = {"arguments": {"overlap-grad-reduce": True, "ddp-bucket-size": 4000}}
"""Gradients are reduced beside the backward pass, in several buckets a layer."""


def zero_case(name, model, base, *stages, **options):
    """A short run of a plan."""
    arguments = {"train-iters": FEWER, **options.pop("arguments", {})}
    return case(name, model, base, *stages, arguments=arguments, **options)


FLAT = (
    zero_case(
        "all-2",
        "modern",
        "tp1 zero2",
        ["tp1 zero2", "tp2 zero2", "tp4 zero2", "tp2+megatron zero2"],
        **OVERLAPPED,
    ),
    zero_case("all-3", "modern", "tp1 zero3", ["tp1 zero3", "tp2 zero3", "tp4 zero3", "tp2+megatron zero3"]),
    zero_case("uniform-2", "modern", "tp1 zero2", ["tp1 zero2"] * 4),
    zero_case("uniform-3", "modern", "tp2 zero3", ["tp2 zero3"] * 4, **FOUR),
    zero_case("uniform-1-deepspeed", "modern", "tp1 zero1", ["tp1 zero1"] * 4, **DEEPSPEED),
    zero_case("each-stage-split", "modern", "tp2", ["tp2 zero3", "tp2 zero2", "tp2 zero1", "tp2"], **FOUR),
    zero_case("base-2", "modern", "tp4 zero2", ["tp1 zero1", "tp2", "tp4 zero3", "tp1 zero2"]),
    zero_case("base-3", "modern", "tp2 zero3", ["tp4 zero1", "tp2", "tp4 zero3", "tp2 zero2"], **FOUR),
    zero_case(
        "slices-2",
        "modern",
        "tp2+megatron zero2",
        ["tp2+megatron zero2", "tp4+megatron zero2", "tp2 zero2", "tp2+megatron zero3"],
        **FOUR,
    ),
    zero_case(
        "slices-3",
        "classic",
        "tp2+megatron zero3",
        ["tp2+megatron zero3", "tp4+megatron zero3", "tp2 zero3", "tp2+megatron"],
        **FOUR,
    ),
    zero_case(
        "ulysses-3", "modern", "tp2", ["tp2+ulysses zero3", "tp4 zero3", "tp4+ulysses zero2", "tp2"], **FOUR
    ),
    zero_case("tied-2", "classic", "tp1 zero2", ["tp1", "tp2 zero2", "tp2+megatron zero3", "tp1 zero1"]),
    zero_case("uniform-tied-3", "classic", "tp1 zero3", ["tp1 zero3"] * 4),
    zero_case("tied-3", "classic", "tp1 zero3", ["tp1 zero3", "tp2 zero2", "tp4 zero3", "tp1"]),
    zero_case(
        "grouped-3",
        "grouped",
        "tp2 zero3",
        ["tp2 zero3", "tp4+megatron zero3", "tp2+megatron zero2", "tp2"],
        **FOUR,
    ),
    zero_case(
        "recomputed-2",
        "modern",
        "tp2 zero2",
        ["tp2 zero2 recompute-full", "tp4 zero2 recompute-selective", "tp2 zero2", "tp2"],
        **FOUR,
    ),
    zero_case(
        "recomputed-3",
        "modern",
        "tp2 zero3",
        ["tp2 zero3 recompute-full", "tp2 zero3 recompute-full", "tp4 zero3 recompute-selective", "tp2 zero3"],
        **OVERLAPPED,
        **FOUR,
    ),
    zero_case("token-loss", "token-loss", "tp2 zero2", ["tp2 zero3", "tp2 zero2", "tp4", "tp2 zero3"], **FOUR),
    zero_case("deepspeed-1", "modern", "tp1", ["tp1 zero1", "tp2 zero1", "tp1 zero2", "tp2"], **DEEPSPEED),
    zero_case(
        "small-buckets",
        "modern",
        "tp1 zero2",
        ["tp1 zero2", "tp2 zero3", "tp1", "tp2 zero2"],
        arguments={"ddp-bucket-size": 500, "overlap-grad-reduce": True},
    ),
    zero_case(
        "hybrid-2", "hybrid", "tp2 zero2", ["tp2 zero2", "tp4 zero2", "tp2+megatron zero3", "tp2"], **FOUR
    ),
    zero_case(
        "offload",
        "modern",
        "tp2 zero1 offload-optimizer",
        [
            "tp2 zero3 offload-parameters recompute-full",
            "tp4 zero2 offload-optimizer",
            "tp2+megatron zero3 offload-optimizer",
            "tp2 zero1 offload-optimizer",
        ],
        **FOUR,
    ),
    zero_case("hybrid-3", "hybrid", "tp1 zero3", ["tp1 zero3", "tp2 zero3", "tp1", "tp2 zero2"]),
)
PIPELINES = (
    zero_case(
        "pipeline-2", "modern", "tp1 zero2", ["tp1 zero2", "tp2 zero2"], ["tp2 zero2", "tp1"], pp=2, **FOUR
    ),
    zero_case(
        "pipeline-3",
        "modern",
        "tp2 zero3",
        ["tp1 zero3", "tp2 zero3"],
        ["tp2 zero3", "tp1"],
        pp=2,
        **OVERLAPPED,
        **FOUR,
    ),
    zero_case(
        "pipeline-apart", "modern", "tp1", ["tp1 zero3", "tp2 zero3"], ["tp2", "tp1 zero2"], pp=2, **FOUR
    ),
    zero_case(
        "pipeline-uneven", "modern", "tp2", ["tp1 zero3"], ["tp2 zero2", "tp1 zero3", "tp1"], pp=2, **FOUR
    ),
    zero_case(
        "pipeline-recomputed",
        "modern",
        "tp1 zero2",
        ["tp1 zero3 recompute-full", "tp2 zero3"],
        ["tp1 zero2 recompute-full", "tp1 zero3 recompute-full"],
        pp=2,
        **FOUR,
    ),
    zero_case(
        "pipeline-tied-2", "classic", "tp1 zero2", ["tp1 zero2", "tp2"], ["tp1 zero2", "tp1"], pp=2, **FOUR
    ),
    zero_case(
        "pipeline-tied-3",
        "classic",
        "tp2+megatron zero3",
        ["tp1 zero3", "tp2+megatron zero2"],
        ["tp2+megatron", "tp1"],
        pp=2,
        **FOUR,
    ),
    zero_case(
        "pipeline-tied-offload",
        "classic",
        "tp1 zero3 offload-parameters",
        ["tp2+megatron zero2 offload-optimizer", "tp1 zero3"],
        ["tp1 zero1", "tp2 zero3 offload-optimizer"],
        pp=2,
        **FOUR,
    ),
    zero_case(
        "interleaved-2",
        "modern",
        "tp1 zero2",
        *(["tp1 zero2"], ["tp2 zero2"], ["tp1"], ["tp1 zero2"]),
        pp=2,
        virtual=2,
        **FOUR,
    ),
    zero_case(
        "interleaved-3",
        "classic",
        "tp2 zero2",
        *(["tp1 zero3"], ["tp2 zero3"], ["tp2+megatron zero3"], ["tp1 zero2"]),
        pp=2,
        virtual=2,
        **FOUR,
    ),
)
PLANS = FLAT + PIPELINES
HALF = (
    case(
        "fp16-offload",
        "fp16",
        "tp4 zero2 offload-optimizer",
        ["tp2 zero3 offload-parameters", "tp1", "tp4", "tp2"],
    ),
    case("bf16-2-3", "bf16", "tp1 zero2", ["tp1 zero2", "tp2 zero3", "tp4", "tp2+megatron zero2"]),
    case(
        "bf16-pipeline",
        "bf16",
        "tp1 zero3",
        ["tp1 zero3", "tp2 zero2"],
        ["tp2 zero3", "tp1 zero2"],
        pp=2,
        **FOUR,
    ),
    case("fp16-2-3", "fp16", "tp4 zero2", ["tp4+megatron zero3", "tp1", "tp4+megatron zero2", "tp2 zero3"]),
)

EVALUATED = {"eval-iters": 2, "eval-interval": 4}


def skipping_case(name, base, *stages, **options):
    """fp16 with tied embeddings: the first steps overflow, a later one in one gradient, and the scale grows."""
    half = {"fp16": True, "initial-loss-scale": 2**19, "loss-scale-window": 3, "train-iters": 8}
    arguments = half | options.pop("arguments", {})
    options = {"pp": 2, "micro_batch": 1, "mutation": "last_stage_overflows"} | options
    return case(name, "classic", base, *stages, arguments=arguments, **options)


SKIPPING_STOCK = skipping_case("stock", "tp1", ["tp1"] * 2, ["tp1"] * 2, detached=True, arguments=EVALUATED)
"""What stock Megatron makes of it, on as many ranks and with micro-batches as large."""
SKIPPING = (
    skipping_case(
        "pipeline",
        "tp1 zero2",
        ["tp1 zero3", "tp2+megatron zero2"],
        ["tp2 zero3", "tp1 zero2"],
        arguments=EVALUATED,
    ),
    skipping_case(
        "interleaved",
        "tp1 zero3",
        *(["tp1 zero3"], ["tp2 zero3"], ["tp2+megatron zero2"], ["tp1 zero3"]),
        virtual=2,
    ),
)
SKIPPING_ON = (
    (2, "tp1 zero1", [["tp1 zero1", "tp2 zero1"], ["tp2+megatron zero1", "tp1 zero1"]], DEEPSPEED),
    (5, "tp2 zero3", [["tp2 zero3", "tp4 zero3", "tp2+megatron zero3", "tp2 zero3"]], {"pp": 1}),
    (7, "tp1 zero2", [["tp1 zero2"], ["tp2 zero2"], ["tp2+megatron zero2"], ["tp1 zero2"]], {"virtual": 2}),
    (8, "tp1", [["tp2"], ["tp1", "tp2+megatron", "tp1"]], {}),
)
"""The same as jobs that go on one from another: last step, base, stages, options. All steps of the first are
skipped, and in the others the loss scale moves by what it counted in those before. Every job has as many
micro-batches: by their number losses are divided, and with them what overflows inside a backward pass."""
