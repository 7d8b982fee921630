"""The files of DeepSpeed's universal checkpoints, read as data.

Layout, as ``deepspeed.checkpoint.ds_to_universal`` of DeepSpeed 0.19 writes it: ``latest_universal`` names a
folder; in it

* ``zero/<parameter>/fp32.pt``, ``exp_avg.pt`` and ``exp_avg_sq.pt`` hold a mapping with the tensor over all
  ranks under ``param`` (ZeRO 1, 2) or the tensor itself, flat (ZeRO 3);
* ``zero/<parameter>/step.pt`` is the number of the optimizer's steps (ZeRO 1, 2);
* ``zero/optimizer_state.pt`` is what the optimizer keeps beside tensors: the loss scaler, and under ZeRO 3 the
  steps;
* ``*_model_states.pt`` are the engine's own files, with its counters, the shapes of parameters and what the job
  added to them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from galvatron_megatron.errors import PlanError
from galvatron_megatron.runtime.megatron_deepspeed_names import MegatronDeepSpeedNames, fields_of

LATEST = "latest_universal"
_FILES = {"param": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_NORMS = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
"""Norms as checkpoints name them, and as models do that keep them apart from the linear behind them."""
UNREADABLE = (
    UnpicklingError,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)
"""What torch raises on files that are damaged, not its own, or more than data."""


@dataclass(kw_only=True, frozen=True, slots=True)
class LossScale:
    """State of a dynamic loss scaler, counted as Megatron's ``DynamicGradScaler`` counts."""

    scale: float
    growth: int
    """Steps since the scale last changed; -1 behind an overflow, where DeepSpeed waits for one step more."""
    hysteresis: int
    """Overflows left before the scale falls."""


