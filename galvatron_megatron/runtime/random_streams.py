"""Random numbers for layers whose tensor-parallel layout is not Megatron's global one.

Megatron keeps one "model-parallel" stream per global tp rank (used to initialise weight shards and for dropout
inside tensor-parallel regions) and one "data-parallel" stream that is equal on all tp ranks. A layer with
another layout needs streams that differ between ITS tp ranks and agree between its replicas.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

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
_NAMED = "galvatron-"
"""How the names of all streams that are not Megatron's begin."""
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

    def _stream(self, purpose: str, degree: int) -> str:
        """Name of a stream, adding it to the tracker unless it is there.

        Args:
            purpose: ``core`` (weights, attention dropout), ``slice`` (hidden dropout on sequence slices) or
                ``expert`` (weights of experts).
            degree: the stream differs between this many consecutive ranks.
        """
        name = f"{_NAMED}{purpose}-{degree}"
        tracker = get_cuda_rng_tracker()
        if name not in tracker.get_states():
            order = (2 * degree + (purpose == "slice")) * (-1 if purpose == "expert" else 1)
            seed = self._seed + _OFFSET + _STRIDE * order + self._rank % degree + _RESTART * self._iteration
            # A checkpoint written under another plan replaces all states but leaves the list of seeds.
            tracker.seeds_.discard(seed)
            tracker.add(name, seed)
        return name

    def states(self) -> dict[str, Any]:
        """Where the streams of this rank stand, by name, as the tracker keeps it."""
        return {name: state for name, state in get_cuda_rng_tracker().get_states().items() if _is_own(name)}

    def go_on(self, states: dict[str, Any]) -> None:
        """Goes on where the streams of this rank stood when a checkpoint was saved.

        Args:
            states: what ``states`` returned then, under the same plan.
        """
        tracker = get_cuda_rng_tracker()
        others = {name: state for name, state in tracker.get_states().items() if not _is_own(name)}
        tracker.set_states({**others, **states})

    def restart(self, *, iteration: int) -> None:
        """Starts the streams anew after a checkpoint was loaded that does not tell where they stood.

        Megatron saves the random states of one data-parallel rank and gives them to all, which is right for its
        own streams and wrong for these. They restart from the seed and the iteration, alike on all replicas,
        each when it is first used.

        Args:
            iteration: at which training goes on.
        """
        self._iteration = iteration
        self.go_on({})

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


def _is_own(name: str) -> bool:
    """Whether a stream is one of these, not Megatron's."""
    return name.startswith(_NAMED)


def _exchange(tracker: object, name: str, replaced: str) -> None:
    """Swaps the states of two streams."""
    states = tracker.get_states()
    states[name], states[replaced] = states[replaced], states[name]
    tracker.set_states(states)
