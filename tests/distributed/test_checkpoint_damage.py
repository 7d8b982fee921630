"""Checkpoints that are damaged or of another model: all ranks end with one line, and nothing is half loaded."""

import shutil

import pytest
from runtime_cases import case
from runtime_rank import train

pytestmark = pytest.mark.distributed
LAYERS = ["tp1 zero3", "tp2 zero2", "tp4 zero1", "tp2+megatron"]


def on_refusal(rank, world_size, cases):
    from refused_loads import refused

    return refused(rank, world_size, cases)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A checkpoint of a mixed plan, behind its second step."""
    where = tmp_path_factory.mktemp("whole")
    arguments = {"save": str(where), "save-interval": 2, "train-iters": 2}
    ranks(4).run(train, case("saves", "modern", "tp1", LAYERS, arguments=arguments))
    return where


def resumed(folder, layers=LAYERS, base="tp1", **arguments):
    words = {"load": str(folder), "train-iters": 4, "override-opt-param-scheduler": True, **arguments}
    return case("resumed", "modern", base, layers, arguments=words)


def spoil_cut(folder):
    file = sorted(folder.glob("*.distcp"))[2]
    file.write_bytes(file.read_bytes()[:-100])


def spoil_bytes(folder):
    """What some ranks read alone."""
    file = min(folder.glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(bytes(len(content) // 2) + content[len(content) // 2 :])


def spoil_description(folder):
    (folder / ".metadata").write_bytes(b"\x80\x04no pickle")


SPOILT = {
    spoil_cut: r" bytes; valid: a complete checkpoint",
    spoil_bytes: "cannot be read (",
    spoil_description: "cannot be read (",
}


def test_damage_and_other_models_end_all_ranks_with_one_line(ranks, saved, tmp_path):
    cases = {}
    for spoil, message in SPOILT.items():
        copy = tmp_path / spoil.__name__
        shutil.copytree(saved, copy)
        spoil(copy / "iter_0000002")
        parallel = {"ckpt-fully-parallel-load": True} if spoil is spoil_bytes else {}
        cases[spoil.__name__] = message, resumed(copy, **parallel)
    cases |= {
        "hidden": ("--hidden-size is 64, but 32 in it; valid: 32", resumed(saved, **{"hidden-size": 64})),
        "wide": ("is (128, 32); valid: (256, 32), as here", resumed(saved, **{"ffn-hidden-size": 128})),
        "tokens": ("but the tokenizer 40 tokens; valid: 40 to 40 rows", resumed(saved, **{"vocab-size": 40})),
        "stock": ("no decoder.layers.", resumed(saved, ["tp2"] * 4, "tp2", **{"disable-bias-linear": None})),
    }
    answers = ranks(4).run(on_refusal, [made for _, made in cases.values()])
    for (name, (message, _)), found in zip(cases.items(), zip(*answers, strict=True), strict=True):
        (line,) = {line for line, _ in found}
        assert message in line and "\n" not in line and "; valid: " in line, (name, line)
        assert all(taken == [] for _, taken in found), name