class _Inert:
    """Stands in for an object of a class that files name: takes whatever it is built from, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update((name, value) for name, value in state.items() if isinstance(name, str))


class UniversalCheckpoint:
    """One universal checkpoint. Nothing in its files is run: they are data, or they are refused."""

    def __init__(self, directory: str | Path) -> None:
        """Finds the files.

        Args:
            directory: with a ``latest_universal`` file, or the folder itself that it names.

        Raises:
            PlanError: there is no universal checkpoint.
        """
        folder = Path(directory)
        try:
            if (folder / LATEST).is_file():
                folder = folder / (folder / LATEST).read_text().strip()
            self.folder = folder / "zero"
            self.names = frozenset(path.name for path in self.folder.iterdir() if path.is_dir())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PlanError(
                f"universal checkpoint {directory}: no {LATEST} file and no zero folder; valid: the output "
                "folder of deepspeed's ds_to_universal"
            ) from error
        except (OSError, ValueError) as error:
            raise PlanError(
                f"universal checkpoint {directory}: cannot be read ({_reason(error)}); valid: a readable folder"
            ) from error
        if not self.names:
            raise PlanError(f"universal checkpoint {self.folder}: empty; valid: a complete one")
        self._foreign = MegatronDeepSpeedNames.of(self.names, lambda: self._header.get("args"))

    def folder_of(self, name: str) -> str:
        """The folder of a parameter.

        Args:
            name: in Megatron's distributed checkpoint.

        Raises:
            PlanError: there is none.
        """
        other = name
        for saved, built in _NORMS:
            other = other.replace(saved, built)
        foreign = self._foreign.folder_of(name) if self._foreign is not None else None
        for candidate in (name, other, f"module.{name}", f"module.{other}", foreign):
            if candidate in self.names:
                return candidate
        raise PlanError(
            f"universal checkpoint {self.folder}: no parameter {name}; valid: one of a Megatron-core or "
            "Megatron-DeepSpeed GPT of these layers"
        )

    def tensor(self, name: str, state: str) -> torch.Tensor:
        """A whole tensor, in the order of Megatron-core; its file is mapped, not copied.

        Args:
            name: of the parameter in Megatron's distributed checkpoint.
            state: ``param``, ``exp_avg`` or ``exp_avg_sq``.

        Raises:
            PlanError: it is missing or not readable as data.
        """
        path = self.folder / self.folder_of(name) / f"{_FILES[state]}.pt"
        found = _load(path)
        found = found.get("param") if isinstance(found, dict) else found
        if not isinstance(found, torch.Tensor):
            raise PlanError(f"universal checkpoint: {path} holds no tensor; valid: one under 'param'")
        found = found.detach()
        if found.dim() == 1:
            found = self._shaped(self.folder_of(name), found, path)
        return found if self._foreign is None else self._foreign.in_order(name, found)

    def _shaped(self, folder: str, flat: torch.Tensor, path: Path) -> torch.Tensor:
        """A tensor that ZeRO 3 leaves flat, in the shape that the engine says; without its files, as it is."""
        shape = self._shapes.get(folder)
        if shape is None or self.tensor_parallel > 1:
            return flat
        if flat.numel() != prod(shape):
            raise PlanError(
                f"universal checkpoint: {path} has {flat.numel()} elements, but the engine's files say "
                f"{tuple(shape)}; valid: a complete one"
            )
        return flat.view(shape)

    def warning(self) -> str | None:
        """What the job that saved it did otherwise than this one will; None where nothing is known."""
        return None if self._foreign is None else self._foreign.warning()

    @property
    def tensor_parallel(self) -> int:
        """Degree of the job that saved it; 1 where nothing says."""
        dimensions = self._header.get("checkpoint_parallel_dimensions")
        found = dimensions.get("tp_degree") if isinstance(dimensions, dict) else None
        found = found or self._header.get("mp_world_size")
        return found if isinstance(found, int) and found > 0 else 1

    def trained(self) -> frozenset[str]:
        """Folders of the parameters that were trained."""
        return frozenset(name for name in self.names if (self.folder / name / "exp_avg.pt").is_file())

    def steps(self) -> int:
        """How many steps the optimizer had made; the same for all parameters.

        Raises:
            PlanError: the checkpoint does not say.
        """
        for name in sorted(self.names):
            path = self.folder / name / "step.pt"
            if path.is_file():
                return _count(_load(path), path)
        path = self.folder / "optimizer_state.pt"
        if path.is_file():
            step = next(_steps_in(_load(path, inert=True)), None)
            if step is not None:
                return _count(step, path)
        raise PlanError(f"universal checkpoint {self.folder}: no step.pt; valid: with optimizer states")

    def iteration(self) -> int:
        """Iterations that the job had made: what it said itself, or the engine's count, or the optimizer's.

        Raises:
            PlanError: the checkpoint does not say, or not as a number.
        """
        for key in ("iteration", "global_steps"):
            if self._header.get(key):
                return _count(self._header[key], self.folder.parent)
        return self.steps()

    def samples(self) -> int | None:
        """Samples that the job had trained on: its own count, or the engine's; None without both."""
        found = fields_of(self._header.get("args")).get("consumed_train_samples")
        found = found or self._header.get("global_samples")
        return _count(found, self.folder.parent) if found else None

    def scheduled_samples(self) -> int | None:
        """Samples that the schedule of the learning rate had counted: not those of skipped steps.

        Megatron's own schedule, which Megatron-DeepSpeed gives the engine, says it (``num_steps``). Otherwise
        it follows from the engine's counts; None without these.
        """
        schedule = self._header.get("lr_scheduler")
        if isinstance(schedule, dict) and schedule.get("num_steps"):
            return _count(schedule["num_steps"], self.folder.parent)
        samples, made = self.samples(), self._header.get("global_steps")
        if samples is None or not made:
            return samples
        made = _count(made, self.folder.parent)
        skipped = _count(self._header.get("skipped_steps", 0), self.folder.parent)
        return samples - samples * min(skipped, made) // made

    def loss_scale(self) -> LossScale | None:
        """State of the dynamic loss scaler; None where the job had none.

        DeepSpeed's scale grows in a step for which ``cur_iter - last_overflow_iter - 1`` is a multiple of
        ``scale_window`` above 0 (``deepspeed/runtime/fp16/loss_scaler.py``), Megatron's in the one that makes
        its count of good steps equal to the window.

        Raises:
            PlanError: the scaler's state is not readable.
        """
        path = self.folder / "optimizer_state.pt"
        kept = _load(path, inert=True) if path.is_file() else None
        fields = fields_of(kept.get("loss_scaler") if isinstance(kept, dict) else None)
        if "scale_window" not in fields:
            return None
        names = ("cur_iter", "last_overflow_iter", "scale_window", "cur_hysteresis")
        values = [fields.get(name) for name in names]
        scale = fields.get("cur_scale")
        if not all(isinstance(value, int) for value in values) or not isinstance(scale, int | float):
            raise PlanError(f"universal checkpoint: {path}: no complete loss scaler; valid: DeepSpeed's own")
        made, overflow, window, hysteresis = values
        good = made - overflow - 1
        growth = (good - 1) % window if good > 0 else -1
        return LossScale(scale=float(scale), growth=growth, hysteresis=hysteresis)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of parameters by folder, as the engine's own files say them."""
        groups = self._header.get("param_shapes")
        groups = [groups] if isinstance(groups, dict) else groups
        return {
            name: tuple(shape)
            for group in groups or ()
            if isinstance(group, dict)
            for name, shape in group.items()
            if isinstance(shape, tuple)
        }

    @cached_property
    def _header(self) -> Mapping[str, Any]:
        """What the engine saved beside the states; empty where its files are not there."""
        files = sorted(self.folder.parent.glob("*_model_states.pt"))
        found = _load(files[0], inert=True) if files else {}
        return found if isinstance(found, dict) else {}


def _load(path: Path, *, inert: bool = False) -> Any:
    """The content of a file; tensors are mapped from it.

    Args:
        path: the file.
        inert: objects of classes are taken as their fields instead of being refused.
    """
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if inert else []
        with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise PlanError(f"universal checkpoint: {path} is missing; valid: a complete one") from error
    except UNREADABLE as error:
        raise PlanError(
            f"universal checkpoint: {path} cannot be read as data ({_reason(error)}); valid: tensors and "
            "numbers"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _count(found: Any, path: Path) -> int:
    found = found.get("param") if isinstance(found, dict) else found
    if isinstance(found, torch.Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, int | float) or found < 0 or found != int(found):
        told = found if isinstance(found, int | float | str) else type(found).__name__
        raise PlanError(f"universal checkpoint: {path}: {told!r} for a number of steps; valid: an integer >= 0")
    return int(found)


def _steps_in(found: Any) -> Iterator[Any]:
    """Step counts in what an optimizer keeps, wherever it does: by parameter, or by group."""
    if isinstance(found, dict):
        if "step" in found:
            yield found["step"]
        for value in found.values():
            yield from _steps_in(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _steps_in(value)
