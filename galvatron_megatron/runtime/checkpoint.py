"""Optimizer states in distributed checkpoints that any plan can load, whatever plan or Megatron saved them.

Stock Megatron keeps states in several forms. One knows nothing of how the job was parallel: what its
distributed optimizer saves with ``--dist-ckpt-optim-fully-reshardable``. Every state tensor has the name of its
parameter in the model's checkpoint (``optimizer.state.exp_avg.<name>``, ``optimizer.state.exp_avg_sq.<name>``,
``optimizer.state.param.<name>`` for the fp32 main weight) and is a piece of the whole tensor; what is not a
tensor is saved once. A job whose layers differ writes that form, with each layer under its own name; stock
Megatron reads it as its own. A job whose layers run alike leaves saving to Megatron. Both read this form and
that of Megatron's optimizer without sharding, which differs in the main weight's name alone.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
    param_group_identifier_keys,
)
from megatron.core.utils import log_single_rank

from galvatron_megatron.errors import PlanError
from galvatron_megatron.runtime.checkpoint_stretches import (
    MAIN,
    PREFIX,
    STATES,
    StretchOptimizer,
    checkpoint_entries,
    entries_by_parameter,
    take_entries,
)
from galvatron_megatron.runtime.zero_offload import step_count
from galvatron_megatron.runtime.zero_optimizer import ZeroOptimizer

_FORM = "distrib_optim_sharding_type"
_RESHARDABLE = "fully_reshardable"
CONTENT = {
    "non_homogeneous_layers": True,
    _FORM: _RESHARDABLE,
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
"""What the metadata of a checkpoint says, by which Megatron and this module know how to read it again.

Megatron stacks equal layers into one tensor with one grid of pieces, into which layers with different
tensor-parallel degrees do not fit: ``non_homogeneous_layers`` gives each layer its own name.
"""

_logger = logging.getLogger(__name__)
_UNSHARDED = "galvatron_states_of_unsharded_optimizer"
"""In the description of a loaded checkpoint: Megatron's optimizer without sharding saved its states."""
_SHARED_OUT = "is_expert_parallel"
_STATES = "param_state"
_READ = "read_by_parameter"
_FIXED = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
"""What Megatron's other forms do not let a job change."""
_Sharded = ShardedTensor | ShardedTensorFactory


