"""Takes a job over from DeepSpeed: reads universal checkpoints into a model that runs under any plan.

Parameters are found by their names in Megatron's distributed checkpoint, whose metadata also says which part of
each belongs on this rank.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
)
from megatron.core.utils import unwrap_model

from galvatron_megatron.errors import PlanError
from galvatron_megatron.runtime.agreement import AgreedError, agree
from galvatron_megatron.runtime.checkpoint import CONTENT, ReshardableOptimizer, settings_of
from galvatron_megatron.runtime.checkpoint_stretches import PREFIX
from galvatron_megatron.runtime.universal_files import LossScale, UniversalCheckpoint
from galvatron_megatron.runtime.vocabulary import Vocabulary


@dataclass(kw_only=True, frozen=True, slots=True)
class Progress:
    """How far the job had come that saved a checkpoint."""

    steps: int
    """Of its optimizer: those skipped for an overflow do not count."""
    iteration: int
    samples: int | None
    """That it had trained on; None where the checkpoint does not say."""
    scheduled_samples: int | None
    """That the schedule of its learning rate had counted; None where the checkpoint does not say."""
    loss_scale: LossScale | None
    """State of its dynamic loss scaler, where it had one."""
    warning: str | None
    """What it did otherwise than this job will, as far as known."""


def reading_universal(original: Callable[..., tuple], directory: str | Path, args: Any) -> Callable[..., tuple]:
    """Megatron's ``setup_model_and_optimizer``, which then goes on where a universal checkpoint stands.

    Besides weights and optimizer states, the iteration, the position in the data and the learning rate's
    schedule are the checkpoint's: its engine's counters say how many iterations and samples there were.

    Args:
        original: the function.
        directory: the universal checkpoint.
        args: Megatron's validated arguments.
    """

    @wraps(original)
    def build(*given: Any, **named: Any) -> tuple:
        model, optimizer, scheduler = original(*given, **named)
        vocabulary = Vocabulary.of_job(args.make_vocab_size_divisible_by)
        found = load_universal_checkpoint(directory, model, optimizer, vocabulary)
        args.iteration = found.iteration
        args.consumed_train_samples = found.samples or found.iteration * args.global_batch_size
        scheduled = found.scheduled_samples
        scheduler.step(increment=args.consumed_train_samples if scheduled is None else scheduled)
        if args.rank == 0:
            print(
                f"galvatron: universal checkpoint {directory}: {found.steps} steps of the optimizer; goes on "
                f"behind iteration {args.iteration} and sample {args.consumed_train_samples}",
                flush=True,
            )
            if found.warning is not None:
                print(f"galvatron: warning: {found.warning}", file=sys.stderr, flush=True)
        return model, optimizer, scheduler

    return build


def load_universal_checkpoint(
    directory: str | Path, chunks: list[Any], optimizer: Any, vocabulary: Vocabulary
) -> Progress:
    """Takes weights, Adam's states, step count and a dynamic loss scale over; all ranks call this together.

    Learning rate, weight decay and a constant loss scale stay as the job's arguments have set them. Nothing is
    taken over before everything is read on all ranks.

    Args:
        directory: the universal checkpoint.
        chunks: the model chunks of this rank, wrapped or not.
        optimizer: of a job with an attached plan.
        vocabulary: of this job.

    Raises:
        PlanError: files are missing, damaged, of another model, or not data; or the optimizer cannot take them.
            The same on every rank.
    """
    if not isinstance(optimizer, ReshardableOptimizer):
        raise PlanError(
            "universal checkpoint: this job's optimizer cannot take it; valid: Adam under a plan, and what "
            "distributed checkpoints take (--ckpt-format torch_dist)"
        )
    models = unwrap_model(chunks)
    parts = {
        f"model{index}": model.sharded_state_dict(metadata=dict(CONTENT)) for index, model in enumerate(models)
    }
    form = optimizer.sharded_state_dict(parts, is_loading=True, metadata=dict(CONTENT))
    state = {**parts, "states": form["param_state"]}
    progress = _together(lambda: _read(directory, state, vocabulary))
    for index, model in enumerate(models):
        model.load_state_dict(state[f"model{index}"])
    settings = settings_of(optimizer)
    for group in settings["optimizer"]["param_groups"]:
        group["step"] = progress.steps
    if progress.loss_scale is not None and settings.get("grad_scaler"):
        settings["grad_scaler"] = _continued(settings["grad_scaler"], progress.loss_scale, optimizer)
    optimizer.take_states(state["states"], settings)
    return progress


def _continued(scaler: dict[str, Any], found: LossScale, optimizer: Any) -> dict[str, Any]:
    """State of Megatron's dynamic loss scaler that goes on from another's, inside this job's window."""
    scalers = (getattr(each, "grad_scaler", None) for each in optimizer.chained_optimizers)
    own = next(each for each in scalers if each is not None)
    return {
        "scale": torch.full_like(scaler["scale"], found.scale),
        "growth_tracker": min(found.growth, own.growth_interval - 1),
        "hysteresis_tracker": min(found.hysteresis, own.hysteresis),
    }


