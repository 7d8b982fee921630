"""Megatron-LM's own, unmodified scripts under --galvatron-auto; needs a checkout."""

import os
from pathlib import Path

import pytest
from jobs import SIZES, deepspeed, hand_words, run_ranks, torchrun

CHECKOUT = os.environ.get("GALVATRON_MEGATRON_LM")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.jobs,
    pytest.mark.skipif(
        CHECKOUT is None,
        reason="GALVATRON_MEGATRON_LM does not name a Megatron-LM checkout (core_v0.19)",
    ),
]


@pytest.mark.parametrize(
    ("script", "world_size", "words"),
    [
        ("pretrain_gpt.py", 1, []),
        ("pretrain_gpt.py", 2, []),
        # Everything is measured under a micro-batch fixed by hand, which saves time on few processors.
        ("pretrain_gpt.py", 4, ["--micro-batch-size", "2", "--galvatron-uniform"]),
        ("pretrain_hybrid.py", 2, ["--hybrid-layer-pattern", "*-*-*-*-", "--position-embedding-type", "none"]),
    ],
)
def test_losses_equal_those_of_the_chosen_arguments_given_by_hand(script, world_size, words, tmp_path):
    sizes = [
        word for index, word in enumerate(SIZES) if "--num-layers" not in SIZES[max(0, index - 1) : index + 1]
    ]
    model = words if script == "pretrain_hybrid.py" else ["--num-layers", "4", *words]
    hand_model = [word for word in model if word != "--galvatron-uniform"]
    path = str(Path(CHECKOUT) / script)
    report = tmp_path / "report.json"
    auto = ["--galvatron-auto", "--galvatron-profile-dir", str(tmp_path), "--galvatron-report", str(report)]
    job = torchrun(world_size, [path, *sizes, *model, *auto])
    assert job.codes == [0], job.text[-3000:]
    by_hand = run_ranks(world_size, [path, *sizes, *hand_model, *hand_words(report)])
    assert by_hand.codes == [0] * world_size, by_hand.text[-3000:]
    assert list(job.losses) == list(range(1, 11))
    assert job.losses == pytest.approx(by_hand.losses, abs=1e-5)


def test_the_deepspeed_launcher_starts_them_too(tmp_path):
    path = str(Path(CHECKOUT) / "pretrain_gpt.py")
    words = [*SIZES, "--micro-batch-size", "2", "--galvatron-auto", "--galvatron-uniform"]
    words += ["--galvatron-profile-dir", str(tmp_path)]
    job = torchrun(2, [path, *words])
    assert job.codes == [0], job.text[-3000:]
    own = deepspeed([path, *words], ["--num_gpus", "2"])
    assert own.codes == [0] and "galvatron: plan (kept in" in own.text, own.text[-3000:]
    assert own.losses == pytest.approx(job.losses, abs=1e-5)
