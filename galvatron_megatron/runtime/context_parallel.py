"""Context parallelism of a layer for Megatron's local core attention, which has none of its own.

Every rank keeps the queries of its part of the sequence and gathers keys and values of all parts, as Megatron's
``--cp-comm-type all_gather`` does. Transformer Engine's core attention exchanges them itself and only gets the
layer's group.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from galvatron_megatron.runtime.layout import Layout


def is_local_attention(builder: Any) -> bool:
    """Whether a spec builds Megatron's local core attention.

    Args:
        builder: of the core attention in a layer's spec.
    """
    module = builder.module if isinstance(builder, ModuleSpec) else builder
    return isinstance(module, type) and issubclass(module, DotProductAttention)


class GatheredCoreAttention(torch.nn.Module):
    """A core attention whose queries are a part of the sequence."""

    def __init__(self, *, builder: Any, layout: Layout, rank: int, pg_collection: Any, **options: Any) -> None:
        """Builds the core attention.

        Args:
            builder: of the core attention in the layer's spec.
            layout: of the layer.
            rank: of this process inside its stage.
            pg_collection: the layer's groups.
            **options: passed on to the builder.
        """
        super().__init__()
        self._group = pg_collection.cp
        # Behind the gathering of slices over tp a rank holds the whole part of its place in cp.
        self._layout = Layout(tp=layout.tp, cp=layout.cp, dp=layout.dp, split=False)
        self._rank = rank
        self.core = builder(pg_collection=pg_collection, **options)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Core attention of this rank's queries over the whole sequence.

        Args:
            query: [sequence / cp, batch, heads, width].
            key: [sequence / cp, batch, key-value heads, width].
            value: like ``key``.
            attention_mask: [1 or batch, 1, sequence, sequence], True where nothing is seen; None for causal.
            attn_mask_type: as Megatron says.
            **options: passed on.

        Returns:
            [sequence / cp, batch, hidden].
        """
        length = query.size(0) * self._layout.cp
        rows = self._positions(self._rank, length, query.device)
        # Keys come in the order of ranks; the mask is put into that order instead of them.
        first = self._rank - self._rank // self._layout.tp % self._layout.cp * self._layout.tp
        members = range(first, first + self._layout.tp * self._layout.cp, self._layout.tp)
        columns = torch.cat([self._positions(member, length, query.device) for member in members])
        key, value = (gather_from_sequence_parallel_region(part, group=self._group) for part in (key, value))
        if attention_mask is not None:
            mask = attention_mask[..., rows, :][..., columns]
        else:
            mask = (columns[None, :] > rows[:, None])[None, None]
        return self.core(query, key, value, mask, attn_mask_type=attn_mask_type, **options)

    def _positions(self, rank: int, length: int, device: torch.device) -> torch.Tensor:
        intervals = self._layout.positions(rank, length)
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in intervals])
