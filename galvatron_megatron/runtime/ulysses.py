"""Ulysses sequence parallelism: an all-to-all on each side of the core attention (arXiv 2309.14509).

Every rank holds all weights and a slice of the sequence. In front of the core attention the slices of all
ranks are exchanged for a slice of the heads, so that attention sees the whole sequence; behind it back again.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


class _AllToAll(torch.autograd.Function):
    """Exchanges equal blocks along the first dimension; its gradient is the same exchange."""

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _exchange(blocks, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradient, ctx.group), None


def _exchange(blocks: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    blocks = blocks.contiguous()
    received = torch.empty_like(blocks)
    if blocks.dtype is torch.bfloat16 and dist.get_backend(group) == "gloo":
        dist.all_to_all_single(received.view(torch.uint8), blocks.view(torch.uint8), group=group)
    else:
        dist.all_to_all_single(received, blocks, group=group)
    return received


def heads_for_sequence(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gives up the other heads for the rest of the sequence.

    Args:
        tensor: [sequence / ranks, batch, heads, width]; heads divisible by the ranks of the group, or the
            other way around, in which case neighbouring ranks get the same head.
        group: ranks that split the sequence.

    Returns:
        [sequence, batch, max(heads / ranks, 1), width].
    """
    ranks = group.size()
    if tensor.size(2) < ranks:
        tensor = tensor.repeat_interleave(ranks // tensor.size(2), dim=2)
    rows, batch, heads, width = tensor.shape
    blocks = tensor.view(rows, batch, ranks, heads // ranks, width).permute(2, 0, 1, 3, 4)
    received = _AllToAll.apply(blocks, group)
    return received.reshape(ranks * rows, batch, heads // ranks, width)


def sequence_for_heads(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gives up the rest of the sequence for the other heads.

    Args:
        tensor: [sequence, batch, hidden / ranks].
        group: ranks that split the sequence.

    Returns:
        [sequence / ranks, batch, hidden].
    """
    ranks = group.size()
    rows, batch, width = tensor.shape
    received = _AllToAll.apply(tensor.view(ranks, rows // ranks, batch, width), group)
    return received.permute(1, 2, 0, 3).reshape(rows // ranks, batch, ranks * width)


class UlyssesCoreAttention(torch.nn.Module):
    """A core attention that takes and returns slices of the sequence with all heads."""

    def __init__(
        self, *, builder: Any, group: dist.ProcessGroup, config: Any, pg_collection: Any, **options: Any
    ) -> None:
        """Builds the core attention for this rank's share of the heads.

        Args:
            builder: of the core attention in the layer's spec.
            group: ranks that split the sequence.
            config: Megatron's transformer config; the heads are those of the whole model.
            pg_collection: the layer's groups, in which tp is one rank.
            **options: passed on to the builder.
        """
        super().__init__()
        self._group = group
        groups: ProcessGroupCollection = copy.copy(pg_collection)
        groups.tp = group
        config = copy.copy(config)
        config.num_query_groups = max(config.num_query_groups, group.size())
        self.core = builder(config=config, pg_collection=groups, **options)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        """Core attention over the whole sequence.

        Args:
            query: [sequence / ranks, batch, heads, width].
            key: [sequence / ranks, batch, key-value heads, width].
            value: like ``key``.
            attention_mask: over the whole sequence, or None.
            **options: passed on.

        Returns:
            [sequence / ranks, batch, hidden].
        """
        query, key, value = (heads_for_sequence(tensor, self._group) for tensor in (query, key, value))
        context = self.core(query, key, value, attention_mask, **options)
        return sequence_for_heads(context, self._group)
