"""Mixtures of experts in layers that differ: the losses that balance their load, and their parameters."""

import dataclasses
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter

from galvatron_megatron.runtime.context import LayerContext


def experts_config(config: Any, context: LayerContext) -> Any:
    """Sets in a layer's config what its experts need.

    The losses of a router are means over the tokens of one data-parallel rank, and Megatron scales gradients by
    one over the base data-parallel degree. A layer with another degree sums as many means as it has ranks, so
    that its coefficients are scaled by base degree over own degree. With a loss per token Megatron weighs each
    mean by its tokens, which is right for any degree.

    Args:
        config: the layer's own copy of Megatron's config.
        context: how the layer runs.

    Returns:
        The config, changed in place.
    """
    if not context.kind.has_experts:
        return config
    strategy = context.strategy
    config.expert_model_parallel_size = strategy.expert_parallel
    config.expert_tensor_parallel_size = strategy.expert_shards
    if not config.calculate_per_token_loss:
        factor = context.base.dp / context.layout.dp
        if config.moe_z_loss_coeff is not None:
            config.moe_z_loss_coeff *= factor
        coefficients = config.moe_aux_loss_coeff
        if isinstance(coefficients, list):
            config.moe_aux_loss_coeff = [value * factor for value in coefficients]
        else:
            config.moe_aux_loss_coeff = coefficients * factor
    return config


def planned_experts(builder: partial, context: LayerContext) -> partial:
    """The builder of a layer's MLP, with a router that reports its losses over the layer's own layout.

    Args:
        builder: as Megatron's spec has it.
        context: how the layer runs.
    """
    submodules = builder.keywords.get("submodules")
    if not isinstance(submodules, MoESubmodules) or submodules.router is not TopKRouter:
        return builder
    router = partial(PlannedRouter, tiles=context.layout.dp)
    return partial(
        builder.func,
        *builder.args,
        **{**builder.keywords, "submodules": dataclasses.replace(submodules, router=router)},
    )


def take_experts(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of a layer's experts, from which the marks are taken by which Megatron groups them.

    Megatron reduces parameters with these marks over its own expert groups; the runtime has a class for them.

    Args:
        layer: the layer.
    """
    found = []
    for module in layer.modules():
        if isinstance(module, MoELayer):
            found += list(module.experts.parameters())
    for parameter in found:
        parameter.allreduce = True
        parameter.sequence_parallel = False
    return found


class PlannedRouter(TopKRouter):
    """Megatron's router; the losses it logs are means over all tiles of the stage, whatever their layout."""

    def __init__(
        self,
        config: Any,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        *,
        tiles: int,
    ) -> None:
        """Builds the router.

        Args:
            config: the layer's config.
            pg_collection: the layer's groups.
            is_mtp_layer: as Megatron says.
            tiles: ranks of the stage that hold different samples.
        """
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self._tiles = tiles

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        needs_dp_avg: bool = True,
        valid_token_count: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attaches a loss to the activation and logs its mean over the stage's tiles.

        Args:
            activation: to which the loss is attached.
            aux_loss_coeff: its coefficient.
            aux_loss: this rank's part of the loss of its tile.
            aux_loss_name: under which it is logged.
            reduce_group: not used: Megatron keeps one group for all layers, which here is the stage.
            needs_dp_avg: not used either.
            valid_token_count: tokens of this rank.
        """
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff * self._tiles,
            aux_loss,
            aux_loss_name,
            self.tp_dp_cp_group,
            needs_dp_avg=False,
            valid_token_count=valid_token_count,
        )
