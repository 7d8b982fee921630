"""Bytes that a rank holds of weights, gradients and optimizer states, from the tensors that are there."""

import torch

from galvatron_megatron.runtime.zero import ZeroPart


def storages(tensors):
    """Bytes by storage: views of the same memory count once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def own_tensors(part):
    """Weights as this rank keeps them between passes, and gradients as they are kept until the step."""
    if not isinstance(part, ZeroPart):
        weights = [parameter.data for parameter in part.module.parameters()]
        return weights, [buffer.grad_data for buffer in part.buffers], []
    weights = [getattr(parameter, "ds_tensor", parameter).data for parameter in part.parameters]
    gradients = [engine.gradient(i) for engine in part.engines for i in range(len(engine.partitions))]
    return weights, gradients, [partition.data for engine in part.engines for partition in engine.partitions]


def parameters_of(part):
    return part.parameters if isinstance(part, ZeroPart) else list(part.module.parameters())


def live(chunks, optimizer):
    """By class of parameters: their number here, replicas, and bytes of weights, gradients and states."""
    found = {}
    for number, state_class in enumerate(optimizer.state_classes):
        parts = [chunk.parts[state_class] for chunk in chunks]
        weights, gradients, mains = ([t for part in parts for t in own_tensors(part)[i]] for i in range(3))
        count = sum(getattr(p, "ds_numel", p.numel()) for part in parts for p in parameters_of(part))
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
        found[number] = {
            "class": (state_class.weight_shards, state_class.zero),
            "parameters": count,
            "replicas": parts[0].dp_cp_group.size(),
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


def measure_at_norm(chunks, optimizer):
    """Measures whenever the gradient norm is taken: gradients are complete, nothing is released yet."""
    seen = {}
    norm = optimizer.get_grad_norm

    def measured():
        value = norm()
        seen.update(live(chunks, optimizer))
        return value

    optimizer.get_grad_norm = measured
    return seen
