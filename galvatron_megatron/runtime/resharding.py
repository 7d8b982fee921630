"""Moves an activation from one layer's layout to the next one's with the minimum of bytes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from galvatron_megatron.runtime.layout import (
    Layout,
    block_communicates,
    block_ranks,
    pieces_from,
    pieces_to,
)

_GLOO_TYPES = (torch.float32, torch.float64, torch.float16, torch.uint8, torch.int32, torch.int64)


@dataclass(kw_only=True)
class TrafficCounter:
    """Counts what resharding moved on this rank."""

    received_bytes: int = 0
    """Bytes received from other ranks."""
    exchanges: int = 0
    """all_to_all calls."""

    def reset(self) -> None:
        """Starts counting again."""
        self.received_bytes = 0
        self.exchanges = 0


@dataclass(kw_only=True, frozen=True)
class Resharder:
    """Moves activations between two layouts inside this rank's pipeline stage.

    One instance serves one pair of layouts; the shapes may change from call to call.
    """

    source: Layout
    target: Layout
    rank: int
    """Number of this rank inside its stage."""
    group: dist.ProcessGroup | None
    """Communicator of ``block_ranks(source, target, rank)``, in that order; None where nothing can move."""
    counter: TrafficCounter = field(default_factory=TrafficCounter)

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        """Moves an activation, and its gradient the other way in the backward pass.

        Args:
            activation: this rank's tile [sequence, batch, ...] in the source layout.

        Returns:
            This rank's tile in the target layout; the argument itself where the layouts are equal.
        """
        if self.source == self.target:
            return activation
        return _Reshard.apply(activation, self)

    def move(self, tile: torch.Tensor, *, backward: bool = False) -> torch.Tensor:
        """Moves a tile without recording a gradient.

        Args:
            tile: [sequence, batch, ...] in the source layout (the target layout if backward).
            backward: move from target to source.
        """
        source, target = (self.target, self.source) if backward else (self.source, self.target)
        sequence = tile.size(0) * source.sequence_parts
        batch = tile.size(1) * source.dp
        shape = (sequence // target.sequence_parts, batch // target.dp, *tile.shape[2:])
        wanted = pieces_to(source, target, self.rank, sequence, batch)
        finish = None
        if block_communicates(source, target, self.rank, sequence, batch):
            finish = self._start_exchange(tile, source, target, sequence, batch)
        # What this rank holds itself is copied while the rest is under way.
        if len(wanted) == 1 and wanted[0].sender == self.rank:
            piece = wanted[0]
            moved = tile[slice(*piece.rows_from), slice(*piece.columns_from)].clone(
                memory_format=torch.contiguous_format
            )
        else:
            moved = tile.new_empty(shape)
            for piece in wanted:
                if piece.sender == self.rank:
                    moved[slice(*piece.rows_to), slice(*piece.columns_to)] = tile[
                        slice(*piece.rows_from), slice(*piece.columns_from)
                    ]
        if finish is not None:
            finish(moved)
        return moved

    def _start_exchange(
        self, tile: torch.Tensor, source: Layout, target: Layout, sequence: int, batch: int
    ) -> Callable[[torch.Tensor], None]:
        """Starts one all-to-all for what other ranks hold, on the communicator's own stream where it has one.

        Returns:
            Waits for it and fills what came into the tile that it is given.
        """
        width = tile.shape[2:].numel()
        ranks = block_ranks(source, target, self.rank)
        position = {rank: index for index, rank in enumerate(ranks)}
        outgoing = [
            p for p in pieces_from(source, target, self.rank, sequence, batch) if p.receiver != self.rank
        ]
        incoming = [p for p in pieces_to(source, target, self.rank, sequence, batch) if p.sender != self.rank]
        incoming.sort(key=lambda piece: piece.sender)  # stable: a sender's pieces keep their order
        send_sizes, receive_sizes = [0] * len(ranks), [0] * len(ranks)
        for piece in outgoing:
            send_sizes[position[piece.receiver]] += piece.cells * width
        for piece in incoming:
            receive_sizes[position[piece.sender]] += piece.cells * width
        sent = [tile[slice(*p.rows_from), slice(*p.columns_from)].reshape(-1) for p in outgoing]
        send = torch.cat(sent) if sent else tile.new_empty(0)
        received = tile.new_empty(sum(receive_sizes))
        work = _all_to_all(received, send, receive_sizes, send_sizes, self.group)
        self.counter.received_bytes += received.numel() * received.element_size()
        self.counter.exchanges += 1

        def finish(moved: torch.Tensor) -> None:
            work.wait()
            offset = 0
            for piece in incoming:
                size = piece.cells * width
                target_view = moved[slice(*piece.rows_to), slice(*piece.columns_to)]
                target_view.copy_(received[offset : offset + size].view(target_view.shape))
                offset += size

        return finish


def _all_to_all(
    received: torch.Tensor,
    send: torch.Tensor,
    receive_sizes: list[int],
    send_sizes: list[int],
    group: dist.ProcessGroup | None,
) -> dist.Work:
    """Starts all_to_all_single with uneven splits; Gloo moves types it does not know as bytes."""
    if send.dtype not in _GLOO_TYPES and dist.get_backend(group) == "gloo":
        factor = send.element_size()
        received, send = received.view(torch.uint8), send.view(torch.uint8)
        receive_sizes = [size * factor for size in receive_sizes]
        send_sizes = [size * factor for size in send_sizes]
    return dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=group, async_op=True)


class _Reshard(torch.autograd.Function):
    """Resharding is a permutation of tiles; its gradient is the move in the opposite direction.

    No sum is needed where the source is replicated: every copy is used by the same computation, and the
    column-parallel layers in front have made their gradient complete on every copy.
    """

    @staticmethod
    def forward(ctx, activation: torch.Tensor, resharder: Resharder) -> torch.Tensor:
        ctx.resharder = resharder
        return resharder.move(activation.detach())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.resharder.move(gradient.contiguous(), backward=True), None
