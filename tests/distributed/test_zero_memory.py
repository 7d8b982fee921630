"""What each rank holds of weights, gradients and optimizer states is what an estimate says of its stage.

To the byte, where the widths of a model are multiples of 128: Megatron's distributed optimizer starts every
parameter at a multiple of 64 elements and ends its buffers at one of 128, which is not priced.
"""

import pytest
from runtime_rank import trained_once
from zero_cases import DEEPSPEED, FOUR, zero_case

pytestmark = pytest.mark.distributed

PIPELINE = {"pp": 2, **FOUR}
INTERLEAVED = {"pp": 2, "virtual": 2, **FOUR}


WATCHED = {"measure": True, "collectives": True}
"""What ranks hold is held against estimates here, what they send in ``test_job_collectives``."""


def measured(name, model, base, *stages, **options):
    sizes = {"hidden-size": 128, "ffn-hidden-size": 128, "train-iters": 2}
    # No step is skipped: optimizers have no states before the first.
    scale = {"initial-loss-scale": 1024} if model == "fp16" else {}
    asked = options.pop("arguments", {})
    return zero_case(name, model, base, *stages, arguments=sizes | scale | asked, **WATCHED, **options)


ALL_STAGES = ["tp1 zero3", "tp1 zero2", "tp1 zero1", "tp1"]
ALL_OFFLOADS = [
    "tp1 zero1 offload-optimizer",
    "tp1 zero2 offload-optimizer",
    "tp1 zero3 offload-optimizer",
    "tp1 zero3 offload-parameters",
]
BF16 = {"arguments": {"bf16": True}}
CASES = (
    measured("stages", "modern", "tp4 zero2", ALL_STAGES),
    measured("stages-fp16", "fp16", "tp4 zero1", ALL_STAGES),
    measured(
        "split", "bf16", "tp1 zero3", ["tp2+megatron zero3", "tp4+megatron zero2", "tp4+megatron zero1", "tp2"]
    ),
    measured(
        "split-fp16", "fp16", "tp2 zero3", ["tp4+megatron zero3", "tp2 zero2", "tp4 zero1", "tp2+ulysses"]
    ),
    measured(
        "deepspeed-1",
        "fp16",
        "tp2 zero1",
        ["tp1 zero1", "tp2 zero1", "tp4+megatron zero1", "tp2+ulysses zero1"],
        **DEEPSPEED,
    ),
    measured("offloaded", "modern", "tp2 zero3 offload-parameters", ALL_OFFLOADS),
    measured("offloaded-fp16", "fp16", "tp2 zero1 offload-optimizer", ALL_OFFLOADS),
    measured("stock", "bf16", "tp1 zero1", ["tp1 zero1"] * 4),
    measured("stock-tied", "classic", "tp2", ["tp2"], ["tp2"] * 3, **PIPELINE, **BF16),
    measured("tied", "classic", "tp1 zero3", ["tp1 zero3", "tp2 zero2", "tp4 zero3", "tp1"]),
    measured(
        "tied-3",
        "classic",
        "tp2+megatron zero3",
        ["tp1 zero3", "tp2+megatron zero2"],
        ["tp2+megatron", "tp1 zero1"],
        **PIPELINE,
    ),
    measured(
        "tied-1-deepspeed",
        "classic",
        "tp1 zero1",
        ["tp1 zero3", "tp2 zero2", "tp2"],
        ["tp1 zero1"],
        **PIPELINE,
        **DEEPSPEED,
        **BF16,
    ),
    measured(
        "tied-offloaded",
        "classic",
        "tp1 zero3 offload-parameters",
        ["tp2+megatron zero2 offload-optimizer", "tp1 zero3"],
        ["tp1 zero1", "tp2 zero3 offload-optimizer"],
        **PIPELINE,
    ),
    measured(
        "interleaved",
        "classic",
        "tp1 zero2",
        *(["tp1 zero3"], ["tp2 zero1"], ["tp2+megatron zero2"], ["tp1"]),
        **INTERLEAVED,
    ),
    measured(
        "interleaved-offloaded",
        "classic",
        "tp2 zero1 offload-optimizer",
        *(["tp1 zero3 offload-parameters"], ["tp2 zero1 offload-optimizer"], ["tp2+megatron zero2"], ["tp1"]),
        **INTERLEAVED,
        **BF16,
    ),
    measured("experts", "experts", "tp1 zero1", ["tp2 zero3", "tp1 etp2 zero1", "tp1 ep4 zero1", "tp1 zero2"]),
    measured(
        "experts-pipeline", "experts", "tp1 zero2", ["tp2", "tp1 ep2 zero1"], ["tp2+ulysses ep2", "tp2"], pp=2
    ),
    measured("mamba", "mamba", "tp1 zero3", ["tp1 zero3", "tp2 zero3", "tp2+megatron zero3", "tp4 zero3"]),
    measured("mamba-2", "mamba", "tp2 zero2", ["tp4 zero2", "tp2+ulysses zero1", "tp1 zero3", "tp2"]),
    measured("latent", "latent", "tp1 zero3", ["tp1 zero3", "tp2 zero3", "tp2+megatron zero2", "tp4"]),
)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_rank_holds_what_is_predicted_of_its_stage(ranks, case):
    seen = trained_once(ranks, case)
    stages = {rank: each["live"]["stage"] for rank, each in enumerate(seen)}
    assert set(stages.values()) == set(range(case.get("pp", 1)))
    for rank, each in enumerate(seen):
        assert each["live"] == each["predicted"][stages[rank]] | {"stage": stages[rank]}, f"rank {rank}"
