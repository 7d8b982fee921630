"""Reads DeepSpeed's universal checkpoints into a model that runs under any plan.

Layout, as ``deepspeed.checkpoint.ds_to_universal`` writes it: ``latest_universal`` names a folder; in it,
``zero/<parameter>/fp32.pt``, ``exp_avg.pt`` and ``exp_avg_sq.pt`` hold a mapping with the whole tensor, over
all ranks, under ``param``, and ``step.pt`` the number of steps. Parameters are found by their names in
Megatron's distributed checkpoint, whose metadata also says which part of each belongs on this rank.
"""

from collections.abc import Callable
from functools import lru_cache
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
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
from galvatron_megatron.runtime.checkpoint import CONTENT, ReshardableOptimizer, settings_of

LATEST = "latest_universal"
_FILES = {"param": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_PREFIX = "optimizer.state."
_NORMS = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
"""Norms as checkpoints name them, and as models do that keep them apart from the linear behind them."""


class UniversalCheckpoint:
    """The files of one universal checkpoint, read as data: what would need code to be unpickled is refused."""

    def __init__(self, directory: str | Path) -> None:
        """Finds the files.

        Args:
            directory: with a ``latest_universal`` file, or the folder itself that it names.

        Raises:
            PlanError: there is no universal checkpoint.
        """
        folder = Path(directory)
        latest = folder / LATEST
        if latest.is_file():
            folder = folder / latest.read_text().strip()
        self.folder = folder / "zero"
        if not self.folder.is_dir():
            raise PlanError(
                f"universal checkpoint {directory}: no {LATEST} file and no zero folder; valid: the output "
                "folder of deepspeed's ds_to_universal"
            )

    def _load(self, path: Path) -> Any:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise PlanError(f"universal checkpoint: {path} is missing; valid: a complete one") from error
        except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PlanError(
                f"universal checkpoint: {path} cannot be read as data ({reason}); valid: tensors and numbers"
            ) from error

    def _folder_of(self, name: str) -> Path:
        other = name
        for saved, built in _NORMS:
            other = other.replace(saved, built)
        for candidate in (name, other, f"module.{name}", f"module.{other}"):
            if (self.folder / candidate).is_dir():
                return self.folder / candidate
        raise PlanError(
            f"universal checkpoint {self.folder}: no parameter {name}; valid: one of a Megatron-core model of "
            "these layers"
        )

    def tensor(self, name: str, state: str) -> torch.Tensor:
        """A whole tensor.

        Args:
            name: of the parameter in Megatron's distributed checkpoint.
            state: ``param``, ``exp_avg`` or ``exp_avg_sq``.

        Raises:
            PlanError: it is missing or not readable as data.
        """
        path = self._folder_of(name) / f"{_FILES[state]}.pt"
        found = self._load(path)
        found = found.get("param") if isinstance(found, dict) else found
        if not isinstance(found, torch.Tensor):
            raise PlanError(f"universal checkpoint: {path} holds no tensor; valid: one under 'param'")
        return found

    def steps(self) -> int:
        """How many steps the optimizer had made; the same for all parameters."""
        paths = sorted(self.folder.glob("*/step.pt"))
        if not paths:
            raise PlanError(f"universal checkpoint {self.folder}: no step.pt; valid: with optimizer states")
        found = self._load(paths[0])
        return int(found["param"] if isinstance(found, dict) else found)


def load_universal_checkpoint(directory: str | Path, chunks: list[Any], optimizer: Any) -> int:
    """Takes weights, Adam's states and step count over; every rank of the job calls this together.

    Learning rate and weight decay stay as the job's arguments have set them.

    Args:
        directory: the universal checkpoint.
        chunks: the model chunks of this rank, wrapped or not.
        optimizer: of a job with an attached plan.

    Returns:
        Steps that were made.

    Raises:
        PlanError: files are missing, damaged, of other shapes, or not data; or the optimizer cannot take them.
    """
    if not isinstance(optimizer, ReshardableOptimizer):
        raise PlanError("universal checkpoint: this job's optimizer cannot take it; valid: a job with a plan")
    source = UniversalCheckpoint(directory)
    steps = source.steps()
    models = unwrap_model(chunks)
    parts = {
        f"model{index}": model.sharded_state_dict(metadata=dict(CONTENT)) for index, model in enumerate(models)
    }
    # States go first: making their form gathers what ZeRO sharded, as saving does.
    form = optimizer.sharded_state_dict(parts, is_loading=True, metadata=dict(CONTENT))
    state = {**parts, "states": form["param_state"]}
    problem = ""
    try:
        _fill(state, _reader(source))
    except PlanError as error:
        problem = str(error)
    # A file may be missing on one node alone; loading gathers, and the others would wait for its ranks.
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if problem := next(filter(None, problems), ""):
        raise PlanError(problem)
    for index, model in enumerate(models):
        model.load_state_dict(state[f"model{index}"])
    settings = settings_of(optimizer)
    for group in settings["optimizer"]["param_groups"]:
        group["step"] = steps
    optimizer.take_states(state["states"], settings)
    return steps


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


def _reader(source: UniversalCheckpoint) -> Callable[[ShardedTensor], torch.Tensor]:
    whole = lru_cache(maxsize=2)(source.tensor)

    def read(entry: ShardedTensor) -> torch.Tensor:
        state, _, name = entry.key.removeprefix(_PREFIX).partition(".")
        if not entry.key.startswith(_PREFIX):
            state, name = "param", entry.key
        found = whole(name, state)
        axes = entry.prepend_axis_num
        shape, offset = entry.global_shape[axes:], entry.global_offset[axes:]
        if len(found.shape) != len(shape):
            found = found.reshape(shape) if found.numel() == prod(shape) else found
        if tuple(found.shape) != tuple(shape):
            if not entry.allow_shape_mismatch or found.shape[1:] != torch.Size(shape[1:]):
                raise PlanError(
                    f"universal checkpoint: {name} is {tuple(found.shape)}; valid: {tuple(shape)}, as here"
                )
            # The vocabulary is padded to another number of rows; none of these is ever a token.
            padded = found.new_zeros(shape)
            rows = min(len(found), shape[0])
            padded[:rows] = found[:rows]
            found = padded
        for axis, (start, size) in enumerate(zip(offset, entry.local_shape, strict=True)):
            found = found.narrow(axis, start, size)
        if entry.data is None:
            return found.clone()
        return found.to(device=entry.data.device, dtype=entry.data.dtype, copy=True)

    return read
