"""A universal checkpoint of DeepSpeed goes on under any plan as if the job had never stopped."""

import shutil

import pytest
import torch
from ranks import RankError
from runtime_cases import LONG, case
from runtime_rank import assert_same_training, references, train

pytestmark = pytest.mark.distributed
HALFWAY = 5


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory):
    """A universal checkpoint after half of the reference's steps."""
    folder = tmp_path_factory.mktemp("universal")
    made = case(
        "one", "modern", "tp1", ["tp1"] * 4, arguments={"train-iters": HALFWAY}, write_universal=str(folder)
    )
    ranks(1).run(train, made)
    return folder


def resumed(folder, base, *stages, **options):
    return case(
        "resumed", "modern", base, *stages, arguments={"train-iters": LONG}, universal=str(folder), **options
    )


@pytest.mark.parametrize(
    ("base", "stages", "options"),
    [
        ("tp1", [["tp1 zero3", "tp2 zero2 offload-optimizer", "tp4 zero1", "tp2+megatron"]], {}),
        ("tp2 zero1", [["tp2 zero3 offload-parameters", "tp1"], ["tp2", "tp2 zero1"]], {"pp": 2}),
    ],
)
def test_goes_on_under_a_plan(ranks, written, base, stages, options):
    seen = ranks(4).run(train, resumed(written, base, *stages, **options))[0]
    assert len(seen["losses"]) == LONG - HALFWAY
    assert_same_training(seen, references(ranks)["modern"], slice(HALFWAY, None))


def test_what_cannot_be_read_is_named(ranks, written, tmp_path):
    made = resumed(tmp_path, "tp1", ["tp1"] * 4)
    with pytest.raises(RankError, match="no latest_universal file and no zero folder"):
        ranks(1).run(train, made)
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    file = next(tmp_path.glob("*/zero/module.decoder.final_layernorm.weight")) / "fp32.pt"
    torch.save({"param": torch.zeros(7)}, file)
    with pytest.raises(RankError, match=r"decoder.final_layernorm.weight is \(7,\); valid: \(32,\)"):
        ranks(1).run(train, made)
    torch.save({"param": shutil.copytree}, file)
    with pytest.raises(RankError, match="cannot be read as data"):
        ranks(1).run(train, made)
