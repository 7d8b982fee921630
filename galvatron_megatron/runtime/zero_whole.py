"""Whole parameters where ZeRO 3 keeps parts of them: for checkpoints and for who reads or writes weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

_PARAMETER = "galvatron_parameter"
STAYS_WHOLE = "stays whole"
"""Stands among the modules that are using a parameter which is not let go when they are through."""


def parameter_of(tensor: torch.Tensor) -> torch.Tensor:
    """The parameter that a checkpoint entry's data stands for: itself, or the one it is a copy of."""
    return getattr(tensor, _PARAMETER, tensor)


def _sharded(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    return [p for module in modules for p in module.parameters() if hasattr(p, "ds_tensor")]


@contextmanager
def whole_parameters(modules: Iterable[torch.nn.Module], *, keep_changes: bool = False) -> Iterator[None]:
    """Gathers what ZeRO 3 sharded; all ranks that share the parameters call this together.

    Args:
        modules: model chunks.
        keep_changes: whether what is written meanwhile stays; every rank must then write the same.
    """
    parameters = shared = _sharded(modules)
    if parameters:
        # Imported only where engines are: the first import settles for good which device DeepSpeed takes.
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        parameters = [p for p in shared if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if parameters:
        parameters[0].all_gather(param_list=parameters)
    try:
        yield
    finally:
        staying = [p for p in shared if STAYS_WHOLE in p.ds_active_sub_modules]
        for parameter in staying:
            parameter.ds_active_sub_modules.discard(STAYS_WHOLE)
        if keep_changes:
            # Their parts are to have what was written; they are gathered again at their next use.
            parameters = list(dict.fromkeys([*parameters, *staying]))
        if parameters:
            parameters[0].partition(param_list=parameters, has_been_updated=keep_changes)
        for parameter in staying:
            parameter.ds_active_sub_modules.add(STAYS_WHOLE)


def let_checkpoints_see_whole_parameters(model: torch.nn.Module) -> None:
    """Makes a model chunk save and load whole parameters.

    Args:
        model: with parameters that ZeRO 3 sharded.
    """
    save, load = model.sharded_state_dict, model.load_state_dict

    def sharded_state_dict(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with whole_parameters([self]):
            state = save(*args, **kwargs)
            sharded, _ = extract_sharded_tensors_and_factories(state)
            for entry in nested_values(sharded):
                if hasattr(entry.data, "ds_tensor"):
                    # The parameter is taken apart again below; the checkpoint keeps the whole one.
                    parameter, entry.data = entry.data, entry.data.data
                    setattr(entry.data, _PARAMETER, parameter)
            return state

    def load_state_dict(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with whole_parameters([self], keep_changes=True):
            return load(*args, **kwargs)

    model.sharded_state_dict = MethodType(sharded_state_dict, model)
    model.load_state_dict = MethodType(load_state_dict, model)
