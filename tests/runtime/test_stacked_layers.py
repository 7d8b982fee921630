"""Entries of layers in checkpoints that stack layers say where they lie, and come back as they were."""

import pytest

pytest.importorskip("megatron.training")

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from galvatron_megatron.runtime.stacked_layers import without_grid

LAYER, LAYERS = 2, 4


def stacked(key, tensor, rank=1, of=2):
    """Half of a weight of one layer, as stock Megatron describes it."""
    return ShardedTensor.from_rank_offsets(
        key, tensor, (0, LAYER, LAYERS), (1, rank, of), replica_id=(0, 0, 0), prepend_axis_num=1
    )


def test_a_tensor_lies_where_the_grid_had_it():
    weight = torch.arange(6.0).view(2, 3)
    (made,) = without_grid({"w": stacked("layers.w", weight)}).values()
    assert made.data is weight, "the optimizer finds entries by the identity of their parameter"
    entry = made.build()
    assert (entry.key, entry.global_shape, entry.global_offset) == ("layers.w", (LAYERS, 4, 3), (LAYER, 2, 0))
    assert entry.local_shape == (1, 2, 3) and not entry.has_regular_grid
    assert torch.equal(made.merge_fn(entry.data.clone()), weight)


def test_states_are_described_like_their_weight():
    weight = torch.zeros(2, 3, dtype=torch.bfloat16)
    (made,) = without_grid({"w": stacked("layers.w", weight)}).values()
    state = make_sharded_optimizer_tensor(made, torch.ones(2, 3), prefix="optimizer.state.exp_avg").build()
    assert state.key == "optimizer.state.exp_avg.layers.w" and state.dtype == torch.float32
    assert state.global_offset == (LAYER, 2, 0)


def test_weights_in_two_tensors_are_cut_and_joined_as_before():
    weight = torch.arange(12.0).view(4, 3)

    def build(key, tensor, replica_id, flattened_range):
        return [stacked(key, half, rank, 4) for rank, half in enumerate(tensor.chunk(2))]

    factory = ShardedTensorFactory("layers.gated", weight, build, torch.cat)
    (made,) = without_grid({"w": factory}).values()
    entries = made.build()
    assert [entry.global_offset for entry in entries] == [(LAYER, 0, 0), (LAYER, 2, 0)]
    assert torch.equal(made.merge_fn([entry.data.clone() for entry in entries]), weight)


def test_what_is_not_stacked_stays():
    entry = ShardedTensor.from_rank_offsets("embedding", torch.zeros(2, 3))
    assert without_grid({"w": entry})["w"] is entry
