"""Universal checkpoints are read as data, and what is wrong with one is said in one line."""

import argparse
import shutil

import pytest
import torch

from galvatron_megatron.errors import PlanError
from galvatron_megatron.runtime.universal_files import LATEST, UniversalCheckpoint

NAME = "decoder.final_layernorm.weight"


class Foreign:
    """An object that a job may have saved beside its counters."""

    def __init__(self):
        self.secret = 1


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of one parameter, as ds_to_universal leaves it."""
    zero = tmp_path / "global_step3_universal" / "zero"
    (zero / NAME).mkdir(parents=True)
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        torch.save({"param": torch.arange(4.0), "cat_dim": 0}, zero / NAME / f"{state}.pt")
    torch.save(torch.tensor(3.0), zero / NAME / "step.pt")
    saved = {"global_steps": 5, "global_samples": 40, "args": argparse.Namespace(lr=Foreign())}
    torch.save(saved, zero.parent / "mp_rank_00_model_states.pt")
    (tmp_path / LATEST).write_text(f"{zero.parent.name}\n")
    return tmp_path


def zero_of(folder):
    return folder / "global_step3_universal" / "zero"


def test_what_it_says(folder):
    for given in (folder, folder / "global_step3_universal"):
        found = UniversalCheckpoint(given)
        assert (found.steps(), found.iteration(), found.samples()) == (3, 5, 40)
        assert found.trained() == {NAME}
        assert found.tensor(NAME, "exp_avg").tolist() == [0, 1, 2, 3]


def test_the_jobs_own_count_of_iterations_goes_first(folder):
    path = zero_of(folder).parent / "mp_rank_00_model_states.pt"
    torch.save({"global_steps": 5, "iteration": 6}, path)
    assert UniversalCheckpoint(folder).iteration() == 6
    path.unlink()
    found = UniversalCheckpoint(folder)
    assert (found.iteration(), found.samples()) == (3, None)


class Scaler:
    """The fields of DeepSpeed's dynamic loss scaler."""

    def __init__(self, **fields):
        vars(self).update(fields)


