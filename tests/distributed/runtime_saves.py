"""What a checkpoint copies and sends while a job makes it ready."""

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.training import checkpointing
from runtime_memory import states_of, storages
from torch.utils._pytree import tree_leaves

from galvatron_megatron.runtime.checkpoint_stretches import PREFIX

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "gather",
    "all_reduce",
    "broadcast",
    "reduce_scatter_tensor",
)


def measure_saves(found, models, optimizer):
    """Notes, at every checkpoint, what of weights and optimizer states is copied and what is communicated.

    Args:
        found: filled, by checkpoint: bytes of states, bytes of states and weights outside the memory where
            optimizer and model keep them, elements of floating-point tensors that are handed to collectives
            while it is made ready.
        models: the model chunks.
        optimizer: of the job.

    Returns:
        Undoes it.
    """
    save, generate = dist_checkpointing.save, checkpointing.generate_state_dict
    names = [name for name in COLLECTIVES if hasattr(dist, name)]
    originals = {name: getattr(dist, name) for name in names}
    sent = []

    def counted(name):
        def call(*arguments, **options):
            tensors = tree_leaves((arguments, options))
            sent.append(
                sum(t.numel() for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())
            )
            return originals[name](*arguments, **options)

        return call

    def generated(*arguments, **options):
        sent.clear()
        for name in names:
            setattr(dist, name, counted(name))
        try:
            return generate(*arguments, **options)
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def saved(state, *arguments, **options):
        kinds = (ShardedTensor, ShardedTensorFactory)
        entries = [entry for entry in nested_values(state) if isinstance(entry, kinds)]
        weights = [p for model in models for p in model.parameters()]
        parts = (getattr(p, "ds_tensor", p).data for p in weights)
        kept = storages((*own_states(optimizer), *(p.data for p in weights), *parts))
        written = storages(entry.data for entry in entries)
        found.append(
            {
                "bytes": sum(entry.data.nbytes for entry in entries if entry.key.startswith(PREFIX)),
                "copied": sum(size for at, size in written.items() if at not in kept),
                "communicated": sum(sent),
            }
        )
        return save(state, *arguments, **options)

    dist_checkpointing.save, checkpointing.generate_state_dict = saved, generated

    def undo():
        dist_checkpointing.save, checkpointing.generate_state_dict = save, generate

    return undo


def own_states(optimizer):
    """Main weights and states of all optimizers of a job, as they keep them."""
    yield from states_of(optimizer)
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from (p.data for p in getattr(getattr(each, "engine", None), "partitions", ()))
