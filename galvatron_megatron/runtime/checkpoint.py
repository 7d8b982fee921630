"""Optimizer states in distributed checkpoints that any plan can load, whatever plan saved them.

Megatron saves states by optimizer object and by internal number, both of which depend on how the job was
parallel. Here every state tensor is saved under the name of its parameter in the model's checkpoint
(``optimizer.state.exp_avg.<name>``, ``optimizer.state.exp_avg_sq.<name>``, ``optimizer.state.param.<name>``
for the fp32 main weight), as a piece of the whole tensor; what is not a tensor is saved once. A job
whose plan leaves the work to Megatron also loads what Megatron saved without a plan, and saves in this form.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
    param_group_identifier_keys,
)

from galvatron_megatron.errors import PlanError
from galvatron_megatron.runtime.zero_offload import step_count
from galvatron_megatron.runtime.zero_optimizer import STATES, ZeroOptimizer
from galvatron_megatron.runtime.zero_whole import parameter_of

MARK = "galvatron_optimizer_states"
CONTENT = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    MARK: True,
}
"""What the metadata of a checkpoint says, by which Megatron and this module know how to read it again.

Megatron stacks equal layers into one tensor with one grid of pieces, into which layers with different
tensor-parallel degrees do not fit: ``non_homogeneous_layers`` gives each layer its own name.
"""

_Sharded = ShardedTensor | ShardedTensorFactory


class ReshardableOptimizer(ChainedOptimizer):
    """Megatron's chained optimizer with states that any plan can load; steps as Megatron's does."""

    @classmethod
    def adopt(cls, optimizer: ChainedOptimizer) -> "ReshardableOptimizer":
        """Makes a chained optimizer save its states in the reshardable form.

        Args:
            optimizer: as Megatron built it.
        """
        adopted = copy.copy(optimizer)
        adopted.__class__ = cls
        return adopted

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict | None = None, **_: Any
    ) -> dict[str, Any]:
        """States and settings of all optimizers for a distributed checkpoint.

        Args:
            model_sharded_state_dict: of the model chunks, with the parameters themselves in it.
            is_loading: only the form is wanted, to be filled from a checkpoint.
            metadata: Megatron's description of the checkpoint's content.

        Raises:
            PlanError: the checkpoint to load has states in another form, which this plan cannot read.
        """
        metadata = metadata or {}
        if is_loading and not metadata.get(MARK):
            return self._form_of_megatron(model_sharded_state_dict, metadata)
        entries = _by_tensor(model_sharded_state_dict)
        states = {}
        for index, optimizer in enumerate(self.chained_optimizers):
            if optimizer.is_stub_optimizer:
                continue
            initialise_states(optimizer)
            if isinstance(optimizer, DistributedOptimizer):
                state = optimizer.sharded_param_state_fully_reshardable(
                    model_sharded_state_dict, is_loading, {}
                )
            elif isinstance(optimizer, ZeroOptimizer):
                state = _checkpoint_entries(optimizer.whole_states(), entries)
            else:
                state = _checkpoint_entries(_replicated_states(optimizer), entries)
            states[f"optimizer{index}"] = {str(number): tensors for number, tensors in state.items()}
        return {"settings": _settings(self), "state": states}

    def _form_of_megatron(self, model_sharded_state_dict: Any, metadata: dict) -> dict[str, Any]:
        """The form in which to load what Megatron saved without a plan: Megatron's own."""
        return super().sharded_state_dict(model_sharded_state_dict, True, metadata=metadata)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over states and settings from a checkpoint.

        Args:
            state_dict: what ``sharded_state_dict`` returned, filled.
        """
        settings = state_dict.get("settings") if isinstance(state_dict, dict) else None
        if settings is None:
            super().load_state_dict(state_dict)
            return
        for index, optimizer in enumerate(self.chained_optimizers):
            if optimizer.is_stub_optimizer:
                continue
            initialise_states(optimizer)
            # A class of parameters that this stage does not have leaves no trace in the checkpoint.
            states = state_dict["state"].get(f"optimizer{index}", {})
            loaded = {int(number): tensors for number, tensors in states.items()}
            if isinstance(optimizer, DistributedOptimizer):
                for state in optimizer.optimizer.state.values():
                    state.pop("step", None)  # Megatron's loader takes every tensor here for a sharded one
                optimizer.load_parameter_state_from_fully_reshardable(loaded)
            elif isinstance(optimizer, ZeroOptimizer):
                optimizer.take_states(loaded)
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


def _by_tensor(model_sharded_state_dict: Any) -> dict[int, _Sharded]:
    """The model's checkpoint entries by the identity of their parameter."""
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    return {id(parameter_of(entry.data)): entry for entry in nested_values(sharded)}


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
        yield model, {"param": main.detach(), **{key: optimizer.optimizer.state[main][key] for key in STATES}}


