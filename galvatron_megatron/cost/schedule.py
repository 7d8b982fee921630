"""Simulates a pipeline schedule event by event: 1F1B, interleaved 1F1B and GPipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from galvatron_megatron.errors import PlanError

FORWARD, BACKWARD = 0, 1


class ScheduleKind(StrEnum):
    """In which order a pipeline rank runs its forward and backward passes."""

    ONE_F_ONE_B = "1f1b"
    """As few live micro-batches as possible; interleaved where a rank has several chunks."""
    GPIPE = "gpipe"
    """All forward passes, then all backward passes."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ChunkWork:
    """One virtual pipeline stage."""

    forward_seconds: float
    """Of one micro-batch."""
    backward_seconds: float
    send_seconds: float = 0.0
    """One direction over the boundary behind this stage; the backward pass pays it again."""
    activation_bytes: int = 0
    """Kept from the forward to the backward pass of one micro-batch."""
    transient_bytes: int = 0
    """Needed on top during either pass."""


@dataclass(frozen=True, slots=True)
class Event:
    """One pass of one micro-batch through one chunk."""

    rank: int
    chunk: int
    micro_batch: int
    direction: int
    """``FORWARD`` or ``BACKWARD``."""
    start_seconds: float
    end_seconds: float


@dataclass(kw_only=True, frozen=True, slots=True)
class Simulation:
    """What happened."""

    events: tuple[Event, ...]
    """By rank, in the order each rank ran them."""
    pipeline_seconds: float
    """Until the last pass ends."""
    step_seconds: float
    """Until the last rank has synchronised its gradients and stepped."""
    busy_seconds: tuple[float, ...]
    """Seconds that each rank computes."""
    peak_bytes: tuple[int, ...]
    """Largest sum of live activations and transient of each rank."""
    peak_seconds: tuple[float, ...]
    """When each rank's peak is first reached."""

    @property
    def bubble_fraction(self) -> float:
        """Part of the ranks' time in the pipeline that they wait."""
        return 1 - sum(self.busy_seconds) / (len(self.busy_seconds) * self.pipeline_seconds)


def rank_order(
    rank: int, ranks: int, micro_batches: int, chunks: int = 1, kind: ScheduleKind = ScheduleKind.ONE_F_ONE_B
) -> list[tuple[int, int, int]]:
    """The passes of one pipeline rank in the order it runs them.

    The interleaved order is that of megatron-core's ``forward_backward_pipelining_with_interleaving``
    (``get_schedule_table``): ``ranks`` micro-batches pass a chunk, then the next chunk's turn comes.

    Args:
        rank: pipeline rank.
        ranks: pipeline degree.
        micro_batches: per step.
        chunks: per rank.
        kind: order of passes.

    Returns:
        (direction, chunk, micro-batch) of each pass.
    """
    table = [
        (chunk, micro)
        for first in range(0, micro_batches, ranks)
        for chunk in range(chunks)
        for micro in range(first, min(first + ranks, micro_batches))
    ]
    forwards = [(FORWARD, chunk, micro) for chunk, micro in table]
    backwards = [(BACKWARD, chunks - 1 - chunk, micro) for chunk, micro in table]
    if kind is ScheduleKind.GPIPE:
        return forwards + backwards
    if chunks == 1:
        warm_up = min(ranks - rank - 1, micro_batches)
    else:
        warm_up = min((ranks - rank - 1) * 2 + (chunks - 1) * ranks, micro_batches * chunks)
    order = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        order += (forward, backward)
    return order + backwards[len(forwards) - warm_up :]


def simulate(
    work: Sequence[ChunkWork],
    ranks: int,
    micro_batches: int,
    *,
    sync_seconds: Sequence[float] = (),
    kind: ScheduleKind = ScheduleKind.ONE_F_ONE_B,
) -> Simulation:
    """Runs a schedule.

    A pass starts when its rank is free and its input has arrived: the forward pass of the previous virtual
    stage, or the backward pass of the next one, plus the send between them.

    Args:
        work: of every virtual stage in model order; stage i runs on rank i % ranks.
        ranks: pipeline degree.
        micro_batches: per step.
        sync_seconds: of each rank, after its last pass; zero where not given.
        kind: order of passes.

    Returns:
        Times and memory.

    Raises:
        PlanError: the work does not divide over the ranks, or there are no micro-batches.
    """
    stages = len(work)
    if ranks < 1 or stages == 0 or stages % ranks or micro_batches < 1:
        raise PlanError(
            f"schedule: {stages} virtual stages on {ranks} ranks with {micro_batches} micro-batches; valid: "
            "a multiple of the ranks and at least one micro-batch"
        )
    chunks = stages // ranks
    orders = [rank_order(rank, ranks, micro_batches, chunks, kind) for rank in range(ranks)]
    arrived: list[list[float]] = [[-1.0] * micro_batches for _ in range(2 * stages)]
    """When the input of (direction * stages + virtual stage, micro-batch) is there; negative: not yet."""
    arrived[0] = [0.0] * micro_batches
    positions, clocks = [0] * ranks, [0.0] * ranks
    events: list[list[Event]] = [[] for _ in range(ranks)]
    durations = [part.forward_seconds for part in work] + [part.backward_seconds for part in work]
    ready = list(range(ranks))
    while ready:
        rank = ready.pop()
        order, position, clock, done = orders[rank], positions[rank], clocks[rank], events[rank]
        woken = set()
        while position < len(order):
            direction, chunk, micro = order[position]
            stage = chunk * ranks + rank
            node = direction * stages + stage
            input_at = arrived[node][micro]
            if input_at < 0.0:
                break
            start = clock if clock > input_at else input_at
            clock = start + durations[node]
            done.append(Event(rank, chunk, micro, direction, start, clock))
            if direction == FORWARD:
                if stage + 1 < stages:
                    arrived[stage + 1][micro] = clock + work[stage].send_seconds
                    woken.add((stage + 1) % ranks)
                else:
                    arrived[stages + stage][micro] = clock
            elif stage:
                arrived[stages + stage - 1][micro] = clock + work[stage - 1].send_seconds
                woken.add((stage - 1) % ranks)
            position += 1
        positions[rank], clocks[rank] = position, clock
        ready.extend(woken - {rank})
    if sum(map(len, events)) < sum(map(len, orders)):
        raise PlanError(
            f"schedule: {micro_batches} micro-batches on {ranks} ranks with {chunks} chunks each wait for each "
            f"other; valid: a multiple of {ranks} micro-batches"
        )
    sync = list(sync_seconds) or [0.0] * ranks
    peaks = [_peak(done, work, ranks) for done in events]
    return Simulation(
        events=tuple(event for done in events for event in done),
        pipeline_seconds=max(clocks),
        step_seconds=max(clocks) + max(sync),
        busy_seconds=tuple(sum(event.end_seconds - event.start_seconds for event in done) for done in events),
        peak_bytes=tuple(peak for peak, _ in peaks),
        peak_seconds=tuple(at for _, at in peaks),
    )


def _peak(events: Sequence[Event], work: Sequence[ChunkWork], ranks: int) -> tuple[int, float]:
    """Largest bytes that a rank holds, and when it first does."""
    live = peak = 0
    at = 0.0
    for event in events:
        part = work[event.chunk * ranks + event.rank]
        if event.direction == FORWARD:
            live += part.activation_bytes
        if live + part.transient_bytes > peak:
            peak, at = live + part.transient_bytes, event.start_seconds
        if event.direction == BACKWARD:
            live -= part.activation_bytes
    return peak, at
