"""What a checkpoint holds is made out before it is loaded; forms that fit one layout alone are refused."""

from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.training")

import torch

from galvatron_megatron.errors import PlanError
from galvatron_megatron.runtime import checkpoint

JOB = SimpleNamespace(
    finetune=False, no_load_optim=False, tensor_model_parallel_size=2, pipeline_model_parallel_size=1
)
OTHER_TP = SimpleNamespace(tensor_model_parallel_size=4, pipeline_model_parallel_size=1)


def described(metadata, *, args=JOB, saved=JOB, runs_alike=False, **options):
    """The description of a checkpoint, as Megatron's loader then reads it."""
    common = {"content_metadata": metadata, "args": saved}
    read = checkpoint.describe_loaded(lambda *_, **__: (common, "name", False, None), runs_alike=runs_alike)
    assert read("folder", args, rank0=True, **options)[0] is common
    return metadata


@pytest.mark.parametrize("form", ["dp_reshardable", "fully_sharded_model_space", "dp_zero_gather_scatter"])
def test_forms_that_fit_one_layout_are_refused_with_the_way_out(form):
    with pytest.raises(PlanError, match=f"form {form}, which fits one.*--dist-ckpt-optim-fully-reshardable"):
        described({"distrib_optim_sharding_type": form})
    with pytest.raises(PlanError, match="--no-load-optim"):
        described({"distrib_optim_sharding_type": form}, saved=OTHER_TP, runs_alike=True)


def test_forms_that_fit_one_layout_are_left_to_megatron_where_it_can_read_them():
    fixed = {"distrib_optim_sharding_type": "dp_reshardable"}
    described(dict(fixed), runs_alike=True)
    for skipped in ("finetune", "no_load_optim"):
        described(dict(fixed), args=SimpleNamespace(**{**vars(JOB), skipped: True}))
    described(dict(fixed), saved=SimpleNamespace(**vars(OTHER_TP), no_save_optim=True))


def test_states_of_the_optimizer_without_sharding_can_be_read_by_any():
    assert described({})["distrib_optim_sharding_type"] == "fully_reshardable"
    assert "galvatron_states_of_unsharded_optimizer" not in described(dict(checkpoint.CONTENT))
    assert described({}, sharded_state_dict={}) == {}, "the second reading describes nothing"


@pytest.mark.parametrize(
    "saved",
    [
        {"param_groups": [{"lr": 0.1, "wd_mult": 1.0}], "state": {"common_step": torch.tensor(7.0)}},
        {"optimizer": {"param_groups": [{"lr": 0.1, "wd_mult": 1.0}], "state": {"common_step": 7}}},
        {"optimizer": {"param_groups": [{"lr": 0.1, "wd_mult": 1.0, "step": 7}]}},
        {
            0: {"optimizer": {"param_groups": [{"lr": 0.1, "wd_mult": 1.0, "step": 7}]}},
            1: {"optimizer": {"param_groups": []}},
        },
    ],
    ids=["fp32", "half", "sharded", "chained"],
)
def test_settings_are_found_in_every_form_of_megatron(saved):
    assert checkpoint._settings_in(saved)["optimizer"]["param_groups"] == [
        {"lr": 0.1, "wd_mult": 1.0, "step": 7}
    ]
