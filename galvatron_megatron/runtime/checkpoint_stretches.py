"""Sharded optimizer states in checkpoints as the stretches that ranks keep: nothing is gathered.

An optimizer that shards keeps, of each parameter, a stretch of consecutive elements. Stock Megatron gathers
whole buckets of states on the device, and all of them in host memory of every rank, before it saves them in the
form that fits every layout (``DistributedOptimizer.get_parameter_state_dp_zero``), and asks for whole tensors
when it loads them. Here each rank describes its stretches as blocks of the whole tensors, at most 2n - 1 for n
axes, which are views of the states themselves: they are written and read where they lie. The checkpoint holds
the same tensors under the same names, in other pieces.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

STATES = ("exp_avg", "exp_avg_sq")
"""Adam's states, by their names in checkpoints."""
PREFIX = "optimizer.state."
"""In front of a state's name, behind which the parameter's follows."""
MAIN = "param"
"""Name of a parameter's fp32 main weight among its states."""

_PARAMETER, _ENTRY = "galvatron_parameter", "galvatron_entry"

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and sizes, by axis."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Stretch:
    """Consecutive elements of a parameter whose states this rank keeps."""

    number: int
    """Of the parameter, in the order in which checkpoints number those of an optimizer."""
    parameter: torch.nn.Parameter
    """Of the model."""
    start: int
    """First element, in the parameter laid out flat."""
    tensors: dict[str, torch.Tensor]
    """Flat fp32 main weights (``param``) and states by name; what is loaded is written into them."""

    @property
    def stop(self) -> int:
        """Behind the last element."""
        return self.start + self.tensors[MAIN].numel()