@pytest.mark.parametrize("overflows", [(), (0,), (0, 2), (5,), (0, 1, 2, 3, 4, 5), (0, 5)])
@pytest.mark.parametrize("hysteresis", [1, 2])
@pytest.mark.parametrize("later", [(), (0,), (0, 1)])
def test_the_loss_scale_goes_on_as_deepspeeds(folder, monkeypatch, overflows, hysteresis, later):
    """Megatron's scaler, from what is read, changes in the same steps as DeepSpeed's does."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    theirs = loss_scaler.DynamicLossScaler(2.0**20, 3, 1.0, hysteresis, False)
    for number in range(6):
        theirs.update_scale(number in overflows)
    torch.save({"loss_scaler": Scaler(**vars(theirs))}, zero_of(folder) / "optimizer_state.pt")
    found = UniversalCheckpoint(folder).loss_scale()
    scale, growth, left = found.scale, found.growth, found.hysteresis
    # Behind another overflow Megatron's scale grows a step earlier than DeepSpeed's.
    for number in range(2 if later else 9):
        assert scale == theirs.cur_scale, number
        theirs.update_scale(number in later)
        # As megatron.core.optimizer.grad_scaler.DynamicGradScaler.update does.
        if number in later:
            growth, left = 0, left - 1
            scale = scale / 2 if left <= 0 else scale
        else:
            growth += 1
            if growth == 3:
                scale, growth, left = scale * 2, 0, hysteresis


def test_a_loss_scale_that_is_constant_or_damaged(folder):
    assert UniversalCheckpoint(folder).loss_scale() is None
    path = zero_of(folder) / "optimizer_state.pt"
    torch.save({"loss_scaler": Scaler(cur_scale=1.0, dynamic=False)}, path)
    assert UniversalCheckpoint(folder).loss_scale() is None
    torch.save({"loss_scaler": Scaler(cur_scale=1.0, scale_window=3, cur_iter=None)}, path)
    with pytest.raises(PlanError, match=r"optimizer_state.pt: no complete loss scaler; valid: DeepSpeed's own"):
        UniversalCheckpoint(folder).loss_scale()


def test_the_schedule_counts_samples_of_steps_that_were_made(folder):
    path = zero_of(folder).parent / "mp_rank_00_model_states.pt"
    counts = {"global_steps": 5, "global_samples": 40, "skipped_steps": 2}
    torch.save(counts, path)
    assert UniversalCheckpoint(folder).scheduled_samples() == 24
    torch.save(counts | {"lr_scheduler": {"num_steps": 32}}, path)
    assert UniversalCheckpoint(folder).scheduled_samples() == 32
    torch.save(counts | {"args": argparse.Namespace(consumed_train_samples=48)}, path)
    assert UniversalCheckpoint(folder).samples() == 48
    path.unlink()
    assert UniversalCheckpoint(folder).scheduled_samples() is None


def test_flat_tensors_have_the_shapes_that_the_engine_says(folder):
    for name in ("fp32", "exp_avg"):
        torch.save(torch.arange(4.0), zero_of(folder) / NAME / f"{name}.pt")
    path = zero_of(folder).parent / "mp_rank_00_model_states.pt"
    torch.save({"param_shapes": [{NAME: torch.Size([2, 2])}]}, path)
    assert UniversalCheckpoint(folder).tensor(NAME, "param").shape == (2, 2)
    torch.save({"param_shapes": [{NAME: torch.Size([2, 3])}]}, path)
    with pytest.raises(PlanError, match=r"fp32.pt has 4 elements, but the engine's files say \(2, 3\)"):
        UniversalCheckpoint(folder).tensor(NAME, "param")


@pytest.mark.parametrize(
    "kept",
    [{"optimizer_state_dict": {"state": {0: {"step": torch.tensor(7.0)}}}}, {"param_groups": [{"step": 7}]}],
)
def test_steps_that_only_the_optimizer_knows(folder, kept):
    (zero_of(folder) / NAME / "step.pt").unlink()
    torch.save(kept | {"loss_scaler": Foreign()}, zero_of(folder) / "optimizer_state.pt")
    assert UniversalCheckpoint(folder).steps() == 7


def spoil_missing(path):
    path.unlink()


def spoil_cut(path):
    path.write_bytes(path.read_bytes()[:100])


def spoil_text(path):
    path.write_text("no tensor")


def spoil_folder(path):
    path.unlink()
    path.mkdir()


def spoil_empty(path):
    path.write_bytes(b"")


def spoil_code(path):
    torch.save({"param": shutil.copytree}, path)


def spoil_object(path):
    torch.save({"param": Foreign()}, path)


def spoil_keys(path):
    torch.save({"other": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    "spoil",
    [
        *(spoil_missing, spoil_cut, spoil_text, spoil_folder),
        *(spoil_empty, spoil_code, spoil_object, spoil_keys),
    ],
)
@pytest.mark.parametrize("file", ["fp32.pt", "step.pt"])
def test_damage_is_one_line_that_names_the_file(folder, spoil, file):
    spoil(zero_of(folder) / NAME / file)
    with pytest.raises(PlanError, match=r"universal checkpoint") as caught:
        found = UniversalCheckpoint(folder)
        found.tensor(NAME, "param")
        found.steps()
    text = str(caught.value)
    assert "\n" not in text and "; valid: " in text
    assert file in text


@pytest.mark.parametrize("value", [-1, 2.5, "three", True, torch.zeros(2), None])
def test_a_step_that_is_no_count_is_refused(folder, value):
    torch.save(value, zero_of(folder) / NAME / "step.pt")
    with pytest.raises(PlanError, match=r"step.pt: .* for a number of steps; valid: an integer >= 0"):
        UniversalCheckpoint(folder).steps()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for place in (tmp_path, file, tmp_path / "nowhere"):
        with pytest.raises(PlanError, match="no latest_universal file and no zero folder"):
            UniversalCheckpoint(place)
    (tmp_path / "zero").mkdir()
    with pytest.raises(PlanError, match="empty; valid: a complete one"):
        UniversalCheckpoint(tmp_path)
    (tmp_path / LATEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        UniversalCheckpoint(tmp_path)


def test_a_parameter_that_is_not_there_is_named(folder):
    with pytest.raises(PlanError, match=r"no parameter decoder.layers.0.mlp.linear_fc1.weight; valid"):
        UniversalCheckpoint(folder).tensor("decoder.layers.0.mlp.linear_fc1.weight", "param")
