"""An asynchronous writer gets copies of what it would read while later steps change it."""

from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.training")

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from galvatron_megatron.runtime import checkpoint_async


def state_of(tensors):
    """A checkpoint's state with a tensor, a view of one, one on a device and one that a factory takes apart."""

    def build(key, tensor, replica_id, flattened_range):
        return {"half": ShardedTensor.from_rank_offsets(key, tensor[:2])}

    entries = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
    factory = ShardedTensorFactory("apart", torch.zeros(4), build, lambda found: found)
    return {"model": entries, "optimizer": [factory], "args": SimpleNamespace(), "iteration": 3}


@pytest.mark.parametrize(
    ("async_save", "named", "copies"),
    [
        (True, {}, True),
        (True, {"optim_sd_kwargs": {"metadata": {}}}, True),
        (True, {"optim_sd_kwargs": {"is_loading": True}}, False),
        (False, {}, False),
    ],
)
def test_what_the_writer_would_read_late_is_copied(async_save, named, copies):
    tensors = {"alone": torch.ones(4), "view": torch.ones(8)[2:6], "away": torch.ones(4, device="meta")}
    state = state_of(tensors)
    factory = state["optimizer"][0]
    generate = checkpoint_async.hook_generate(lambda args, **_: state)
    found = generate(SimpleNamespace(async_save=async_save), **named)
    shared = {name: found["model"][name].data is tensor for name, tensor in tensors.items()}
    assert shared == {"alone": not copies, "view": True, "away": True}
    assert torch.equal(found["model"]["alone"].data, tensors["alone"])
    (made,) = found["optimizer"]
    (half,) = nested_values([made.build()])
    assert (half.data.data_ptr() == factory.data.data_ptr()) is not copies
    assert found["iteration"] == 3
