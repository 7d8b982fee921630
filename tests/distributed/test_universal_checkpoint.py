"""A job of DeepSpeed's engine goes on under any plan as if it had never changed hands."""

import shutil

import numpy as np
import pytest
import torch
from runtime_cases import case
from runtime_rank import assert_same_training, expected_of, references, relative

from galvatron_megatron.runtime.universal_files import UniversalCheckpoint

pytestmark = pytest.mark.distributed
HALFWAY, STEPS = 3, 6
SCALE = {"initial-loss-scale": 2**18, "loss-scale-window": 2, "hysteresis": 1}
"""Of a job in fp16 whose first and third step overflow."""
SOURCES = {
    "first": ("modern", "tp2+megatron zero1", 1, {}),
    "parameters": ("modern", "tp2+megatron zero3", 1, {}),
    # Flat tensors, and no step.pt.
    "flat": ("classic", "tp1 zero3", 1, {}),
    "fp16": ("fp16", "tp2 zero2", 1, {"arguments": SCALE}),
    # Megatron-DeepSpeed's names and patterns, which take the padding of the vocabulary away.
    "foreign": ("tied", "tp2 zero2", 1, {"foreign": True, "reload": True}),
    "pipeline": ("modern", "tp2 zero1", 2, {}),
    "tied-pipeline": ("classic", "tp2 zero1", 2, {}),
    "bf16-pipeline": ("tied", "tp1 zero1", 2, {"arguments": {"bf16": True}}),
}
"""Jobs of DeepSpeed's engines: model, strategy, stages of their pipeline."""
OPTIMIZERS = {"parameters": "Stage3", "flat": "Stage3", "bf16-pipeline": "BF16_Optimizer"}
TOLERANCES = {"fp16": 2e-3, "bf16-pipeline": 1e-2}


def on_engine(rank, world_size, made, folder):
    from universal_engine import train_engine

    return train_engine(rank, world_size, made, folder, HALFWAY, STEPS)


def on_plan(rank, world_size, made):
    from universal_states import train_on

    return train_on(rank, world_size, made)