class ReshardableOptimizer(ChainedOptimizer):
    """Megatron's chained optimizer, made to load what any plan and stock Megatron saved."""

    saves_by_parameter = False
    """Whether states are saved here: Megatron's own code cannot save those of layers that differ."""

    @classmethod
    def adopt(cls, optimizer: ChainedOptimizer) -> "ReshardableOptimizer":
        """Makes a chained optimizer load states from any plan.

        Args:
            optimizer: as Megatron built it.
        """
        adopted = copy.copy(optimizer)
        adopted.__class__ = cls
        adopted.keep_stretches()
        return adopted

    def keep_stretches(self) -> None:
        """Lets optimizers that shard save and load what they keep, where it lies."""
        for optimizer in self.chained_optimizers:
            if isinstance(optimizer, DistributedOptimizer):
                StretchOptimizer.adopt(optimizer)

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict | None = None, **_: Any
    ) -> dict[str, Any]:
        """States and settings of all optimizers for a distributed checkpoint.

        Args:
            model_sharded_state_dict: of the model chunks, with the parameters themselves in it.
            is_loading: only the form is wanted, to be filled from a checkpoint.
            metadata: Megatron's description of the checkpoint's content; states in a form that depends on how
                the job was parallel are left to Megatron.
        """
        metadata = metadata or {}
        here = metadata.get(_FORM) == _RESHARDABLE if is_loading else self.saves_by_parameter
        if not here:
            if not is_loading:
                # fp16 skips its first steps; a job under another plan looks for states all the same.
                for optimizer in self.chained_optimizers:
                    if not optimizer.is_stub_optimizer:
                        initialise_states(optimizer)
            return super().sharded_state_dict(model_sharded_state_dict, is_loading, metadata=metadata)
        entries = entries_by_parameter(model_sharded_state_dict)
        states = {}
        for index, optimizer in enumerate(self.chained_optimizers):
            if optimizer.is_stub_optimizer:
                continue
            initialise_states(optimizer)
            if isinstance(optimizer, StretchOptimizer | ZeroOptimizer):
                state = checkpoint_entries(optimizer.stretches(), entries)
            else:
                state = _whole_entries(_replicated_states(optimizer), entries)
            if is_loading and metadata.get(_UNSHARDED):
                _as_unsharded(state, entries)
            states[f"optimizer{index}"] = {str(number): tensors for number, tensors in state.items()}
        if is_loading:
            return {_STATES: states, _READ: LocalNonpersistentObject(True)}
        log_single_rank(
            _logger,
            logging.INFO,
            "optimizer states are saved in the form of Megatron's distributed optimizer: all plans read it, "
            "and stock Megatron does with --use-distributed-optimizer (not those of experts it shares out)",
        )
        return {**settings_of(self), "param_state_sharding_type": _RESHARDABLE, _STATES: states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over states and settings from a checkpoint.

        Args:
            state_dict: what ``sharded_state_dict`` returned, filled.
        """
        if not (isinstance(state_dict, dict) and state_dict.get(_READ)):
            super().load_state_dict(state_dict)
            return
        self.take_states(state_dict.get(_STATES, {}), _settings_in(state_dict))

    def take_states(self, states: dict[str, Any], settings: dict[str, Any]) -> None:
        """Takes over states and settings.

        Args:
            states: by optimizer, number of the parameter and name: tensors, or this rank's pieces of them where
                the optimizer shards, as ``sharded_state_dict`` described them.
            settings: as ``settings_of`` returns them.
        """
        for index, optimizer in enumerate(self.chained_optimizers):
            if optimizer.is_stub_optimizer:
                continue
            initialise_states(optimizer)
            # A class of parameters that this stage does not have leaves no trace in the checkpoint.
            loaded = {int(number): tensors for number, tensors in states.get(f"optimizer{index}", {}).items()}
            # Main weights that a checkpoint lacks are the model's, which are loaded.
            lacking = any(MAIN not in tensors for tensors in loaded.values())
            if lacking and not isinstance(optimizer, StretchOptimizer):  # whose are views of the model's
                optimizer.reload_model_params()
            if isinstance(optimizer, StretchOptimizer | ZeroOptimizer):
                take_entries(optimizer.stretches(), loaded)
            else:
                _take_replicated_states(optimizer, loaded)
            _take_settings(optimizer, settings)

    def save_parameter_state(self, filename: str) -> None:
        """Not used: states are in the distributed checkpoint.

        Raises:
            PlanError: always; the job asks for a checkpoint format without resharding.
        """
        raise PlanError("--ckpt-format: states of layers that differ need torch_dist; valid: torch_dist")

    load_parameter_state = save_parameter_state


def initialise_states(optimizer: MegatronOptimizer) -> None:
    """Creates the states of an optimizer that has not made a step yet: zeros, as at the first step."""
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.initialise_states()
        return
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        for state in inner.state.values():
            state.setdefault("step", torch.tensor(0.0, dtype=torch.float32))


def describe_loaded(original: Callable[..., tuple], *, runs_alike: bool) -> Callable[..., tuple]:
    """Makes Megatron describe to the optimizer what a checkpoint holds, before anything is loaded.

    Args:
        original: ``_load_base_checkpoint`` of ``megatron.training.checkpointing``, which first reads what is
            not sharded.
        runs_alike: Megatron's own code runs the plan, and so may read forms that fit one layout alone.
    """

    @wraps(original)
    def read(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> tuple:
        result = original(load_dir, args, *rest, **kwargs)
        common = result[0] if isinstance(result[0], dict) else {}
        metadata = common.get("content_metadata")
        if kwargs.get("sharded_state_dict") is not None or metadata is None:
            return result
        if _FORM not in metadata:
            # Megatron asks for the form wherever this job's optimizer is sharded, whatever the other's was.
            metadata |= {_FORM: _RESHARDABLE, _UNSHARDED: True}
        saved = common.get("args")
        skips = args.finetune or args.no_load_optim or getattr(saved, "no_save_optim", False)
        alike = runs_alike and all(getattr(saved, name, 1) == getattr(args, name) for name in _FIXED)
        if metadata[_FORM] != _RESHARDABLE and not skips and not alike:
            raise PlanError(
                f"checkpoint {load_dir}: its optimizer states have Megatron's form {metadata[_FORM]}, which "
                "fits one tp and pp alone; valid: save it with --dist-ckpt-optim-fully-reshardable, or load "
                "with --no-load-optim"
            )
        return result

    return read


def _parameters(optimizer: MegatronOptimizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of model parameter and main parameter (the one the inner optimizer steps)."""
    if not isinstance(optimizer, Float16OptimizerWithFloat16Params):
        return [(parameter, parameter) for parameter in optimizer.get_parameters()]
    pairs = []
    for models, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
        pairs += list(zip(models, mains, strict=True))
    return pairs + [(parameter, parameter) for group in optimizer.fp32_from_fp32_groups for parameter in group]


def _replicated_states(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Main weight and states of each parameter of an optimizer that does not shard."""
    for model, main in _parameters(optimizer):
        yield model, {MAIN: main.detach(), **{key: optimizer.optimizer.state[main][key] for key in STATES}}


def _whole_entries(
    states: Iterable[tuple[torch.Tensor, dict[str, torch.Tensor]]], entries: dict[int, _Sharded]
) -> dict[int, dict[str, _Sharded]]:
    """Checkpoint entries of main weights and states, by the parameter's number.

    Args:
        states: the model's parameters, and their tensors by name.
        entries: the model's checkpoint entries by the identity of their parameter.
    """
    return {
        number: {
            key: make_sharded_optimizer_tensor(entries[id(model)], tensor, prefix=f"{PREFIX}{key}")
            for key, tensor in tensors.items()
        }
        for number, (model, tensors) in enumerate(states)
    }


def _as_unsharded(states: dict[int, dict[str, Any]], entries: dict[int, _Sharded]) -> None:
    """Looks for main weights where Megatron's optimizer without sharding leaves them, in place.

    Those of weights in half precision are called ``optimizer.state.fp32_param.<name>``. Weights in fp32 are
    themselves the main weights: they are loaded with the model, before the optimizer's states are taken over.
    """
    in_fp32 = {entry.key for entry in entries.values() if entry.data.dtype == torch.float32}
    for tensors in states.values():
        main = tensors[MAIN]
        for entry in main.values() if isinstance(main, dict) else [main]:
            name = entry.key.removeprefix(f"{PREFIX}{MAIN}.")
            # A factory may give its tensors names behind the parameter's.
            if name in in_fp32 or name.rpartition(".")[0] in in_fp32:
                tensors.pop(MAIN, None)
            else:
                entry.key = f"{PREFIX}fp32_param.{name}"


@torch.no_grad()
def _take_replicated_states(optimizer: MegatronOptimizer, loaded: dict[int, dict[str, Any]]) -> None:
    for number, (_, main) in enumerate(_parameters(optimizer)):
        for key, values in loaded[number].items():
            (main if key == MAIN else optimizer.optimizer.state[main][key]).copy_(values)


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    """Kind of parameters: what their settings depend on, which is not whether Megatron shares experts out."""
    return tuple(group.get(key) for key in param_group_identifier_keys if key != _SHARED_OUT)


def _step_of(optimizer: MegatronOptimizer) -> int:
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return max((int(group.get("step", 0)) for group in optimizer.optimizer.param_groups), default=0)


def settings_of(chain: ChainedOptimizer) -> dict[str, Any]:
    """What is not a tensor, as Megatron's distributed optimizer saves it.

    Args:
        chain: the optimizers of a job.

    Returns:
        Step, learning rate and the like by kind of parameter, and the loss scaler's state where there is one.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    steps = [0]
    scaler = None
    for optimizer in chain.chained_optimizers:
        if optimizer.is_stub_optimizer:
            continue
        steps.append(_step_of(optimizer))
        scaler = scaler or getattr(optimizer, "grad_scaler", None)
        for group in optimizer.optimizer.param_groups:
            groups.setdefault(_identity(group), {key: v for key, v in group.items() if key != "params"})
    kept = [{**group, "step": max(steps)} for group in groups.values()]
    settings: dict[str, Any] = {"optimizer": {"param_groups": kept}}
    if scaler is not None:
        settings["grad_scaler"] = scaler.state_dict()
    return settings


def _settings_in(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What is not a tensor in a loaded checkpoint, in the form of ``settings_of``.

    Megatron's optimizers without sharding keep the step apart; several in a chain are numbered.
    """
    chained = [state_dict[number] for number in sorted(key for key in state_dict if isinstance(key, int))]
    groups: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"optimizer": {"param_groups": groups}}
    for saved in chained or [state_dict]:
        inner = saved.get("optimizer", saved)
        apart = inner.get("state", {}).get("common_step", 0)
        groups += [{**group, "step": int(group.get("step", apart))} for group in inner["param_groups"]]
        if "grad_scaler" in saved:
            settings["grad_scaler"] = saved["grad_scaler"]
    return settings


def _take_settings(optimizer: MegatronOptimizer, settings: dict[str, Any]) -> None:
    groups = settings["optimizer"]["param_groups"]
    saved = {_identity(group): group for group in groups}
    step = max(int(group["step"]) for group in groups)
    inner = optimizer.optimizer
    for group in inner.param_groups:
        if not group["params"] and not isinstance(optimizer, ZeroOptimizer):
            continue
        if _identity(group) not in saved:
            raise PlanError(f"checkpoint: no optimizer settings for parameters of kind {_identity(group)}")
        kept = ("params", "step", _SHARED_OUT)
        group.update({k: v for k, v in saved[_identity(group)].items() if k not in kept})
        if not isinstance(inner, torch.optim.Optimizer) or "step" in group:
            group["step"] = step
    for state in inner.state.values():
        if (counted := step_count(inner, step)) is not None:
            state["step"] = counted
    scaler = getattr(optimizer, "grad_scaler", None)
    if scaler is not None and "grad_scaler" in settings:
        scaler.load_state_dict(settings["grad_scaler"])
