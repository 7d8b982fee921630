"""Where an activation lies: which samples and which positions of the sequence each rank of a stage holds."""

from dataclasses import dataclass
from functools import lru_cache
from math import lcm

from galvatron_megatron.plan.strategy import SequenceParallel, Strategy

Interval = tuple[int, int]
"""Half-open range [start, stop)."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Layout:
    """How an activation [sequence, batch, hidden] is spread over the N = tp * cp * dp ranks of a stage.

    Ranks are numbered inside the stage: tp innermost, then cp, then dp. Without ``split`` the tp ranks hold
    the same tile; with it each holds one slice of the sequence.
    """

    tp: int
    cp: int
    dp: int
    split: bool
    """The sequence is split over the tp ranks (Megatron's sequence parallelism, or Ulysses)."""

    @classmethod
    def of(cls, strategy: Strategy) -> "Layout":
        """The layout in which a layer with this strategy takes and returns its activations."""
        return cls(
            tp=strategy.tp,
            cp=strategy.cp,
            dp=strategy.dp,
            split=strategy.sequence_parallel is not SequenceParallel.NONE,
        )

    @property
    def ranks(self) -> int:
        """Ranks of the stage."""
        return self.tp * self.cp * self.dp

    @property
    def sequence_parts(self) -> int:
        """In how many parts the sequence is split."""
        return self.cp * (self.tp if self.split else 1)

    def holders(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same tile as ``rank``, in ascending order."""
        if self.split:
            return (rank,)
        first = rank - rank % self.tp
        return tuple(range(first, first + self.tp))

    def samples(self, rank: int, batch: int) -> Interval:
        """Samples of the micro-batch that a rank holds.

        Args:
            rank: number of the rank inside the stage.
            batch: samples of the micro-batch over all data-parallel ranks.

        Raises:
            ValueError: dp does not divide the batch.
        """
        if batch % self.dp:
            raise ValueError(f"a micro-batch of {batch} samples cannot be split as {self}")
        size = batch // self.dp
        index = rank // (self.tp * self.cp)
        return (index * size, (index + 1) * size)

    def positions(self, rank: int, sequence: int) -> tuple[Interval, ...]:
        """Positions of the sequence that a rank holds, in the order in which it stores them.

        With cp > 1 a rank holds chunks c and 2*cp-1-c of 2*cp, as Megatron balances causal attention
        (``get_batch_on_this_cp_rank``).

        Args:
            rank: number of the rank inside the stage.
            sequence: length of the whole sequence.

        Raises:
            ValueError: the sequence does not divide into the parts of the layout.
        """
        chunks = 2 * self.cp if self.cp > 1 else 1
        if sequence % chunks or sequence % self.sequence_parts:
            raise ValueError(f"a sequence of {sequence} cannot be split as {self}")
        size = sequence // chunks
        if self.cp > 1:
            index = rank // self.tp % self.cp
            owned = [(index * size, (index + 1) * size)]
            mirrored = chunks - 1 - index
            owned.append((mirrored * size, (mirrored + 1) * size))
        else:
            owned = [(0, sequence)]
        if not self.split:
            return tuple(owned)
        length = sequence // self.sequence_parts
        begin = rank % self.tp * length
        return tuple(_cut(owned, begin, begin + length))


def _cut(intervals: list[Interval], begin: int, end: int) -> list[Interval]:
    """The part [begin, end) of the concatenation of intervals."""
    part = []
    offset = 0
    for start, stop in intervals:
        low, high = max(begin, offset), min(end, offset + stop - start)
        if low < high:
            part.append((start + low - offset, start + high - offset))
        offset += stop - start
    return part


@dataclass(kw_only=True, frozen=True, slots=True)
class Piece:
    """A rectangle of an activation that moves from one rank's tile into another's."""

    sender: int
    receiver: int
    rows_from: Interval
    """Rows (sequence) of the sender's local tensor."""
    columns_from: Interval
    """Columns (batch) of the sender's local tensor."""
    rows_to: Interval
    columns_to: Interval

    @property
    def cells(self) -> int:
        """Positions times samples."""
        return (self.rows_from[1] - self.rows_from[0]) * (self.columns_from[1] - self.columns_from[0])


def block_ranks(source: Layout, target: Layout, rank: int) -> tuple[int, ...]:
    """The smallest block of consecutive ranks around ``rank`` that holds the same samples in both layouts.

    No piece ever leaves its block.
    """
    size = lcm(source.tp * source.cp, target.tp * target.cp)
    first = rank - rank % size
    return tuple(range(first, first + size))


@lru_cache(maxsize=4096)
def pieces_to(source: Layout, target: Layout, receiver: int, sequence: int, batch: int) -> tuple[Piece, ...]:
    """What a rank needs to form its tile in ``target``, each piece once, its own copy first.

    Among the ranks that hold the same tile the sender is picked by the receiver's number, which spreads the
    sending evenly. Where the receiver holds a piece itself, it is the sender.
    """
    found = []
    columns = target.samples(receiver, batch)
    rows = target.positions(receiver, sequence)
    seen: set[tuple[int, ...]] = set()
    for candidate in block_ranks(source, target, receiver):
        holders = source.holders(candidate)
        if holders in seen:
            continue
        seen.add(holders)
        sender = receiver if receiver in holders else holders[receiver % len(holders)]
        there = source.samples(candidate, batch)
        low, high = max(columns[0], there[0]), min(columns[1], there[1])
        if low >= high:
            continue
        offset_to = 0
        for start_to, stop_to in rows:
            offset_from = 0
            for start_from, stop_from in source.positions(candidate, sequence):
                start, stop = max(start_to, start_from), min(stop_to, stop_from)
                if start < stop:
                    found.append(
                        Piece(
                            sender=sender,
                            receiver=receiver,
                            rows_from=(offset_from + start - start_from, offset_from + stop - start_from),
                            columns_from=(low - there[0], high - there[0]),
                            rows_to=(offset_to + start - start_to, offset_to + stop - start_to),
                            columns_to=(low - columns[0], high - columns[0]),
                        )
                    )
                offset_from += stop_from - start_from
            offset_to += stop_to - start_to
    return tuple(found)


@lru_cache(maxsize=4096)
def pieces_from(source: Layout, target: Layout, sender: int, sequence: int, batch: int) -> tuple[Piece, ...]:
    """What a rank has to send or keep, by receiver, in the order in which each receiver expects it."""
    return tuple(
        piece
        for receiver in block_ranks(source, target, sender)
        for piece in pieces_to(source, target, receiver, sequence, batch)
        if piece.sender == sender
    )


@lru_cache(maxsize=4096)
def block_communicates(source: Layout, target: Layout, rank: int, sequence: int, batch: int) -> bool:
    """True where any rank of the block needs something that it does not hold."""
    return any(
        piece.sender != receiver
        for receiver in block_ranks(source, target, rank)
        for piece in pieces_to(source, target, receiver, sequence, batch)
    )