def on_refusal(rank, world_size, cases):
    from universal_states import refused

    return refused(rank, world_size, cases)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """Universal checkpoints of DeepSpeed's engines, by name, and what these saw before and behind them."""
    known = {}

    def of(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            model, base, pp, options = SOURCES[name]
            made = case("engine", model, base, *[[base] * (4 // pp)] * pp, pp=pp, **options)
            known[name] = folder, ranks(4).run(on_engine, made, str(folder))[0]
        return known[name]

    return of


def resumed(folder, base, *stages, model="modern", arguments=None, **options):
    arguments = {**(arguments or {}), "train-iters": STEPS}
    return case("resumed", model, base, *stages, arguments=arguments, universal=str(folder), **options)


@pytest.mark.parametrize("name", ["first", "pipeline", "tied-pipeline"])
def test_the_engine_trains_as_megatron_does(ranks, saved, name):
    expected = references(ranks)[SOURCES[name][0]]
    for kind in ("losses", "norms"):
        assert relative(saved(name)[1][kind], expected[kind][:STEPS]) < 1e-5


MIXED = ("tp1", [["tp1 zero3", "tp2 zero2 offload-optimizer", "tp4 zero1", "tp2+megatron"]], {})
STAGES = ("tp2 zero1", [["tp2 zero3 offload-parameters", "tp1"], ["tp2", "tp2 zero1"]], {"pp": 2})
UNIFORM = ("tp1 zero1", [["tp1 zero1"] * 4], {})


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("first", UNIFORM),
        ("parameters", STAGES),
        ("flat", STAGES),
        ("fp16", MIXED),
        ("foreign", MIXED),
        ("pipeline", MIXED),
        ("tied-pipeline", STAGES),
        ("bf16-pipeline", STAGES),
    ],
)
def test_goes_on_under_a_plan(ranks, saved, name, target):
    folder, engine = saved(name)
    assert OPTIMIZERS.get(name, "DeepSpeedZeroOptimizer") in engine["optimizer"]
    model, _, _, given = SOURCES[name]
    base, stages, options = target
    made = resumed(folder, base, *stages, model=model, arguments=given.get("arguments"), **options)
    seen = ranks(4).run(on_plan, made)[0]
    # Skipped steps train on samples, but do not move the learning rate.
    assert seen["place"] == (HALFWAY, 8 * HALFWAY, 8 * (HALFWAY - engine["skipped"]))
    holds_what_was_saved(seen["states"], UniversalCheckpoint(folder))
    assert len(seen["losses"]) == STEPS - HALFWAY
    if name in TOLERANCES:
        assert relative(seen["losses"], engine["losses"][HALFWAY:]) < TOLERANCES[name]
        assert seen["copies_differ"] == 0.0
    elif model == "tied":
        assert_same_training(seen, engine, slice(HALFWAY, None))
    else:
        assert_same_training(seen, expected_of(ranks, made), slice(HALFWAY, None))
    if model == "fp16":
        assert engine["skipped"] == 2
        scales = [scaler["scale"] for scaler in seen["scalers"]]
        assert scales == [2.0**16, 2.0**17] and engine["scale"] == scales[1]


def holds_what_was_saved(states, files):
    """Main weights and Adam's states are those of the files, to the bit, and padding is zeros."""
    assert {name.removeprefix("optimizer.state.").partition(".")[0] for name in states} == {
        *("param", "exp_avg", "exp_avg_sq")
    }
    for key, value in states.items():
        state, _, name = key.removeprefix("optimizer.state.").partition(".")
        expected = files.tensor(name, state).numpy()
        rows = min(len(value), len(expected))
        assert np.array_equal(value[:rows], expected[:rows]), key
        assert not value[rows:].any()
        assert np.abs(expected).max() > 0


def test_what_cannot_be_read_ends_all_ranks_with_one_line_and_nothing_is_taken_over(ranks, saved, tmp_path):
    folder, _ = saved("first")
    four = ["tp1", "tp1 zero2", "tp1 zero3", "tp1 zero1"]
    damaged = {}
    for name in ("missing", "cut", "elsewhere"):
        damaged[name] = shutil.copytree(folder, tmp_path / name)
        (zero,) = damaged[name].glob("*_universal/zero")
        damaged[name] = (damaged[name], zero / "decoder.final_layernorm.weight")
    (damaged["missing"][1] / "exp_avg_sq.pt").unlink()
    last = damaged["cut"][1] / "exp_avg.pt"
    last.write_bytes(last.read_bytes()[:-200])
    torch.save({"param": torch.zeros(7)}, damaged["elsewhere"][1] / "fp32.pt")
    cases = {
        "no latest_universal file and no zero folder": resumed(tmp_path / "nowhere", "tp1", four),
        "exp_avg_sq.pt is missing": resumed(damaged["missing"][0], "tp1", four),
        "exp_avg.pt cannot be read as data": resumed(damaged["cut"][0], "tp1", four),
        "decoder.final_layernorm.weight is (7,); valid: (32,), as here": {
            **resumed(folder, "tp1", four),
            "of_rank": {2: str(damaged["elsewhere"][0])},
        },
        "it trains decoder.layers.3": resumed(folder, "tp1", four[:3]),
        "no parameter decoder.layers.4": resumed(folder, "tp1", [*four, "tp1"]),
        "valid: (64, 64), as here": resumed(folder, "tp1", four, arguments={"hidden-size": 64}),
        "has 64 rows, but the tokenizer 40 tokens; valid: 40 to 48 rows": resumed(
            folder, "tp1", four, arguments={"vocab-size": 40}
        ),
        "has 64 rows, but the tokenizer 65 tokens; valid: 65 to 80 rows": resumed(
            folder, "tp1", four, arguments={"vocab-size": 65}
        ),
    }
    answers = ranks(4).run(on_refusal, list(cases.values()))
    for message, lines in zip(cases, zip(*answers, strict=True), strict=True):
        for line, code, unchanged in lines:
            assert message in line and "\n" not in line and "; valid: " in line
            assert code == 2 and unchanged == [True], message
