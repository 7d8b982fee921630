"""What a job holds right after it has read a universal checkpoint; on ranks only."""

import numpy as np
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model
from runtime_job import gather_whole, run_case

from galvatron_megatron.runtime import universal
from galvatron_megatron.runtime.checkpoint import CONTENT


def live_states(chunks, optimizer):
    """Whole main weights and Adam's states on every rank, by their names in checkpoints."""
    parts = {
        f"model{index}": model.sharded_state_dict(metadata=dict(CONTENT))
        for index, model in enumerate(unwrap_model(chunks))
    }
    form = optimizer.sharded_state_dict(parts, is_loading=True, metadata=dict(CONTENT))["param_state"]
    apply_factories(form)
    mine = []
    for entry in nested_values(form):
        if isinstance(entry, ShardedTensor):
            axes = entry.prepend_axis_num
            where = entry.global_shape[axes:], entry.global_offset[axes:]
            mine.append((entry.key, *map(tuple, where), entry.data.detach().float().numpy().copy()))
    return gather_whole(mine)


def scaler_of(optimizer):
    """State of the loss scaler, None without one."""
    scalers = (getattr(each, "grad_scaler", None) for each in optimizer.chained_optimizers)
    scaler = next((each for each in scalers if each is not None), None)
    return scaler and {name: float(value) for name, value in scaler.state_dict().items()}


def train_on(rank, world_size, case):
    """Trains a case that goes on from a universal checkpoint; besides what it saw, what it began with."""
    held = {}
    load, reading = universal.load_universal_checkpoint, universal.reading_universal

    def loading(directory, chunks, optimizer, vocabulary):
        progress = load(directory, chunks, optimizer, vocabulary)
        held["states"] = live_states(chunks, optimizer)
        held["scalers"] = [scaler_of(optimizer)]
        return progress

    def reading_on(original, directory, args):
        build = reading(original, directory, args)

        def built(*given, **named):
            model, optimizer, scheduler = build(*given, **named)
            held["place"] = args.iteration, args.consumed_train_samples, scheduler.num_steps
            held["optimizer"] = optimizer
            return model, optimizer, scheduler

        return built

    universal.load_universal_checkpoint, universal.reading_universal = loading, reading_on
    try:
        seen = run_case(case)
    finally:
        universal.load_universal_checkpoint, universal.reading_universal = load, reading
    held["scalers"].append(scaler_of(held.pop("optimizer")))
    return seen | held if rank == 0 else None


def refused(rank, world_size, cases):
    """Runs cases that must not begin; the line of each on this rank, and the exit code.

    A case may name another checkpoint for one rank (``of_rank``).
    """
    return [_refused(rank, case) for case in cases]


def _refused(rank, case):
    load = universal.load_universal_checkpoint
    unchanged = []

    def loading(directory, chunks, optimizer, vocabulary):
        before = live_states(chunks, optimizer), scaler_of(optimizer)
        try:
            return load(directory, chunks, optimizer, vocabulary)
        finally:
            after = live_states(chunks, optimizer), scaler_of(optimizer)
            same = [np.array_equal(after[0][name], value) for name, value in before[0].items()]
            unchanged.append(all(same) and before[1] == after[1])

    universal.load_universal_checkpoint = loading
    try:
        run_case(case | {"universal": case.get("of_rank", {}).get(rank, case["universal"])})
    except SystemExit as end:
        return str(end.__context__), end.code, unchanged
    finally:
        universal.load_universal_checkpoint = load
    return "not refused", 0, unchanged
