"""A job of DeepSpeed's engine goes on under any plan as if it had never changed hands."""

import shutil

import pytest
import torch
from ranks import RankError
from runtime_cases import case
from runtime_rank import assert_same_training, references, relative, train

pytestmark = pytest.mark.distributed
HALFWAY, STEPS = 3, 6


def on_engine(rank, world_size, made, folder):
    from universal_engine import train_engine

    return train_engine(rank, world_size, made, folder, HALFWAY, STEPS)


def saved(ranks, folder, base):
    """A universal checkpoint of DeepSpeed's engine, and what the engine saw before and behind it."""
    made = case("engine", "modern", base, [base] * 4)
    return folder, ranks(4).run(on_engine, made, str(folder))[0]


@pytest.fixture(scope="module")
def split(ranks, tmp_path_factory):
    """ZeRO 2 over two ranks, which tensor parallelism splits."""
    return saved(ranks, tmp_path_factory.mktemp("split"), "tp2+megatron zero2")


@pytest.fixture(scope="module")
def flat(ranks, tmp_path_factory):
    """ZeRO 3, which leaves flat tensors and no step.pt."""
    return saved(ranks, tmp_path_factory.mktemp("flat"), "tp1 zero3")


def resumed(folder, base, *stages, **options):
    return case(
        "resumed", "modern", base, *stages, arguments={"train-iters": STEPS}, universal=str(folder), **options
    )


def test_the_engine_trains_as_megatron_does(ranks, split):
    expected = references(ranks)["modern"]
    for name in ("losses", "norms"):
        assert relative(split[1][name], expected[name][:STEPS]) < 1e-5


@pytest.mark.parametrize(
    ("source", "base", "stages", "options"),
    [
        ("split", "tp1", [["tp1 zero3", "tp2 zero2 offload-optimizer", "tp4 zero1", "tp2+megatron"]], {}),
        (
            "flat",
            "tp2 zero1",
            [["tp2 zero3 offload-parameters", "tp1"], ["tp2", "tp2 zero1"]],
            {"pp": 2},
        ),
        ("split", "tp1 zero1", [["tp1 zero1"] * 4], {}),
    ],
)
def test_goes_on_under_a_plan(ranks, request, source, base, stages, options):
    folder, expected = request.getfixturevalue(source)
    seen = ranks(4).run(train, resumed(folder, base, *stages, **options))[0]
    assert len(seen["losses"]) == STEPS - HALFWAY
    assert_same_training(seen, expected, slice(HALFWAY, None), weights=expected["weights"] is not None)


def test_what_cannot_be_read_is_named(ranks, split, tmp_path):
    made = resumed(tmp_path, "tp1", ["tp1"] * 4)
    with pytest.raises(RankError, match="no latest_universal file and no zero folder"):
        ranks(1).run(train, made)
    shutil.copytree(split[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(RankError, match=r"it trains decoder.layers.3.*which this model has not"):
        ranks(1).run(train, resumed(tmp_path, "tp1", ["tp1"] * 3))
    file = next(tmp_path.glob("*_universal/zero/decoder.final_layernorm.weight")) / "fp32.pt"
    torch.save({"param": torch.zeros(7)}, file)
    with pytest.raises(RankError, match=r"decoder.final_layernorm.weight is \(7,\); valid: \(32,\)"):
        ranks(1).run(train, made)