@dataclass(kw_only=True, frozen=True, slots=True)
class _Read:
    """What one rank has read of a checkpoint."""

    progress: Progress
    used: frozenset[str]
    """Folders that it took parameters from."""
    trained: frozenset[str]
    """Folders of all trained parameters."""


def _together(read: Callable[[], _Read]) -> Progress:
    """Reads on every rank and fails on all or none: loading gathers, and others would wait for a failed rank.

    A file may be missing, or another one, on one node alone.
    """
    mine, problem = None, ""
    try:
        mine = read()
    except PlanError as error:
        problem = str(error)
    everyone = agree(problem, mine)
    first = everyone[0]
    if any((found.progress, found.trained) != (first.progress, first.trained) for found in everyone):
        raise AgreedError(
            "universal checkpoint: ranks read different ones; valid: one folder that all nodes see"
        )
    if left := sorted(first.trained.difference(*(found.used for found in everyone))):
        raise AgreedError(
            f"universal checkpoint: it trains {left[0]} ({len(left)} such), which this model has not; valid: "
            "the model's arguments (layers, biases, norms, tied embeddings) as they were"
        )
    return first.progress


def _read(directory: str | Path, state: dict[str, Any], vocabulary: Vocabulary) -> _Read:
    files = UniversalCheckpoint(directory)
    progress = Progress(
        steps=files.steps(),
        iteration=files.iteration(),
        samples=files.samples(),
        scheduled_samples=files.scheduled_samples(),
        loss_scale=files.loss_scale(),
        warning=files.warning(),
    )
    used: set[str] = set()
    _fill(state, _reader(files, used, vocabulary))
    return _Read(progress=progress, used=frozenset(used), trained=files.trained())


def _fill(state: dict[str, Any], read: Callable[[ShardedTensor], torch.Tensor]) -> None:
    """Replaces every entry of a form by this rank's part of what is read."""
    factories, _ = extract_matching_values(
        state, lambda entry: isinstance(entry, ShardedTensorFactory), return_lists_as_dicts=True
    )
    apply_factories(state)

    def value(entry: Any) -> Any:
        if isinstance(entry, ShardedTensor):
            return read(entry)
        return entry.data if isinstance(entry, ShardedObject) else entry

    dict_list_map_inplace(value, state)
    apply_factory_merges(state, factories)


def _reader(
    source: UniversalCheckpoint, used: set[str], vocabulary: Vocabulary
) -> Callable[[ShardedTensor], torch.Tensor]:
    whole = lru_cache(maxsize=2)(source.tensor)

    def read(entry: ShardedTensor) -> torch.Tensor:
        state, _, name = entry.key.removeprefix(PREFIX).partition(".")
        if not entry.key.startswith(PREFIX):
            state, name = "param", entry.key
        found = whole(name, state)
        used.add(source.folder_of(name))
        axes = entry.prepend_axis_num
        shape, offset = entry.global_shape[axes:], entry.global_offset[axes:]
        if found.shape != torch.Size(shape) and found.dim() == 1:
            # Flat, as ZeRO 3 leaves it, and no file of the engine says its shape.
            length = prod(shape[1:])
            found = found.reshape(-1, *shape[1:]) if found.numel() % length == 0 else found
        if entry.allow_shape_mismatch and found.shape[1:] == torch.Size(shape[1:]) and len(found) != shape[0]:
            vocabulary.check(len(found), f"universal checkpoint: {name}", source.tensor_parallel)
            found = _padded(found, shape[0])
        if tuple(found.shape) != tuple(shape):
            raise PlanError(
                f"universal checkpoint: {name} is {tuple(found.shape)}; valid: {tuple(shape)}, as here"
            )
        for axis, (start, size) in enumerate(zip(offset, entry.local_shape, strict=True)):
            found = found.narrow(axis, start, size)
        if entry.data is None:
            return found.clone()
        return found.to(device=entry.data.device, dtype=entry.data.dtype, copy=True)

    return read


def _padded(found: torch.Tensor, rows: int) -> torch.Tensor:
    """An embedding with another number of padding rows, none of which is ever a token."""
    if len(found) >= rows:
        return found[:rows]
    return torch.cat([found, found.new_zeros(rows - len(found), *found.shape[1:])])