def _checkpoint_entries(
    states: Iterable[tuple[torch.Tensor, dict[str, torch.Tensor]]], entries: dict[int, _Sharded]
) -> dict[int, dict[str, _Sharded]]:
    """Checkpoint entries of main weights and states, by the parameter's number.

    Args:
        states: the model's parameters, and their tensors by name.
        entries: the model's checkpoint entries by the identity of their parameter.
    """
    return {
        number: {
            key: make_sharded_optimizer_tensor(entries[id(model)], tensor, prefix=f"optimizer.state.{key}")
            for key, tensor in tensors.items()
        }
        for number, (model, tensors) in enumerate(states)
    }


@torch.no_grad()
def _take_replicated_states(optimizer: MegatronOptimizer, loaded: dict[int, dict[str, Any]]) -> None:
    for number, (_, main) in enumerate(_parameters(optimizer)):
        main.copy_(loaded[number]["param"])
        for key in STATES:
            optimizer.optimizer.state[main][key].copy_(loaded[number][key])


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in param_group_identifier_keys)


def _step_of(optimizer: MegatronOptimizer) -> int:
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return max((int(group.get("step", 0)) for group in optimizer.optimizer.param_groups), default=0)


def _settings(chain: ChainedOptimizer) -> dict[str, Any]:
    """What is not a tensor: step, learning rates and the like by kind of parameter, loss scale."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    steps = [0]
    scaler = None
    for optimizer in chain.chained_optimizers:
        if optimizer.is_stub_optimizer:
            continue
        steps.append(_step_of(optimizer))
        scaler = scaler or getattr(optimizer, "grad_scaler", None)
        for group in optimizer.optimizer.param_groups:
            kept = {key: value for key, value in group.items() if key not in ("params", "step")}
            groups.setdefault(_identity(group), kept)
    settings: dict[str, Any] = {"step": max(steps), "param_groups": list(groups.values())}
    if scaler is not None:
        settings["grad_scaler"] = scaler.state_dict()
    return settings


def _take_settings(optimizer: MegatronOptimizer, settings: dict[str, Any]) -> None:
    saved = {_identity(group): group for group in settings["param_groups"]}
    inner = optimizer.optimizer
    for group in inner.param_groups:
        if not group["params"] and not isinstance(optimizer, ZeroOptimizer):
            continue
        if _identity(group) not in saved:
            raise PlanError(f"checkpoint: no optimizer settings for parameters of kind {_identity(group)}")
        group.update({k: v for k, v in saved[_identity(group)].items() if k not in ("params", "step")})
        if not isinstance(inner, torch.optim.Optimizer) or "step" in group:
            group["step"] = settings["step"]
    for state in inner.state.values():
        if (step := step_count(inner, int(settings["step"]))) is not None:
            state["step"] = step
    scaler = getattr(optimizer, "grad_scaler", None)
    if scaler is not None and "grad_scaler" in settings:
        scaler.load_state_dict(settings["grad_scaler"])
