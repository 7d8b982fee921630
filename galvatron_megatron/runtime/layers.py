"""A Megatron layer that runs as its plan says: own groups, own config, own layout, own recomputation."""

import copy
import dataclasses
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.spec_utils import ModuleSpec

from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy
from galvatron_megatron.runtime.context import LayerContext, RuntimeContext, StateClass
from galvatron_megatron.runtime.context_parallel import GatheredCoreAttention, is_local_attention
from galvatron_megatron.runtime.experts import experts_config, planned_experts, take_experts
from galvatron_megatron.runtime.latent_attention import planned_attention
from galvatron_megatron.runtime.norms import allow_sequence_parallel
from galvatron_megatron.runtime.rotary import take_rows
from galvatron_megatron.runtime.stacked_layers import without_grid
from galvatron_megatron.runtime.ulysses import UlyssesCoreAttention

_HEAD_NORMS = ("q_layernorm", "k_layernorm")
"""Norms inside a head: replicated over tp, each rank's gradient comes from its own heads only. Those of
multi-latent attention have such names too, and see the latent in front of the heads."""


def layer_config(config: Any, strategy: Strategy, *, is_local: bool = True) -> Any:
    """A copy of Megatron's config for one layer.

    Args:
        config: Megatron's transformer config of the model.
        strategy: how the layer runs.
        is_local: its core attention is Megatron's own, which knows nothing of context parallelism.
    """
    own = copy.copy(config)
    own.tensor_model_parallel_size = strategy.weight_shards
    own.sequence_parallel = strategy.sequence_parallel is SequenceParallel.MEGATRON
    own.qk_layernorm = getattr(config, "planned_qk_layernorm", config.qk_layernorm)
    if strategy.cp > 1:
        own.masked_softmax_fusion = False  # the fused kernel takes as many keys as queries
        if not is_local:
            own.context_parallel_size = strategy.cp
    own.recompute_granularity = None
    if strategy.recompute is Recompute.SELECTIVE:
        own.recompute_granularity = "selective"
        own.recompute_modules = ["core_attn"]
    return own


def planned_spec(spec: ModuleSpec, context: RuntimeContext, index: int | None = None) -> ModuleSpec:
    """Wraps the spec of a layer that Megatron's builder chose.

    Args:
        spec: of a layer: ``TransformerLayer`` or a class derived from it.
        context: the plan on this rank.
        index: of the layer in the model; None where the layer tells it by its global layer number.

    Returns:
        The spec of the same layer that runs as planned.
    """
    params = {**(spec.params or {}), "runtime": context, "layer_index": index}
    return ModuleSpec(module=planned_class(spec.module), params=params, submodules=spec.submodules)


@lru_cache(maxsize=32)
def planned_class(layer_class: type) -> type:
    """The planned version of a layer class; still a subclass of it, as Megatron asks with isinstance."""
    return type(
        f"Planned{layer_class.__name__}", (PlannedLayer, layer_class), {"__doc__": PlannedLayer.__doc__}
    )


def _planned_submodules(submodules: Any, context: LayerContext) -> Any:
    """A layer's submodules with norms that allow slices and, under Ulysses, attention that exchanges heads."""
    replaced = {}
    for field in dataclasses.fields(submodules):
        value = getattr(submodules, field.name)
        if isinstance(value, ModuleSpec) and dataclasses.is_dataclass(value.submodules):
            value = dataclasses.replace(value, submodules=_planned_submodules(value.submodules, context))
            value = planned_attention(value, context)
        elif field.name == "mlp" and isinstance(value, partial):
            value = planned_experts(value, context)
        elif field.name == "core_attention" and context.strategy.sequence_parallel is SequenceParallel.ULYSSES:
            value = ModuleSpec(
                module=UlyssesCoreAttention, params={"builder": value, "group": context.sequence_group}
            )
        elif field.name == "core_attention" and context.strategy.cp > 1 and is_local_attention(value):
            value = ModuleSpec(
                module=GatheredCoreAttention,
                params={"builder": value, "layout": context.layout, "rank": context.rank},
            )
        replaced[field.name] = allow_sequence_parallel(value)
    return dataclasses.replace(submodules, **replaced)


def _is_local(submodules: Any) -> bool:
    """Whether a layer's core attention is Megatron's own."""
    attention = getattr(submodules, "self_attention", None)
    core = getattr(getattr(attention, "submodules", None), "core_attention", None)
    return is_local_attention(core)