def entries_by_parameter(model_sharded_state_dict: Any) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """The model's checkpoint entries by the identity of their parameter.

    Args:
        model_sharded_state_dict: of the model chunks, with the parameters themselves in it, or pieces of them.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    found = {}
    for entry in nested_values(sharded):
        parameter = getattr(entry.data, _PARAMETER, entry.data)
        found[id(parameter)] = entry if parameter is entry.data else getattr(parameter, _ENTRY)
    return found


def stand_for(
    parameter: torch.nn.Parameter,
    entry: ShardedTensor | ShardedTensorFactory,
    pieces: dict[str, ShardedTensor],
) -> dict[str, ShardedTensor]:
    """Lets the pieces of a weight stand for its parameter, whose optimizer asks for the entry of all of it.

    Args:
        parameter: of the model.
        entry: of the parameter as a whole; its data may be without elements.
        pieces: of the parameter.

    Returns:
        The pieces.
    """
    setattr(parameter, _ENTRY, entry)
    for piece in pieces.values():
        setattr(piece.data, _PARAMETER, parameter)
    return pieces


def blocks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Block]:
    """The fewest rectangular blocks that hold a stretch of a tensor's elements.

    Args:
        shape: of the tensor.
        start: first element, laid out flat.
        stop: behind the last one.

    Yields:
        Blocks, each of consecutive elements, in their order.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # rows that are inside as a whole
    if first > last:  # inside a single row
        yield from _inside(shape, last, start, stop)
        return
    yield from _inside(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _inside(shape, last, last * row, stop)


def _inside(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Block]:
    """Blocks of a stretch inside one row of a tensor."""
    before = index * prod(shape[1:])
    for offset, sizes in blocks(shape[1:], start - before, stop - before):
        yield (index, *offset), (1, *sizes)


def checkpoint_entries(
    stretches: Iterable[Stretch], entries: dict[int, ShardedTensor | ShardedTensorFactory]
) -> dict[int, dict[str, dict[str, ShardedTensor]]]:
    """Checkpoint entries of main weights and states, views of them.

    Args:
        stretches: of an optimizer on this rank; ranks that keep the same weights share them out.
        entries: the model's checkpoint entries by the identity of their parameter.

    Returns:
        By the parameter's number, name of the state, and position in the parameter laid out flat.
    """
    found: dict[int, dict[str, dict[str, ShardedTensor]]] = {}
    for stretch in stretches:
        entry = entries[id(stretch.parameter)]
        for name in stretch.tensors:
            kept = found.setdefault(stretch.number, {}).setdefault(name, {})
            kept |= stretch_pieces(entry, stretch, name, prefix=f"{PREFIX}{name}.")
    return found


def stretch_pieces(
    entry: ShardedTensor | ShardedTensorFactory, stretch: Stretch, name: str, *, prefix: str = ""
) -> dict[str, ShardedTensor]:
    """Checkpoint entries of one tensor of a stretch, views of it, by position in the parameter laid out flat.

    Args:
        entry: of the parameter as a whole; its data may be without elements.
        stretch: what this rank keeps.
        name: of the tensor.
        prefix: in front of the names that the parameter has in the checkpoint.
    """
    flat, found = stretch.tensors[name].detach(), {}
    for position, piece in _pieces(entry, stretch):
        data = flat.narrow(0, position - stretch.start, prod(piece.local_shape)).view(piece.local_shape)
        found[str(position)] = replace(piece, key=f"{prefix}{piece.key}", data=data, dtype=data.dtype)
    return found


def take_entries(stretches: Iterable[Stretch], loaded: dict[int, dict[str, dict[str, torch.Tensor]]]) -> None:
    """Takes states over from a checkpoint.

    Args:
        stretches: of an optimizer on this rank.
        loaded: what ``checkpoint_entries`` returned, filled; names that are left out stay as they are.
    """
    for stretch in stretches:
        for name in stretch.tensors:
            take_pieces(stretch, name, loaded[stretch.number].get(name, {}))


@torch.no_grad()
def take_pieces(stretch: Stretch, name: str, loaded: dict[str, torch.Tensor]) -> None:
    """Takes one tensor of a stretch over from a checkpoint.

    Args:
        stretch: what this rank keeps.
        name: of the tensor.
        loaded: what ``stretch_pieces`` returned, filled; pieces of other stretches are left alone.
    """
    flat = stretch.tensors[name].detach()
    for position, values in loaded.items():
        offset = int(position) - stretch.start
        if 0 <= offset < flat.numel():
            flat.narrow(0, offset, values.numel()).copy_(values.reshape(-1))


def _pieces(
    entry: ShardedTensor | ShardedTensorFactory, stretch: Stretch
) -> Iterator[tuple[int, ShardedTensor]]:
    """A stretch as pieces of the checkpoint's tensors, without data, by position in the flat parameter."""
    for whole, first in _parts(entry):
        begin, end = max(stretch.start, first), min(stretch.stop, first + prod(whole.local_shape))
        leading = (1,) * whole.prepend_axis_num
        for offset, sizes in blocks(tuple(whole.local_shape), begin - first, end - first):
            inside = sum(index * prod(whole.local_shape[axis + 1 :]) for axis, index in enumerate(offset))
            shifts = zip(whole.global_offset, (*(0 for _ in leading), *offset), strict=True)
            yield (
                first + inside,
                replace(
                    whole,
                    local_shape=(*leading, *sizes),
                    global_offset=tuple(start + shift for start, shift in shifts),
                    axis_fragmentations=None,  # no regular grid
                    prepend_axis_num=0,
                    # Of ranks that keep the same weights, each has stretches of its own.
                    replica_id=(*whole.replica_id[:2], 0),
                ),
            )


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """Tensors of the checkpoint that a parameter is, without data, and where in the parameter they begin."""
    if isinstance(entry, ShardedTensor):
        yield entry.without_data(), 0
        return
    # What a factory takes apart, such as both halves of a gated layer, is seen in the views that it takes.
    probe = torch.empty(entry.data.shape, device="meta")
    for built in nested_values([replace(entry, data=probe).build()]):
        if built.data.untyped_storage()._cdata != probe.untyped_storage()._cdata:
            raise RuntimeError(f"{built.key}: is no view of its parameter {entry.key}")
        yield from _consecutive(built)


def _consecutive(part: ShardedTensor) -> Iterator[tuple[ShardedTensor, int]]:
    """A view of a parameter as tensors of consecutive elements: itself, or its rows."""
    data = part.data
    if data.is_contiguous():
        yield part.without_data(), data.storage_offset()
        return
    axis = part.prepend_axis_num
    for row in range(data.shape[0]):
        offset = list(part.global_offset)
        offset[axis] += row
        inner = replace(
            part,
            data=data[row],
            local_shape=tuple(data.shape[1:]),
            global_offset=tuple(offset),
            axis_fragmentations=None,
            prepend_axis_num=axis + 1,
        )
        yield from _consecutive(inner)


class StretchOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer, whose fully reshardable form is made of its own stretches.

    ``--distrib-optim-fully-reshardable-mem-efficient`` asks for Megatron's way of gathering, and gets it.
    """

    @classmethod
    def adopt(cls, optimizer: DistributedOptimizer) -> None:
        """Makes an optimizer one of these.

        Args:
            optimizer: as Megatron built it.
        """
        optimizer.__class__ = cls

    def stretches(self) -> Iterator[Stretch]:
        """What this rank keeps, in the order and with the numbers of Megatron's fully reshardable form.

        Yields:
            Stretches with views of the states; there must be states.
        """
        number = -1
        for ranges, buffer in zip(self.gbuf_ranges, self.buffers, strict=True):
            (buckets,) = ranges.values()
            own = {
                parameter: found["param"]
                for bucket in buckets
                for parameter, found in bucket["param_map"].items()
            }
            for parameter in buffer.param_index_map:
                number += 1
                if parameter in own:
                    states = self._get_main_param_and_optimizer_states(parameter)
                    yield Stretch(
                        number=number,
                        parameter=parameter,
                        start=own[parameter].start,
                        tensors={name: states[name] for name in (MAIN, *STATES)},
                    )

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict | None = None
    ) -> Any:
        """Checkpoint entries of all states.

        Args:
            model_sharded_state_dict: of the model chunks, with the parameters themselves in it.
            is_loading: to be filled from a checkpoint.
            metadata: Megatron's description of the checkpoint's content.
        """
        if (metadata or {}).get("distrib_optim_fully_reshardable_mem_efficient") and not is_loading:
            return super().sharded_param_state_fully_reshardable(model_sharded_state_dict, is_loading, metadata)
        return checkpoint_entries(self.stretches(), entries_by_parameter(model_sharded_state_dict))
