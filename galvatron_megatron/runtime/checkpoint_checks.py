"""Checkpoints that are damaged or of another model, refused by all ranks in one line before anything is loaded.

Megatron's ranks read a distributed checkpoint each for itself. One that fails leaves the others in the next
collective, until the launcher or a timeout ends them. Here all ranks agree before and behind whatever may fail.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from galvatron_megatron.errors import PlanError
from galvatron_megatron.runtime.agreement import AgreedError, agree
from galvatron_megatron.runtime.universal_files import UNREADABLE
from galvatron_megatron.runtime.vocabulary import Vocabulary

_FIXED = ("num_layers", "hidden_size", "num_attention_heads")
"""Arguments that a job which goes on cannot change; Megatron looks at them too, once all is loaded."""
_UNREADABLE = (CheckpointingException, CheckpointException, *UNREADABLE)
"""What Megatron and torch raise on files that are missing, cut short or damaged."""
_MISSING_ALLOWED = ("log_all", "return_all", "ignore_all")
"""Values of ``--dist-ckpt-strictness`` under which a checkpoint may lack tensors of this model."""


class CheckedLoading:
    """Stands around Megatron's reading of one checkpoint."""

    def __init__(self) -> None:
        self._saved: Any = None
        """Arguments of the job that saved it."""
        self._place = ""

    def hook_read(self, original: Callable[..., tuple]) -> Callable[..., tuple]:
        """Checks what is read, twice: what is not sharded, then the rest.

        Args:
            original: ``_load_base_checkpoint`` of ``megatron.training.checkpointing``.
        """

        @wraps(original)
        def read(load_dir: Any, args: Any, *rest: Any, **named: Any) -> tuple:
            form = named.get("sharded_state_dict")
            if not dist.is_initialized() or not _is_seen_as_files(load_dir, args):
                return original(load_dir, args, *rest, **named)
            self._place = str(load_dir)
            folder = self._together(lambda: checkpoint_folder(load_dir, args), alike=True)
            if form is None or folder is None:
                result = self._together(lambda: original(load_dir, args, *rest, **named))
                common = result[0] if isinstance(result[0], dict) else {}
                self._saved = common.get("args")
                self._together(lambda: check_arguments(self._saved, args, load_dir))
                return result
            self._together(lambda: self._check_content(Path(folder), form, args))
            return original(load_dir, args, *rest, **named)

        return read

    def hook_load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Lets all ranks know when one could not read its part.

        Args:
            original: ``TorchDistLoadShardedStrategy.load``, which reads without a collective.
        """

        @wraps(original)
        def load(*given: Any, **named: Any) -> Any:
            if not dist.is_initialized():
                return original(*given, **named)
            return self._together(lambda: original(*given, **named))

        return load

    def _check_content(self, folder: Path, form: dict[str, Any], args: Any) -> None:
        if not (folder / ".metadata").is_file():
            raise PlanError(f"checkpoint {folder}: .metadata is missing; valid: a complete checkpoint")
        metadata = FileSystemReader(folder).read_metadata()
        check_files(folder, metadata.storage_data)
        shapes = {
            name: tuple(found.size)
            for name, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
        vocabulary = Vocabulary.of_job(args.make_vocab_size_divisible_by)
        check_shapes(
            folder,
            shapes,
            form,
            vocabulary,
            saved=self._saved,
            lacks_some=args.dist_ckpt_strictness in _MISSING_ALLOWED,
        )

    def _together(self, work: Callable[[], Any], *, alike: bool = False) -> Any:
        """Does a rank's work and raises on all ranks what it raised on any.

        Args:
            work: without a collective that a failing rank would leave others in.
            alike: ranks must get the same value.

        Raises:
            AgreedError: it went wrong on a rank, or values differ.
        """
        value, problem = None, ""
        try:
            value = work()
        except PlanError as error:
            problem = str(error)
        except _UNREADABLE as error:
            problem = (
                f"checkpoint {self._place}: cannot be read ({_reason(error)}); valid: a complete checkpoint of "
                "this model, or --ckpt-step for an earlier one"
            )
        if len(set(agree(problem, value if alike else None))) > 1:
            raise AgreedError(
                f"checkpoint {self._place}: ranks see different ones; valid: one folder that all nodes see"
            )
        return value


def checkpoint_folder(load_dir: Any, args: Any) -> str | None:
    """The folder of the iteration that is to be loaded; None where there is no checkpoint.

    Args:
        load_dir: ``--load``.
        args: Megatron's arguments.

    Raises:
        PlanError: the folder does not exist, or nothing tells which it is.
    """
    tracker = Path(get_checkpoint_tracker_filename(str(load_dir)))
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    if tracker.is_file() and text != "release" and not text.isdecimal():
        raise PlanError(
            f"checkpoint {tracker}: {text[:40]!r} for an iteration; valid: the number of one that is there"
        )
    step = getattr(args, "ckpt_step", None)
    if not step and not text:
        return None
    is_release = text == "release" and not step
    iteration = 0 if is_release else step or int(text)
    folder = Path(get_checkpoint_name(str(load_dir), iteration, is_release, return_base_dir=True))
    if not folder.is_dir():
        known = sorted(path.name for path in Path(load_dir).glob("iter_*"))
        raise PlanError(
            f"checkpoint {folder}: no such folder; valid: --ckpt-step for one of {', '.join(known) or 'none'}"
        )
    return str(folder)


def check_arguments(saved: Any, args: Any, place: Any) -> None:
    """Refuses a checkpoint of another model, as far as the arguments in it tell.

    Args:
        saved: arguments of the job that saved it, None where there are none.
        args: of this job.
        place: of the checkpoint.

    Raises:
        PlanError: they differ.
    """
    if saved is None or args.finetune:
        return
    for name in _FIXED:
        if name == "num_layers" and _pattern(args) and not _pattern(saved):
            continue  # a GPT's layers in a hybrid model, which has other ones
        before, here = getattr(saved, name, None), getattr(args, name)
        if before is not None and before != here:
            flag = name.replace("_", "-")
            raise PlanError(f"checkpoint {place}: --{flag} is {here}, but {before} in it; valid: {before}")


def check_files(folder: Path, stored: dict[Any, Any]) -> None:
    """Refuses a checkpoint whose files are missing or cut short.

    Args:
        folder: of the checkpoint.
        stored: where its pieces lie, as torch's metadata describe it.

    Raises:
        PlanError: names the first such file.
    """
    needed: dict[str, int] = {}
    for piece in stored.values():
        end = piece.offset + piece.length
        needed[piece.relative_path] = max(end, needed.get(piece.relative_path, 0))
    for name, size in sorted(needed.items()):
        file = folder / name
        if not file.is_file():
            raise PlanError(f"checkpoint {folder}: {name} is missing; valid: a complete checkpoint")
        if (found := file.stat().st_size) < size:
            raise PlanError(
                f"checkpoint {folder}: {name} has {found} of {size} bytes; valid: a complete checkpoint"
            )


def check_shapes(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    form: dict[str, Any],
    vocabulary: Vocabulary,
    *,
    saved: Any = None,
    lacks_some: bool = False,
) -> None:
    """Refuses a checkpoint whose tensors are not this model's.

    Args:
        folder: of the checkpoint.
        shapes: of its tensors.
        form: what this rank is to load.
        vocabulary: of this job.
        saved: arguments of the job that saved it, None where there are none.
        lacks_some: it may lack tensors.

    Raises:
        PlanError: names the first tensor that is missing or has another shape.
    """
    for entry in _entries(form):
        name, expected = entry.key, tuple(entry.global_shape)
        found = shapes.get(name)
        if found == expected or (found is None and lacks_some):
            continue
        if found is None:
            raise PlanError(
                f"checkpoint {folder}: no {name}; valid: the model's arguments (layers, biases, norms, tied "
                "embeddings, experts) as they were"
            )
        axis = entry.prepend_axis_num
        if not entry.allow_shape_mismatch or found[axis + 1 :] != expected[axis + 1 :]:
            raise PlanError(f"checkpoint {folder}: {name} is {found}; valid: {expected}, as here")
        vocabulary.check(
            found[axis],
            f"checkpoint {folder}: {name}",
            getattr(saved, "tensor_model_parallel_size", 1),
            divisor=getattr(saved, "make_vocab_size_divisible_by", None),
        )


def _entries(form: dict[str, Any]) -> Iterator[ShardedTensor]:
    """All tensors that a form describes, those that factories make included."""
    sharded, _ = extract_sharded_tensors_and_factories(form)
    for entry in nested_values(sharded):
        if isinstance(entry, ShardedTensorFactory):
            yield from nested_values([entry.build()])
        else:
            yield entry


def _is_seen_as_files(load_dir: Any, args: Any) -> bool:
    """Whether the checkpoint is a folder of torch's files, and no other is kept beside it."""
    return (
        load_dir is not None
        and "://" not in str(load_dir)
        and args.ckpt_format == "torch_dist"
        and not getattr(args, "non_persistent_ckpt_type", None)
    )


def _pattern(args: Any) -> str | None:
    return getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
