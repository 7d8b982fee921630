"""Bytes that a rank holds of weights, gradients and optimizer states: from live tensors, and as predicted."""

from pathlib import Path

import torch
from megatron.core import parallel_state

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.estimate import estimate_plan
from galvatron_megatron.cost.host_memory import stage_host_bytes
from galvatron_megatron.cost.options import run_options
from galvatron_megatron.describe.cluster import read_cluster
from galvatron_megatron.integration.job_model import job_model
from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.runtime.checkpoint_stretches import STATES
from galvatron_megatron.runtime.zero import ZeroPart

CLUSTER = Path(__file__).parents[2] / "configs" / "clusters" / "a100-80g.yaml"
KINDS = {"weights": "weights", "gradients": "gradients", "optimizer states": "optimizer"}
"""Terms of an estimate."""


def storages(tensors):
    """Bytes by storage: views of the same memory count once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def predicted(args, plan, late):
    """What the cost model says that each pipeline rank holds, by kind.

    Args:
        args: Megatron's, before its validation.
        plan: of the job.
        late: arguments that are set behind that validation.
    """
    options = run_options(vars(args) | late)
    costs = AnalyticCostModel(job_model(args, {}), read_cluster(CLUSTER), options)
    found = []
    for stage, host in zip(estimate_plan(plan, costs).stages, stage_host_bytes(plan, costs), strict=True):
        terms = {term.name: term.value for term in stage.memory_terms if term.name in KINDS}
        assert sum(terms.values()) == stage.state_bytes
        found.append({kind: terms.get(name, 0) for name, kind in KINDS.items()} | {"host": host})
    return found


def whole_of(part):
    """Parameters that ZeRO 3 keeps whole beside their shards."""
    return [p for engine in getattr(part, "engines", ()) for p in getattr(engine, "whole", ())]


def weights_of(part):
    """Weights as this rank keeps them between passes."""
    if not isinstance(part, ZeroPart):
        return [parameter.data for parameter in part.module.parameters()]
    weights = [getattr(parameter, "ds_tensor", parameter).data for parameter in part.parameters]
    return weights + [parameter.data for parameter in whole_of(part)]


def gradients_of(part):
    """Gradients as they are kept until the step."""
    if not isinstance(part, ZeroPart):
        return [buffer.grad_data for buffer in (*part.buffers, *part.expert_parallel_buffers)]
    return [engine.gradient(i) for engine in part.engines for i in range(len(engine.partitions))]


def whole_gradients(part):
    """Gradients as the backward passes leave them on the parameters, before ZeRO 1 reduces them."""
    found = [getattr(p, name, None) for p in part.parameters for name in ("grad", "grad_accum")]
    return [gradient for gradient in found if gradient is not None]


def reachable(thing, seen=None):
    """Every tensor that DeepSpeed keeps in an engine but what is transient.

    That are its buckets for reduction, and parameters of stage 3 that are whole where their shards count.
    """
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # kept, so that nothing else gets its number
    if isinstance(thing, torch.Tensor):
        is_gathered = hasattr(thing, "ds_tensor")
        if thing.device.type != "meta" and thing.numel() > 1 and not is_gathered:
            yield thing.data  # step counts and verdicts are single numbers
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


def states_of(optimizer):
    """Main weights, moments, and the gradients the step works on, of all optimizers of a job."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(each, "is_stub_optimizer", False):
            continue
        for parameter in (p for group in each.optimizer.param_groups for p in group["params"]):
            yield parameter.data
            if parameter.grad is not None:
                yield parameter.grad
        for state in each.optimizer.state.values():
            yield from (t for name, t in state.items() if torch.is_tensor(t) and name != "step")


def live(chunks, optimizer):
    """Bytes of this rank by kind, every storage once; all that an engine of ZeRO keeps is among them."""
    parts = [
        (part, state_class)
        for chunk in chunks
        for state_class, part in getattr(chunk, "parts", {None: chunk}).items()
    ]
    host, everything = {}, storages(states_of(optimizer))
    for part, state_class in parts:
        everything |= storages(
            tensor for engine in getattr(part, "engines", ()) for tensor in reachable(engine)
        )
        if state_class is not None and state_class.offload is not Offload.NONE:
            host |= storages(on_host(part, state_class.offload))
    weights = storages(tensor for part, _ in parts for tensor in weights_of(part))
    gradients = storages(tensor for part, _ in parts for tensor in gradients_of(part))
    # ZeRO 1 of DeepSpeed has its own part of the gradients beside the whole ones until the step.
    accumulated = sum(
        max(sum(storages(gradients_of(part)).values()), getattr(part, "bytes_before_reduction", 0))
        for part, _ in parts
    )
    return {
        "weights": sum(size for at, size in weights.items() if at not in host),
        "gradients": accumulated,
        "optimizer": sum(size for at, size in everything.items() if at not in weights | gradients | host),
        "host": sum(host.values()),
    }


def count_before_reduction(part):
    """Keeps the bytes of whole gradients that a step ends with: ZeRO 1 reduces them then."""
    finish = part.finish_grad_sync

    def counted(*args, **kwargs):
        part.bytes_before_reduction = sum(storages(whole_gradients(part)).values())
        return finish(*args, **kwargs)

    part.finish_grad_sync = counted


def measure_at_norm(chunks, optimizer):
    """Measures whenever the gradient norm is taken: gradients are complete, nothing is released yet."""
    seen = {"stage": parallel_state.get_pipeline_model_parallel_rank()}
    norm = optimizer.get_grad_norm

    def measured():
        value = norm()
        seen.update(live(chunks, optimizer))
        return value

    optimizer.get_grad_norm = measured
    for chunk in chunks:
        for part in getattr(chunk, "parts", {}).values():
            if isinstance(part, ZeroPart):
                count_before_reduction(part)
    return seen
