"""Weights that ZeRO 3 shards in checkpoints, as the parts that ranks keep: no parameter is gathered."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from galvatron_megatron.runtime.checkpoint_stretches import (
    MAIN,
    Stretch,
    stand_for,
    stretch_pieces,
    take_pieces,
)
from galvatron_megatron.runtime.zero_whole import whole_parameters


def let_checkpoints_have_parts(model: torch.nn.Module) -> None:
    """Makes a model chunk save and load the parts of parameters that its ranks keep, once for all its classes.

    Parameters that are whole at that time are saved and loaded so.

    Args:
        model: with parameters that ZeRO 3 sharded.
    """
    if "sharded_state_dict" in vars(model):
        return
    save, load = model.sharded_state_dict, model.load_state_dict

    def sharded_state_dict(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _shaped(list(_apart(self).values())) as apart:
            state = save(*args, **kwargs)
            return dict_list_map_inplace(lambda entry: _in_parts(entry, apart), state)

    def load_state_dict(
        self: torch.nn.Module, state: dict[str, Any], strict: bool = True, **kwargs: Any
    ) -> Any:
        apart = _apart(self)
        for name, parameter in apart.items():
            take_pieces(_stretch(parameter), MAIN, state.get(name, {}))
        rest = {name: value for name, value in state.items() if name not in apart}
        whole = [p for name, p in self.named_parameters() if hasattr(p, "ds_tensor") and name not in apart]
        with whole_parameters([torch.nn.ParameterList(whole)], keep_changes=True):
            result = load(rest, strict=False, **kwargs)
        missing = [name for name in result.missing_keys if name not in apart]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(
                f"checkpoint: lacks {missing}, has {result.unexpected_keys} that the model has not"
            )
        return result

    model.sharded_state_dict = MethodType(sharded_state_dict, model)
    model.load_state_dict = MethodType(load_state_dict, model)


def _apart(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by name of which this rank has a part alone now."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    sharded = ((name, p) for name, p in model.named_parameters() if hasattr(p, "ds_tensor"))
    return {name: p for name, p in sharded if p.ds_status == ZeroParamStatus.NOT_AVAILABLE}


@contextmanager
def _shaped(parameters: list[torch.nn.Parameter]) -> Iterator[set[int]]:
    """Gives parameters their shape without their elements, and says which these are, by identity."""
    before = [parameter.data for parameter in parameters]
    for parameter in parameters:
        nothing = torch.empty((), dtype=parameter.dtype, device=parameter.device)
        parameter.data = nothing.expand(parameter.ds_shape)
    try:
        yield {id(parameter) for parameter in parameters}
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


def _stretch(parameter: torch.nn.Parameter) -> Stretch:
    """The elements of a parameter that this rank keeps."""
    part = parameter.partition_numel()
    start = part * dist.get_rank(parameter.ds_process_group)
    length = max(0, min(part, parameter.ds_numel - start))
    kept = parameter.ds_tensor.data.view(-1).narrow(0, 0, length)
    return Stretch(number=0, parameter=parameter, start=start, tensors={MAIN: kept})


def _in_parts(entry: Any, apart: set[int]) -> Any:
    """A parameter's entry as those of the pieces that this rank keeps."""
    if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or id(entry.data) not in apart:
        return entry
    parameter = entry.data
    whole = replace(entry, data=torch.empty(parameter.ds_shape, dtype=parameter.dtype, device="meta"))
    return stand_for(parameter, whole, stretch_pieces(whole, _stretch(parameter), MAIN))
