"""What a search over uniform plans will ask the profile for."""

from collections.abc import Sequence
from dataclasses import dataclass

from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.plan.runnable import HIGHEST_STOCK_ZERO
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel

MOST_TOKENS = 1 << 16
"""Largest micro-batch that is measured, in tokens; beyond it time grows in proportion to the size."""


def divisors(number: int) -> list[int]:
    """All divisors, rising."""
    return [d for d in range(1, number + 1) if number % d == 0]


def can_split(layer: Layer, tp: int) -> bool:
    """True where Megatron can split a layer over tp ranks: heads, key/value groups and widths divide evenly."""
    attention, mlp, experts = layer.attention, layer.mlp, layer.experts
    if attention is not None:
        if attention.heads % tp:
            return False
        if attention.query_groups % tp and tp % attention.query_groups:
            return False
    if mlp is not None and mlp.ffn_hidden_size % tp:
        return False
    return experts is None or experts.ffn_hidden_size % tp == 0


def tensor_degrees(model: Model, world_size: int) -> list[int]:
    """Tensor-parallel degrees that divide the ranks and every layer of the model, rising."""
    return [tp for tp in divisors(world_size) if all(can_split(layer, tp) for layer in set(model.layers))]


@dataclass(kw_only=True, frozen=True, slots=True)
class ProfileNeeds:
    """The settings to measure."""

    tps: tuple[int, ...]
    sequence_parallel: tuple[SequenceParallel, ...] = (SequenceParallel.NONE, SequenceParallel.MEGATRON)
    """Kinds to measure where tp > 1; Megatron's are ``none`` and ``megatron``."""
    recomputes: tuple[Recompute, ...] = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
    micro_batch_sizes: tuple[int, ...]
    """Rising. Sizes between two of these are interpolated."""
    zeros: tuple[int, ...] = (0, 1)
    """ZeRO stages whose optimizer step is measured; that of stage 1 tells those of 2 and 3."""
    host_step: bool = False
    """Measure a step over states in host memory, too."""

    def settings(self) -> list[tuple[Recompute, int]]:
        """(recomputation, micro-batch size) pairs that tell all where nothing is known of the curves.

        What recomputation adds is the forward pass of the same operators: the smallest and the largest size
        are enough. See :mod:`galvatron_megatron.profiler.sizes` for what straight curves need.
        """
        sizes = self.micro_batch_sizes
        few = tuple(sorted({sizes[0], sizes[-1]}))
        return [
            (recompute, size)
            for recompute in self.recomputes
            for size in (sizes if recompute is Recompute.NONE else few)
        ]

    def layouts(self) -> list[tuple[int, SequenceParallel]]:
        """(tp, sequence parallelism) pairs to measure."""
        return [(1, SequenceParallel.NONE)] * (1 in self.tps) + [
            (tp, kind) for tp in self.tps if tp > 1 for kind in self.sequence_parallel
        ]

    @staticmethod
    def for_job(
        model: Model,
        world_size: int,
        global_batch_size: int,
        *,
        tps: Sequence[int] | None = None,
        micro_batch_sizes: Sequence[int] | None = None,
        sequence_parallel: Sequence[SequenceParallel] | None = None,
        recomputes: Sequence[Recompute] | None = None,
        zeros: Sequence[int] | None = None,
        host_step: bool = False,
    ) -> "ProfileNeeds":
        """What uniform plans for a job can need; whatever the user has fixed is passed and narrows it.

        Args:
            model: the model.
            world_size: ranks.
            global_batch_size: samples per step.
            tps: tensor-parallel degrees; all that Megatron can run by default.
            micro_batch_sizes: sizes the search will consider; by default every doubling up to the largest
                that a plan can use or that has 65,536 tokens.
            sequence_parallel: kinds for tp > 1; none and megatron by default.
            recomputes: all three by default.
            zeros: ZeRO stages that the search will consider; all by default.
            host_step: states may lie in host memory.
        """
        if zeros is not None:
            zeros = sorted({min(zero, HIGHEST_STOCK_ZERO) for zero in zeros})
        if micro_batch_sizes is None:
            largest = max(1, min(global_batch_size, MOST_TOKENS // model.seq_length))
            sizes = {1 << k for k in range(largest.bit_length()) if 1 << k <= largest}
            sizes.add(max(d for d in divisors(global_batch_size) if d <= largest))
        else:
            sizes = set(micro_batch_sizes)
        return ProfileNeeds(
            tps=tuple(tensor_degrees(model, world_size) if tps is None else sorted(set(tps))),
            micro_batch_sizes=tuple(sorted(sizes)),
            host_step=host_step,
            **{
                name: tuple(value)
                for name, value in (
                    ("sequence_parallel", sequence_parallel),
                    ("recomputes", recomputes),
                    ("zeros", zeros),
                )
                if value is not None
            },
        )
