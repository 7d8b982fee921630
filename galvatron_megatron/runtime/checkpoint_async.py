"""Checkpoints that another process writes while training goes on (``--async-save``).

Megatron hands tensors over to a writer (``FileSystemWriterAsync``) that copies what is on the device, and views
of what is in host memory, before training goes on. A tensor in host memory that has its storage to itself it
shares with the other process and reads when it writes: states that ZeRO keeps there, and everything on CPU
ranks, would be saved with the changes of later steps in them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def hook_generate(original: Callable[..., dict]) -> Callable[..., dict]:
    """Makes Megatron give away copies of what the writer would read late.

    Args:
        original: ``generate_state_dict`` of ``megatron.training.checkpointing``, or a function like it.
    """

    @wraps(original)
    def generate(args: Any, *rest: Any, **named: Any) -> dict:
        state = original(args, *rest, **named)
        is_loading = (named.get("optim_sd_kwargs") or {}).get("is_loading")
        return state if is_loading or not args.async_save else dict_list_map_inplace(_apart, state)

    return generate


def _apart(entry: Any) -> Any:
    if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or not is_read_late(entry.data):
        return entry
    return replace(entry, data=entry.data.detach().clone())


def is_read_late(data: torch.Tensor | None) -> bool:
    """Whether the writer reads a tensor only when it writes.

    Args:
        data: of an entry of a checkpoint.
    """
    if data is None or data.device.type != "cpu":
        return False
    return data.untyped_storage().nbytes() == data.nbytes
