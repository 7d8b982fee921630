"""Layers that exchange heads for sequence (Ulysses), built and fed as the runtime does it."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec

from galvatron_megatron.runtime.rotary import take_rows
from galvatron_megatron.runtime.ulysses import UlyssesCoreAttention


def exchanging(spec: Any, group: dist.ProcessGroup) -> Any:
    """The same spec with the runtime's Ulysses attention around every core attention in it.

    Args:
        spec: of a layer, a block of layers or a stack of typed layers; left unchanged.
        group: ranks that split the sequence.
    """
    if isinstance(spec, list | tuple):
        return type(spec)(exchanging(part, group) for part in spec)
    if isinstance(spec, type) or not dataclasses.is_dataclass(spec):
        return spec
    names = ["submodules"]
    if not isinstance(spec, ModuleSpec):
        names = [field.name for field in dataclasses.fields(spec)]
    replaced = {name: exchanging(getattr(spec, name), group) for name in names}
    core = replaced.get("core_attention")
    if core is not None:
        replaced["core_attention"] = ModuleSpec(
            module=UlyssesCoreAttention, params={"builder": core, "group": group}
        )
    return dataclasses.replace(spec, **replaced)


def hold_slices(decoder: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Gives the layers this rank's slice of the sequence, and the rotary embedding of its positions.

    Args:
        decoder: of the model; its output is the slice too.
        group: ranks that split the sequence, in its order.
    """

    def cut(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        whole = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rows = whole.size(0) // group.size()
        start = group.rank() * rows
        fitted = {**kwargs, "rotary_pos_emb": take_rows(kwargs.get("rotary_pos_emb"), ((start, start + rows),))}
        if "hidden_states" in kwargs:
            return args, {**fitted, "hidden_states": whole[start : start + rows]}
        return (whole[start : start + rows], *args[1:]), fitted

    decoder.register_forward_pre_hook(cut, with_kwargs=True)
