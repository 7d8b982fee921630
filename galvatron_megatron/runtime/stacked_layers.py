"""Layers that differ, in checkpoints that stack equal layers into single tensors as stock Megatron's do.

There a layer's weight is one slice of a tensor ``[layers, ...]``, and Megatron describes what it loads as a
cell of one regular grid over that tensor. Layers with different tensor-parallel degrees are cells of different
grids; here each is described by its offset and shape alone, leading axes included, which the format allows too.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def without_grid(entries: dict[str, Any]) -> dict[str, Any]:
    """Describes the entries of a layer by where they lie, in place.

    Args:
        entries: of a checkpoint, with the layer as a leading axis; optimizer states are derived from them.

    Returns:
        The same mapping; tensors in it are now made, and taken apart again once loaded, by factories.
    """
    return dict_list_map_inplace(_described, entries)


def _described(entry: Any) -> Any:
    if isinstance(entry, ShardedTensorFactory):
        return _wrapped(entry)
    return _made(entry) if isinstance(entry, ShardedTensor) and entry.prepend_axis_num else entry


def _made(entry: ShardedTensor) -> ShardedTensorFactory:
    """A factory of one tensor, which also makes the optimizer's states in its likeness."""
    like, leading = entry.without_data(), entry.prepend_axis_num

    def build(key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: Any) -> ShardedTensor:
        del flattened_range
        return _placed(replace(like, key=key, data=tensor, dtype=tensor.dtype, replica_id=replica_id))

    def merge(loaded: torch.Tensor) -> torch.Tensor:
        return loaded.view(loaded.shape[leading:])

    return ShardedTensorFactory(entry.key, entry.data, build, merge, entry.replica_id)


def _wrapped(factory: ShardedTensorFactory) -> ShardedTensorFactory:
    """A factory whose tensors, several for one weight with as many axes, say where they lie."""
    built_by, merged_by = factory.build_fn, factory.merge_fn
    axes = factory.data.dim()

    def build(*parts: Any) -> Any:
        return dict_list_map_inplace(_placed, built_by(*parts))

    def merge(loaded: Any) -> torch.Tensor:
        return merged_by(dict_list_map_inplace(lambda tensor: tensor.view(tensor.shape[-axes:]), loaded))

    return replace(factory, build_fn=build, merge_fn=merge)


def _placed(entry: ShardedTensor) -> ShardedTensor:
    shape = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
    return replace(
        entry,
        data=entry.data.view(shape),
        local_shape=shape,
        axis_fragmentations=None,
        prepend_axis_num=0,
    )
