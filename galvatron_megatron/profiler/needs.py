"""What a search over uniform plans will ask the profile for."""

from bisect import bisect_left
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


def can_exchange(layer: Layer, tp: int) -> bool:
    """True where Ulysses is measured of a layer over tp ranks: every one of them gets whole heads.

    Multi-latent attention, which takes positions inside itself, and Mamba, which scans all of a sequence, are
    not measured.
    """
    attention = layer.attention
    if layer.mamba is not None or (attention is not None and attention.is_latent):
        return False
    return attention is None or not (attention.heads % tp or attention.query_groups % tp)


@dataclass(kw_only=True, frozen=True, slots=True)
class ProfileNeeds:
    """The settings to measure."""

    tps: tuple[int, ...]
    sequence_parallel: tuple[SequenceParallel, ...] = (SequenceParallel.NONE, SequenceParallel.MEGATRON)
    """Kinds to measure where tp > 1; Megatron's are ``none`` and ``megatron``."""
    ulysses: tuple[int, ...] = ()
    """Degrees of Ulysses to measure, rising."""
    recomputes: tuple[Recompute, ...] = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
    micro_batch_sizes: tuple[int, ...]
    """Rising. Sizes between two of these are interpolated."""
    zeros: tuple[int, ...] = (0, 1)
    """ZeRO stages whose optimizer step is measured; that of stage 1 tells those of 2 and 3."""
    host_step: bool = False
    """Measure a step over states in host memory, too."""
    samples_per_rank: float | None = None
    """Global batch size over ranks, which limits the sizes; None where all are measured under every tp."""

    def sizes(self, tp: int) -> tuple[int, ...]:
        """Micro-batch sizes to measure under a tensor-parallel degree, rising.

        A plan has batch = size * dp * n on tp * dp * pp ranks, with n micro-batches. With n < pp stages are
        idle most of the time: n + pp - 1 passes become 2 n + pp - 1 of half the size, which pays as soon as
        these take less than 2/3 of the time each. All others have size <= tp * batch / ranks; to this, or to
        the next candidate above it, sizes are measured (two at least, for a line), and times beyond are read
        off the last line. Every layout then computes for about the same number of samples per rank at most.

        Args:
            tp: the degree.
        """
        if self.samples_per_rank is None:
            return self.micro_batch_sizes
        within = bisect_left(self.micro_batch_sizes, tp * self.samples_per_rank)
        return self.micro_batch_sizes[: max(within + 1, 2)]

    def is_added(self, kind: SequenceParallel) -> bool:
        """Whether layers of a kind are measured for what the kind adds to one rank's layers alone.

        Over t ranks Ulysses computes for b samples what one rank computes for b / t of them: as many tokens in
        front of and behind the attention, and in it as many heads times samples. What it adds, the exchanges
        and the overhead of t times as short tensors, grows in a straight line with b; two sizes show it, and
        recomputation repeats the forward part of it.
        """
        return kind is SequenceParallel.ULYSSES and 1 in self.tps and Recompute.NONE in self.recomputes

    def settings(self, tp: int, kind: SequenceParallel = SequenceParallel.NONE) -> list[tuple[Recompute, int]]:
        """(recomputation, micro-batch size) pairs that tell all where nothing is known of the curves.

        What recomputation adds is the forward pass of the same operators: the smallest and the largest size
        are enough. See :mod:`galvatron_megatron.profiler.sizes` for what straight curves need.

        Args:
            tp: tensor-parallel degree.
            kind: sequence parallelism with it.
        """
        sizes = self.sizes(tp)
        few = tuple(sorted({sizes[0], sizes[-1]}))
        if self.is_added(kind):
            second = sizes[min((len(sizes) + 1) // 2, len(sizes) - 1)]
            return [(Recompute.NONE, size) for size in sorted({sizes[0], second})]
        return [
            (recompute, size)
            for recompute in self.recomputes
            for size in (sizes if recompute is Recompute.NONE else few)
        ]

    def layouts(self) -> list[tuple[int, SequenceParallel]]:
        """(tp, sequence parallelism) pairs to measure."""
        return (
            [(1, SequenceParallel.NONE)] * (1 in self.tps)
            + [(tp, kind) for tp in self.tps if tp > 1 for kind in self.sequence_parallel]
            + [(tp, SequenceParallel.ULYSSES) for tp in self.ulysses]
        )

    @staticmethod
    def for_job(
        model: Model,
        world_size: int,
        global_batch_size: int,
        *,
        tps: Sequence[int] | None = None,
        micro_batch_sizes: Sequence[int] | None = None,
        sequence_parallel: Sequence[SequenceParallel] | None = None,
        ulysses: Sequence[int] = (),
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
            micro_batch_sizes: sizes the search will consider, each of which is measured under every tp; by
                default every doubling up to the largest that a plan can use or that has 65,536 tokens, see
                :meth:`sizes`.
            sequence_parallel: kinds for tp > 1; none and megatron by default.
            ulysses: degrees of Ulysses that the search will consider
                (:func:`galvatron_megatron.search.decision_tree.ulysses_degrees`).
            recomputes: all three by default.
            zeros: ZeRO stages that the search will consider; all by default.
            host_step: states may lie in host memory.
        """
        if zeros is not None:
            zeros = sorted({min(zero, HIGHEST_STOCK_ZERO) for zero in zeros})
        samples_per_rank = None
        if micro_batch_sizes is None:
            samples_per_rank = global_batch_size / world_size
            largest = max(1, min(global_batch_size, MOST_TOKENS // model.seq_length))
            sizes = {1 << k for k in range(largest.bit_length()) if 1 << k <= largest}
            sizes.add(max(d for d in divisors(global_batch_size) if d <= largest))
        else:
            sizes = set(micro_batch_sizes)
        return ProfileNeeds(
            tps=tuple(tensor_degrees(model, world_size) if tps is None else sorted(set(tps))),
            micro_batch_sizes=tuple(sorted(sizes)),
            samples_per_rank=samples_per_rank,
            host_step=host_step,
            ulysses=tuple(sorted(set(ulysses))),
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
