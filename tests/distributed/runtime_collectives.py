"""Every collective that keeps a job's states equal or sharded: what, when, among whom; imported on ranks only.

Recorded where all of them pass, in the methods of process groups, whoever asks for one and under whatever name.
"""

import sys
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.options import run_options
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.cost.sharded_states import is_sent_every_micro_batch
from galvatron_megatron.cost.sharding import BACKWARD, FORWARD, REDUCTION, UPDATE
from galvatron_megatron.describe.cluster import read_cluster
from galvatron_megatron.integration.job_model import job_model
from galvatron_megatron.plan.plan import Plan

CLUSTER = Path(__file__).parents[2] / "configs" / "clusters" / "a100-80g.yaml"

METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "gather": "gather",
    "scatter": "scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
}
"""Of a process group: what a cost model calls it. What is sent counts once, where it is sent."""

OTHER = (
    "/megatron/core/tensor_parallel/",
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megatron/core/transformer/moe/",
    "/megatron/core/fusions/",
    "/megatron/training/",
    "/galvatron_megatron/runtime/resharding.py",
    "/galvatron_megatron/runtime/ulysses.py",
    "/galvatron_megatron/runtime/context_parallel.py",
    "/galvatron_megatron/runtime/latent_attention.py",
    "/galvatron_megatron/runtime/norms.py",
    "/galvatron_megatron/runtime/vocabulary.py",
)
"""Code whose collectives move activations, losses or batches."""
STATES = (
    "/deepspeed/",
    "/megatron/core/distributed/",
    "/megatron/core/optimizer/",
    "/galvatron_megatron/runtime/",
)
"""Code whose collectives are of states; the code nearest to a collective tells."""
STATISTICS = (
    "get_grad_norm_fp32",
    "count_zeros_fp32",
    "prepare_grads",
    "logical_and_across_model_parallel_group",
)
"""Functions that exchange single numbers between reduction and update: norm, zeros, overflow."""
NUMBERS = "numbers"

Key = tuple[str, str, tuple[int, ...]]
"""When, kind, ranks."""
Recorded = dict[Key, list[int]]
"""Number and bytes; of a gather the output, of a reduction the input."""


def record_collectives(found: list[Recorded]) -> Callable[[], None]:
    """Notes from now on what is sent for states, step by step.

    Args:
        found: filled, one entry for each step from its beginning; the first one when a step begins.

    Returns:
        Undoes it.
    """
    plain = {name: getattr(ProcessGroup, name) for name in METHODS}

    def recording(name: str, kind: str) -> Callable[..., Any]:
        def recorded(self: ProcessGroup, *arguments: Any, **options: Any) -> Any:
            if found and self.size() > 1 and (when := _when()) is not None:
                key = (when, kind, tuple(dist.get_process_group_ranks(self)))
                entry = found[-1].setdefault(key, [0, 0])
                entry[0] += 1
                entry[1] += max(_sizes((*arguments, *options.values())), default=0)
            return plain[name](self, *arguments, **options)

        return recorded

    for name, kind in METHODS.items():
        setattr(ProcessGroup, name, recording(name, kind))

    def undo() -> None:
        for name, method in plain.items():
            setattr(ProcessGroup, name, method)

    return undo


def priced(args: Any, plan: Plan, late: dict[str, Any]) -> dict[Key, list[float]]:
    """What the cost model charges this rank for in a step: messages of layers, of the ends, all bytes,
    and how many messages these were if no two parts shared one.

    Args:
        args: Megatron's, before its validation.
        plan: of the job.
        late: arguments that are set behind that validation.
    """
    costs = AnalyticCostModel(job_model(args, {}), read_cluster(CLUSTER), run_options(vars(args) | late))
    setting, rank = Setting.of(plan), dist.get_rank()
    stage = rank // plan.base.ranks
    layers, ends, number = [], [], 0
    for place, chunk in enumerate(plan.stages):
        for layer in chunk.layers:
            if place % plan.pp == stage:
                layers.append(costs.priced_layer(number, layer.strategy, setting))
            number += 1
    if stage == 0:
        ends.append(costs.priced_embedding(setting))
    if stage == plan.pp - 1:
        ends.append(costs.priced_head(setting))
    found: dict[Key, list[float]] = {}
    entries = [(0, entry) for part in layers for entry in part.collectives]
    entries += [(1, entry) for part in ends for entry in part.collectives]
    if stage == 0 and plan.pp > 1:
        # What two stages send is priced with the last one.
        head = costs.priced_head(setting).collectives
        entries += [(1, entry) for entry in head if entry.stride >= plan.base.ranks]
    for whose, entry in entries:
        first = rank - rank // entry.stride % entry.ranks * entry.stride
        ranks = tuple(range(first, first + entry.ranks * entry.stride, entry.stride))
        times = plan.micro_batches if is_sent_every_micro_batch(entry.when) else 1
        total = found.setdefault((entry.when, entry.kind, ranks), [0, 0, 0, 0])
        total[whose] += times * entry.count
        total[2] += times * entry.count * entry.bytes
        # DeepSpeed gathers matrices and vectors of a class apart, and shards apart what two stages share.
        apart = 2 if entry.when == UPDATE or whose else 1
        total[3] += times * apart * max(1, ceil(entry.count))
    return found


def _sizes(arguments: tuple[Any, ...]) -> list[int]:
    """Bytes of each tensor, or all tensors of each list, among the arguments of a collective."""
    sizes = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            sizes.append(argument.numel() * argument.element_size())
        elif isinstance(argument, list | tuple):
            sizes.append(sum(_sizes(tuple(argument))))
    return sizes


def _when() -> str | None:
    """When, by the functions that are running; None for what is not sent for states."""
    frame, is_known = sys._getframe(2), False
    passes = FORWARD
    while frame is not None:
        name, path = frame.f_code.co_name, frame.f_code.co_filename
        if not is_known:
            if any(part in path for part in OTHER):
                return None
            is_known = any(part in path for part in STATES)
        if name in STATISTICS:
            return NUMBERS
        if is_known and "/megatron/core/distributed/param_and_grad_buffer" in path:
            # Once per step, in whatever pass it may be hidden.
            if name == "start_grad_sync":
                return REDUCTION
            if name == "start_param_sync":
                return UPDATE
        if name == "finalize_model_grads":
            return REDUCTION
        if name == "backward_step":
            passes = BACKWARD
        if name == "train_step":
            return passes
        if name == "step" and ("/optimizer/" in path or "/runtime/" in path):
            passes = UPDATE
        frame = frame.f_back
    return None
