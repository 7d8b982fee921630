"""Whole parameters where ZeRO 3 keeps parts of them: for who reads or writes weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

STAYS_WHOLE = "stays whole"
"""Stands among the modules that are using a parameter which is not let go when they are through."""


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