class PlannedLayer:
    """Runs a Megatron layer by its own strategy; stands in front of the layer's class."""

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int = 1,
        *,
        runtime: RuntimeContext,
        layer_index: int | None,
        **options: Any,
    ) -> None:
        """Builds the layer with its own config copy and groups.

        Args:
            config: Megatron's transformer config of the model.
            submodules: specs of the layer's parts.
            layer_number: as Megatron numbers layers, from 1.
            runtime: the plan on this rank.
            layer_index: of the layer in the model; None for ``layer_number - 1``.
            **options: passed on to the layer's class, except its groups.
        """
        context = runtime.layer(layer_number - 1 if layer_index is None else layer_index)
        options["pg_collection"] = context.groups
        drawn = context.strategy.expert_ranks if context.draws_experts else None
        with context.streams.initialising(context.strategy.weight_shards, expert_ranks=drawn):
            super().__init__(
                experts_config(layer_config(config, context.strategy, is_local=_is_local(submodules)), context),
                _planned_submodules(submodules, context),
                layer_number,
                **options,
            )
        self._planned = context
        self.state_class = StateClass.of(context.strategy)
        self.expert_class = StateClass.of_experts(context.strategy)
        self.expert_parameters = take_experts(self)
        self.summed_over_tp: list[torch.nn.Parameter] = []
        """Parameters whose gradient each tp rank computes in part: summed over this layer's tp group."""
        shared_out = set(map(id, self.expert_parameters))
        head_norms = () if self.config.multi_latent_attention else _HEAD_NORMS
        for name, parameter in self.named_parameters():
            if id(parameter) in shared_out:
                continue
            partial_gradient = self.config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
            if partial_gradient or any(norm in name for norm in head_norms):
                self.summed_over_tp.append(parameter)
            # Megatron would sum gradients with this mark over the base layout's tp group.
            parameter.sequence_parallel = False

    @property
    def tensor_group(self) -> torch.distributed.ProcessGroup:
        """Ranks that share out this layer's weights."""
        return self._planned.groups.tp

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Brings the input into the layer's layout, computes, and leaves the output where the plan says.

        Args:
            hidden_states: [sequence, batch, hidden] tile in the layout of the layer in front.
            *args: passed on.
            **kwargs: passed on; attention mask and rotary embedding fitted to the layer's layout.

        Returns:
            What the layer's class returns.
        """
        context = self._planned
        hidden_states = context.reshard_input(hidden_states)
        self._fit(hidden_states, kwargs)
        if context.strategy.recompute is Recompute.FULL and self.training and torch.is_grad_enabled():
            output, rest = self._recomputed(hidden_states, args, kwargs)
        else:
            output, rest = self._computed(hidden_states, args, kwargs)
        output = context.reshard_output(output)
        return output if rest is None else (output, *rest)

    def _computed(
        self, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """The layer's own forward pass; its first output and the others, None where it returns one alone."""
        with self._planned.streams.computing(self._planned.layout):
            result = super().forward(hidden_states, *args, **kwargs)
        return (result[0], tuple(result[1:])) if isinstance(result, tuple) else (result, None)

    def _recomputed(
        self, hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """Computes keeping only the input; the backward pass computes again."""
        rest: list[tuple[Any, ...] | None] = []

        def run(activation: torch.Tensor) -> torch.Tensor:
            output, others = self._computed(activation, args, kwargs)
            rest.append(others)
            return output

        output = tensor_parallel.checkpoint(run, False, hidden_states)
        others = rest[0]
        if others is not None and any(isinstance(value, torch.Tensor) for value in others):
            raise RuntimeError(f"{type(self).__name__} returns more than one tensor and cannot be recomputed")
        return output, others

    def _fit(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Fits what Megatron computed in the base layout to this layer's tile, in place."""
        context = self._planned
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.size(0) not in (1, hidden_states.size(1)):
            # Without --reset-attention-mask (refused otherwise) all samples have the same mask.
            kwargs["attention_mask"] = mask[:1]
        rotary = kwargs.get("rotary_pos_emb")
        if rotary is not None and context.own_positions is not context.base:
            length = hidden_states.size(0) * context.layout.sequence_parts
            rows = context.own_positions.positions(context.rank, length)
            kwargs["rotary_pos_emb"] = take_rows(rotary, rows)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        """The layer's part of a distributed checkpoint, with this layer's own replicas.

        Args:
            prefix: of the keys.
            sharded_offsets: of the layer among all layers.
            metadata: Megatron's checkpoint metadata.

        Returns:
            Checkpoint entries. Where the checkpoint stacks all layers into one tensor, as stock Megatron's do,
            each says where it lies: layers that differ are cut differently.
        """
        metadata = {**(metadata or {}), "dp_cp_group": self._planned.groups.dp_cp}
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return without_grid(entries) if sharded_offsets else entries
