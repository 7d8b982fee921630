"""Rotary embeddings of layers that hold other positions than the base layout."""

from typing import Any

import torch

from galvatron_megatron.runtime.context import LayerContext


def take_rows(rotary: Any, rows: tuple[tuple[int, int], ...]) -> Any:
    """Rows of a rotary embedding, or of each tensor in a tuple; what is no tensor stays as it is.

    Args:
        rotary: [sequence, ...] or a tuple.
        rows: intervals of the sequence, in order.
    """
    if isinstance(rotary, tuple):
        return tuple(take_rows(part, rows) for part in rotary)
    if not isinstance(rotary, torch.Tensor):
        return rotary
    return torch.cat([rotary[start:stop] for start, stop in rows])


class OwnRotary(torch.nn.Module):
    """The rotary embedding inside an attention, cut to the positions that the layer's rank holds."""

    def __init__(self, rotary: torch.nn.Module, context: LayerContext) -> None:
        """Stands in front of a rotary embedding.

        Args:
            rotary: Megatron's.
            context: how the layer runs.
        """
        super().__init__()
        rotary.cp_group = None  # it would cut by itself, and the attention's own positions are known here
        self._rotary = rotary
        self._layout = context.own_positions
        self._rank = context.rank
        self._parts = context.layout.sequence_parts

    def get_rotary_seq_len(
        self, inference_context: Any, transformer: Any, transformer_input: torch.Tensor, *_: Any
    ) -> int:
        """Length of the whole sequence.

        Args:
            inference_context: not used: layers that differ only train.
            transformer: not used.
            transformer_input: [sequence tile, batch, hidden] of the layer.
        """
        return transformer_input.size(0) * self._parts

    def forward(self, max_seq_len: int, **options: Any) -> Any:
        """What Megatron's rotary embedding returns, at the rank's positions.

        Args:
            max_seq_len: length of the whole sequence.
            **options: passed on.
        """
        return take_rows(self._rotary(max_seq_len, **options), self._layout.positions(self._rank, max_seq_len))
