"""What is wrong with a checkpoint is found before anything is loaded."""

from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.training")

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from galvatron_megatron.errors import PlanError
from galvatron_megatron.runtime import checkpoint_checks
from galvatron_megatron.runtime.vocabulary import Vocabulary


def job(**changes):
    known = {"finetune": False, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ckpt_step": None}
    return SimpleNamespace(**known | changes)


@pytest.fixture
def place(tmp_path):
    """A place with checkpoints of steps 2 and 4."""
    for step in (2, 4):
        (tmp_path / f"iter_{step:07d}").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4\n")
    return tmp_path


def test_the_folder_is_that_of_the_last_step_or_of_the_one_asked_for(place):
    found = checkpoint_checks.checkpoint_folder
    assert found(place, job()) == str(place / "iter_0000004")
    assert found(place, job(ckpt_step=2)) == str(place / "iter_0000002")
    assert found(place / "iter_0000002", job()) is None
    (place / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(PlanError, match=r"release: no such folder; .* one of iter_0000002, iter_0000004"):
        found(place, job())


def test_a_folder_that_is_not_there_is_named_with_those_that_are(place):
    with pytest.raises(PlanError, match=r"iter_0000003: no such folder; valid: .* iter_0000002, iter_0000004"):
        checkpoint_checks.checkpoint_folder(place, job(ckpt_step=3))
    for text in ("twelve", "-1", "", "4.0"):
        (place / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(PlanError, match=r"latest_checkpointed_iteration.txt: .* for an iteration; valid: "):
            checkpoint_checks.checkpoint_folder(place, job())


def test_arguments_tell_another_model():
    check = checkpoint_checks.check_arguments
    check(job(), job(), "place")
    check(None, job(), "place")
    check(job(hidden_size=64), job(finetune=True), "place")
    check(job(num_layers=2), job(hybrid_layer_pattern="*-*-"), "place")
    for name, flag in (("num_layers", "num-layers"), ("num_attention_heads", "num-attention-heads")):
        with pytest.raises(PlanError, match=f"checkpoint place: --{flag} is 4, but 8 in it; valid: 8"):
            check(job(**{name: 8}), job(), "place")


def stored(path, offset, length):
    return SimpleNamespace(relative_path=path, offset=offset, length=length)


def test_files_that_are_missing_or_short_are_named(tmp_path):
    pieces = {0: stored("a", 0, 4), 1: stored("a", 4, 4), 2: stored("b", 0, 2)}
    (tmp_path / "a").write_bytes(bytes(8))
    with pytest.raises(PlanError, match=r": b is missing; valid: a complete checkpoint"):
        checkpoint_checks.check_files(tmp_path, pieces)
    (tmp_path / "b").write_bytes(bytes(2))
    checkpoint_checks.check_files(tmp_path, pieces)
    (tmp_path / "a").write_bytes(bytes(7))
    with pytest.raises(PlanError, match=r": a has 7 of 8 bytes; valid: a complete checkpoint"):
        checkpoint_checks.check_files(tmp_path, pieces)


def entry(key, *shape, pads=False):
    return ShardedTensor.from_rank_offsets(key, torch.zeros(shape), allow_shape_mismatch=pads)


def built(*given):
    key, data = given[:2]
    return {"half": ShardedTensor.from_rank_offsets(key, data[:2])}


def test_tensors_of_another_model_are_named(tmp_path):
    form = {
        "model": {"a": entry("a", 2, 3), "e": entry("e", 8, 3, pads=True)},
        "parts": [ShardedTensorFactory("f", torch.zeros(4, 3), built, lambda found: found)],
    }
    known, eight = {"a": (2, 3), "e": (8, 3), "f": (2, 3)}, Vocabulary(tokens=7, divisor=4)

    def check(vocabulary=eight, lacks_some=False, saved=None, **changes):
        shapes = {name: shape for name, shape in (known | changes).items() if shape}
        checkpoint_checks.check_shapes(tmp_path, shapes, form, vocabulary, saved=saved, lacks_some=lacks_some)

    check()
    check(e=(7, 3))
    check(a=None, f=None, lacks_some=True)
    check(e=(16, 3), saved=SimpleNamespace(tensor_model_parallel_size=4, make_vocab_size_divisible_by=4))
    for changes, message in (
        ({"a": (3, 2)}, r"a is \(3, 2\); valid: \(2, 3\), as here"),
        ({"a": (3, 2), "lacks_some": True}, r"a is \(3, 2\); valid: \(2, 3\), as here"),
        ({"f": (4, 3)}, r"f is \(4, 3\); valid: \(2, 3\), as here"),
        ({"f": None}, r"no f; valid: the model's arguments"),
        ({"e": (8, 4)}, r"e is \(8, 4\); valid: \(8, 3\), as here"),
        ({"e": (6, 3)}, r"e has 6 rows, but the tokenizer 7 tokens; valid: 7 to 8 rows"),
        ({"e": (16, 3)}, r"e has 16 rows, but the tokenizer 7 tokens; valid: 7 to 8 rows"),
    ):
        with pytest.raises(PlanError, match=message) as caught:
            check(**changes)
        assert str(tmp_path) in str(caught.value)
