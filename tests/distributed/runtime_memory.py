"""Bytes that a rank holds of weights, gradients and optimizer states, from the tensors that are there."""

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.training import checkpointing
from torch.utils._pytree import tree_leaves

from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.runtime.checkpoint_stretches import PREFIX, STATES
from galvatron_megatron.runtime.zero import ZeroPart

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "gather",
    "all_reduce",
    "broadcast",
    "reduce_scatter_tensor",
)


def storages(tensors):
    """Bytes by storage: views of the same memory count once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def own_tensors(part):
    """Weights as this rank keeps them between passes, and gradients as they are kept until the step."""
    if not isinstance(part, ZeroPart):
        weights = [parameter.data for parameter in part.module.parameters()]
        return weights, [buffer.grad_data for buffer in part.buffers], []
    weights = [getattr(parameter, "ds_tensor", parameter).data for parameter in part.parameters]
    weights += [parameter.data for parameter in whole_of(part)]
    gradients = [engine.gradient(i) for engine in part.engines for i in range(len(engine.partitions))]
    return weights, gradients, [partition.data for engine in part.engines for partition in engine.partitions]


def whole_of(part):
    """Parameters that ZeRO 3 keeps whole beside their shards."""
    return [p for engine in getattr(part, "engines", ()) for p in getattr(engine, "whole", ())]


def whole_gradients(part):
    """Gradients as the backward passes leave them on the parameters, before ZeRO 1 reduces them."""
    found = [getattr(p, name, None) for p in part.parameters for name in ("grad", "grad_accum")]
    return [gradient for gradient in found if gradient is not None]


def reachable(thing, seen=None):
    """Every tensor that DeepSpeed keeps in an engine but its buckets for reduction, which are transient."""
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # kept, so that nothing else gets its number
    if isinstance(thing, torch.Tensor):
        if thing.device.type != "meta" and thing.numel() > 1:  # step counts and verdicts are single numbers
            yield thing.data
        yield from reachable(getattr(thing, "ds_tensor", None), seen)
        yield from reachable(thing.grad if thing.is_leaf else None, seen)
    elif isinstance(thing, dict):
        yield from (found for each in list(thing.values()) for found in reachable(each, seen))
    elif isinstance(thing, list | tuple | set):
        yield from (found for each in list(thing) for found in reachable(each, seen))
    elif type(thing).__module__.startswith(("deepspeed", "galvatron", "torch.optim")):
        kept = {name: value for name, value in getattr(thing, "__dict__", {}).items() if name != "ipg_buckets"}
        yield from reachable(kept, seen)


def on_host(part, offload):
    """What an offloading engine keeps in host memory: main weights and their gradients, states, weights."""
    found = []
    for engine in part.engines:
        found += [t for partition in engine.partitions for t in (partition.data, partition.grad)]
        states = engine.optimizer.state.values()  # empty before the first step
        found += [state[name] for state in states for name in STATES if name in state]
        found += getattr(engine, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    if offload is Offload.PARAMETERS:
        found += [parameter.ds_tensor.data for parameter in part.parameters]
    return found


def live_offloaded(part, state_class):
    """Bytes of an offloaded class; what DeepSpeed keeps besides counts as optimizer states on the device."""
    host = storages(on_host(part, state_class.offload))
    weights, gradients, _ = own_tensors(part)
    weights = {at: size for at, size in storages(weights).items() if at not in host}
    gradients = storages(gradients)
    everything = storages(tensor for engine in part.engines for tensor in reachable(engine))
    assert host.keys() <= everything.keys() and gradients.keys() <= everything.keys()
    stray = everything.keys() - host.keys() - weights.keys() - gradients.keys()
    return {
        "weights": sum(weights.values()),
        "gradients": max(sum(gradients.values()), part.bytes_before_reduction),
        "optimizer": sum(everything[at] for at in stray),
        "host": sum(host.values()),
    }


def parameters_of(part):
    return part.parameters if isinstance(part, ZeroPart) else list(part.module.parameters())


def live(chunks, optimizer):
    """By class of parameters: their number here, replicas, and bytes of weights, gradients and states."""
    found = {}
    for number, state_class in enumerate(optimizer.state_classes):
        parts = [chunk.parts[state_class] for chunk in chunks]
        found[number] = {
            "class": (state_class.weight_shards, state_class.zero, state_class.offload),
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for part in parts for p in parameters_of(part)),
            "replicas": parts[0].dp_cp_group.size(),
            "whole": sum(p.ds_numel for part in parts for p in whole_of(part)),
        }
        if state_class.offload is not Offload.NONE:
            (part,) = parts
            found[number] |= live_offloaded(part, state_class)
            continue
        weights, gradients, mains = ([t for part in parts for t in own_tensors(part)[i]] for i in range(3))
        steppers = [
            stepper
            for stepper in optimizer.chained_optimizers
            if not stepper.is_stub_optimizer and serves(stepper, parts)
        ]
        states = [
            value
            for stepper in steppers
            for state in stepper.optimizer.state.values()
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and name != "step"
        ]
        mains += [p.data for s in steppers for group in s.optimizer.param_groups for p in group["params"]]
        kept = storages(weights)
        found[number] |= {
            "host": 0,
            "weights": sum(kept.values()),
            "gradients": sum(storages(gradients).values()),
            "optimizer": sum(n for at, n in storages(states + mains).items() if at not in kept),
        }
    return found


def serves(stepper, parts):
    """Whether an optimizer steps the parameters of these parts."""
    if hasattr(stepper, "engine"):
        return any(stepper.engine is engine for part in parts for engine in getattr(part, "engines", ()))
    mine = {id(parameter) for part in parts for parameter in parameters_of(part)}
    for name in ("model_float16_groups", "float16_groups"):
        for group in getattr(stepper, name, ()):
            if any(id(parameter) in mine for parameter in group):
                return True
    groups = getattr(stepper, "model_fp32_groups", None)
    if groups is None:
        groups = [group["params"] for group in stepper.optimizer.param_groups]
    return any(id(parameter) in mine for group in groups for parameter in group)


def count_before_reduction(part):
    """Keeps the bytes of whole gradients that a step ends with: ZeRO 1 reduces them then."""
    finish = part.finish_grad_sync

    def counted(*args, **kwargs):
        part.bytes_before_reduction = sum(storages(whole_gradients(part)).values())
        return finish(*args, **kwargs)

    part.finish_grad_sync = counted


def measure_at_norm(chunks, optimizer):
    """Measures whenever the gradient norm is taken: gradients are complete, nothing is released yet."""
    seen = {}
    norm = optimizer.get_grad_norm

    def measured():
        value = norm()
        seen.update(live(chunks, optimizer))
        return value

    optimizer.get_grad_norm = measured
    for chunk in chunks:
        for part in chunk.parts.values():
            if isinstance(part, ZeroPart):
                count_before_reduction(part)
    return seen


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
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(each, "is_stub_optimizer", False):
            continue
        yield from (p.data for group in each.optimizer.param_groups for p in group["params"])
        yield from (t for state in each.optimizer.state.values() for t in state.values() if torch.is_tensor(t))
        if hasattr(each, "engine"):
            yield from (partition.data for partition in each.engine.partitions)
