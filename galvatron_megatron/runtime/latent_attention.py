"""Multi-latent attention in layers that differ: Megatron's class with the layer's own groups.

Megatron 0.19 gathers and cuts the compressed queries and keys over its global tp group, and builds a query
projection that is not compressed on it. The gradient of the one rotary key has a part from the heads of every
tp rank; Megatron's local layers leave it at the rank's own, here the parts are summed.
"""

import dataclasses
from functools import lru_cache
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from galvatron_megatron.runtime.context import LayerContext
from galvatron_megatron.runtime.rotary import OwnRotary


def planned_attention(spec: ModuleSpec, context: LayerContext) -> ModuleSpec:
    """The spec of a layer's attention, with the planned class where it is multi-latent.

    Args:
        spec: of any part of the layer.
        context: how the layer runs.
    """
    if not (isinstance(spec.module, type) and issubclass(spec.module, MLASelfAttention)):
        return spec
    params = {**(spec.params or {}), "planned": context}
    return ModuleSpec(module=_planned_class(spec.module), params=params, submodules=spec.submodules)


@lru_cache(maxsize=8)
def _planned_class(attention_class: type) -> type:
    bases = (PlannedLatentAttention, attention_class)
    return type(f"Planned{attention_class.__name__}", bases, {"__doc__": PlannedLatentAttention.__doc__})


class PlannedLatentAttention:
    """Runs Megatron's multi-latent attention in a layer's own groups; stands in front of its class."""

    def __init__(self, config: Any, *args: Any, planned: LayerContext, **options: Any) -> None:
        """Builds the attention.

        Args:
            config: the layer's own copy of Megatron's config.
            *args: passed on.
            planned: how the layer runs.
            **options: passed on.
        """
        super().__init__(config, *args, **options)
        if planned.own_positions is not planned.base:
            self.rotary_pos_emb = OwnRotary(self.rotary_pos_emb, planned)
            self.config.apply_rope_fusion = False  # its kernels take positions from tables of their own

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Megatron's choice of classes; a query projection that is not compressed gets the layer's group."""
        chosen = super()._resolve_qk_norm_config(submodules)
        if self.config.q_lora_rank is None:
            query, group = chosen["linear_q_proj"], {"tp_group": self.pg_collection.tp}
            chosen["linear_q_proj"] = (
                dataclasses.replace(query, params={**(query.params or {}), **group})
                if isinstance(query, ModuleSpec)
                else ModuleSpec(module=query, params=group)
            )
        return chosen

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compressed queries, and keys and values with the rotary key, all as wide as on one rank.

        Args:
            hidden_states: [sequence tile, batch, hidden].

        Returns:
            Two tensors [sequence tile, batch, rank of the latent]; the second with the rotary key behind.
        """
        config, group = self.config, self.pg_collection.tp
        query = hidden_states
        if config.q_lora_rank is not None:
            query = self._whole(self.linear_q_down_proj(hidden_states)[0], config.q_lora_rank)
        latent = config.kv_lora_rank
        combined = self._whole(self.linear_kv_down_proj(hidden_states)[0], latent + config.qk_pos_emb_head_dim)
        if group.size() > 1 and not config.sequence_parallel:
            rotary = copy_to_tensor_model_parallel_region(combined[..., latent:], group=group)
            combined = torch.cat([combined[..., :latent], rotary], dim=-1)
        return query, combined

    def _whole(self, projected: torch.Tensor, width: int) -> torch.Tensor:
        """A latent of which column-parallel layers have computed a part for the whole sequence."""
        if projected.size(-1) == width:
            return projected
        group = self.pg_collection.tp
        whole = gather_from_tensor_model_parallel_region(projected, group=group)
        return (
            scatter_to_sequence_parallel_region(whole, group=group) if self.config.sequence_parallel else whole
        )
