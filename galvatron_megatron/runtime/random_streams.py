"""Random numbers for layers whose tensor-parallel layout is not Megatron's global one.

Megatron keeps one "model-parallel" stream per global tp rank (used to initialise weight shards and for dropout
inside tensor-parallel regions) and one "data-parallel" stream that is equal on all tp ranks. A layer with
another layout needs streams that differ between ITS tp ranks and agree between its replicas.
"""

import contextlib
from collections.abc import Iterable, Iterator

from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
)

from galvatron_megatron.runtime.layout import Layout

MODEL_PARALLEL_STREAM = "model-parallel-rng"
_OFFSET = 2718
_RESTART = 1_000_003
"""Moves all seeds on with every iteration at which a job resumes."""
_STRIDE = 131_072
"""Keeps the seeds of different tp degrees and purposes apart; far above any number of ranks in a node."""


class RandomStreams:
    """The streams of one rank, one pair per tensor-parallel degree."""

    def __init__(self, *, seed: int, rank: int, base: Layout) -> None:
        """Says where this rank stands.

        Args:
            seed: Megatron's seed of this pipeline stage.
            rank: number of this rank inside its stage.
            base: the base layout.
        """
        self._seed = seed
        self._rank = rank
        self._base = base
        self._iteration = 0
        self._prepared: tuple[Layout, ...] = ()

    def _stream(self, purpose: str, degree: int) -> str:
        """Name of a stream, adding it to the tracker unless it is there.

        Args:
            purpose: ``core`` (weights, attention dropout), ``slice`` (hidden dropout on sequence slices) or
                ``expert`` (weights of experts).
            degree: the stream differs between this many consecutive ranks.
        """
        name = f"galvatron-{purpose}-{degree}"
        tracker = get_cuda_rng_tracker()
        if name not in tracker.get_states():
            order = (2 * degree + (purpose == "slice")) * (-1 if purpose == "expert" else 1)
            seed = self._seed + _OFFSET + _STRIDE * order + self._rank % degree + _RESTART * self._iteration
            # A checkpoint written under another plan replaces all states but leaves the list of seeds.
            tracker.seeds_.discard(seed)
            tracker.add(name, seed)
        return name

    def prepare(self, layouts: Iterable[Layout]) -> None:
        """Adds the streams that layers in these layouts will use.

        In front of the first forward pass: a recomputed layer puts the tracker back to the state it had before
        the layer ran, so that a stream added inside would be lost.
        """
        self._prepared = tuple(layouts)
        for layout in self._prepared:
            for purpose in ("core", "slice"):
                self._stream(purpose, layout.tp)

    def restart(self, *, iteration: int) -> None:
        """Starts the streams anew after a checkpoint was loaded.

        Megatron saves the random states of one data-parallel rank and gives them to all, which is right for its
        own streams and wrong for these. They restart from the seed and the iteration, alike on all replicas.

        Args:
            iteration: at which training goes on.
        """
        tracker = get_cuda_rng_tracker()
        kept = {k: v for k, v in tracker.get_states().items() if not k.startswith("galvatron-")}
        tracker.set_states(kept)
        self._iteration = iteration
        self.prepare(self._prepared)

    @contextlib.contextmanager
    def _in_place_of(self, replaced: str, purpose: str, degree: int) -> Iterator[None]:
        """Makes one of Megatron's streams the one of ``degree`` consecutive ranks."""
        name = self._stream(purpose, degree)
        tracker = get_cuda_rng_tracker()
        _exchange(tracker, name, replaced)
        try:
            yield
        finally:
            _exchange(tracker, name, replaced)

    @contextlib.contextmanager
    def initialising(self, weight_shards: int, *, expert_ranks: int | None = None) -> Iterator[None]:
        """While building a layer.

        Args:
            weight_shards: in how many parts its weights are split.
            expert_ranks: over how many consecutive ranks its experts are split; None where Megatron's own
                stream fits them, or there are none.
        """
        with contextlib.ExitStack() as stack:
            if weight_shards != self._base.tp:
                stack.enter_context(self._in_place_of(MODEL_PARALLEL_STREAM, "core", weight_shards))
            if expert_ranks is not None:
                expert_stream = get_expert_parallel_rng_tracker_name()
                stack.enter_context(self._in_place_of(expert_stream, "expert", expert_ranks))
            yield

    @contextlib.contextmanager
    def computing(self, layout: Layout) -> Iterator[None]:
        """While computing a layer in ``layout``; nothing changes where it is the base layout's."""
        with contextlib.ExitStack() as stack:
            same_degree = layout.tp == self._base.tp
            tracker = get_cuda_rng_tracker()
            if layout.split and not (same_degree and self._base.split):
                stack.enter_context(tracker.fork(self._stream("slice", layout.tp)))
            elif not layout.split and self._base.split:
                # Megatron's block runs under the model-parallel stream, which differs between tp ranks.
                stack.enter_context(tracker.fork(get_data_parallel_rng_tracker_name()))
            if not same_degree:
                stack.enter_context(self._in_place_of(MODEL_PARALLEL_STREAM, "core", layout.tp))
            yield


def _exchange(tracker: object, name: str, replaced: str) -> None:
    """Swaps the states of two streams."""
    states = tracker.get_states()
    states[name], states[replaced] = states[replaced], states[name]
    tracker.set_states(states)
