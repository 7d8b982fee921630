"""Index mathematics of resharding, for every rank of a stage simulated in one process."""

from itertools import product

import pytest
import torch

from galvatron_megatron.runtime.layout import (
    Layout,
    block_communicates,
    block_ranks,
    pieces_from,
    pieces_to,
)

SEQUENCE, BATCH = 32, 16


def layouts(ranks):
    degrees = [d for d in range(1, ranks + 1) if ranks % d == 0]
    for tp, cp in product(degrees, degrees):
        if ranks % (tp * cp) == 0:
            for split in (False, True):
                if not split or tp > 1:
                    yield Layout(tp=tp, cp=cp, dp=ranks // (tp * cp), split=split)


def cells(layout, rank, sequence=SEQUENCE, batch=BATCH):
    first, last = layout.samples(rank, batch)
    return {
        (s, b)
        for start, stop in layout.positions(rank, sequence)
        for s in range(start, stop)
        for b in range(first, last)
    }


def local(full, layout, rank):
    rows = torch.cat([full[start:stop] for start, stop in layout.positions(rank, full.size(0))])
    return rows[:, slice(*layout.samples(rank, full.size(1)))]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_tiles_cover_the_activation(ranks):
    sequence = 48
    for layout in layouts(ranks):
        owned = [cells(layout, rank, sequence, 24) for rank in range(ranks)]
        assert set().union(*owned) == set(product(range(sequence), range(24)))
        copies = 1 if layout.split else layout.tp
        assert sum(len(part) for part in owned) == copies * sequence * 24
        for rank in range(ranks):
            assert all(owned[holder] == owned[rank] for holder in layout.holders(rank))


@pytest.mark.parametrize("ranks", [4, 8])
def test_every_pair_of_layouts_moves_the_minimum_and_arrives(ranks):
    full = torch.arange(SEQUENCE * BATCH).view(SEQUENCE, BATCH)
    every = list(layouts(ranks))
    owned = {layout: [cells(layout, rank) for rank in range(ranks)] for layout in every}
    assert len(every) == {4: 9, 8: 16}[ranks]
    for source, target in product(every, every):
        tiles = [local(full, source, rank) for rank in range(ranks)]
        moved_cells = 0
        for receiver in range(ranks):
            result = torch.full_like(local(full, target, receiver), -1)
            block = block_ranks(source, target, receiver)
            for piece in pieces_to(source, target, receiver, SEQUENCE, BATCH):
                assert piece.sender in block
                view = result[slice(*piece.rows_to), slice(*piece.columns_to)]
                assert (view == -1).all(), "a cell arrives twice"
                view.copy_(tiles[piece.sender][slice(*piece.rows_from), slice(*piece.columns_from)])
                moved_cells += piece.cells if piece.sender != receiver else 0
            assert torch.equal(result, local(full, target, receiver)), (source, target, receiver)
        minimum = sum(len(owned[target][r] - owned[source][r]) for r in range(ranks))
        assert moved_cells == minimum, (source, target)


@pytest.mark.parametrize("ranks", [4, 8])
def test_sender_and_receiver_agree_on_order(ranks):
    for source, target in product(layouts(ranks), layouts(ranks)):
        for sender in range(ranks):
            mine = pieces_from(source, target, sender, SEQUENCE, BATCH)
            for receiver in range(ranks):
                expected = [
                    p for p in pieces_to(source, target, receiver, SEQUENCE, BATCH) if p.sender == sender
                ]
                assert [p for p in mine if p.receiver == receiver] == expected


def test_sending_is_spread_over_the_copies():
    source = Layout(tp=4, cp=1, dp=2, split=False)
    target = Layout(tp=8, cp=1, dp=1, split=False)
    for sender in range(8):
        sent = [p for p in pieces_from(source, target, sender, SEQUENCE, BATCH) if p.receiver != sender]
        assert sum(p.cells for p in sent) == SEQUENCE * BATCH // 2


def test_no_exchange_where_every_rank_holds_what_it_needs():
    replicated = Layout(tp=4, cp=1, dp=1, split=False)
    for target in (Layout(tp=1, cp=1, dp=4, split=False), Layout(tp=4, cp=1, dp=1, split=True)):
        assert not any(block_communicates(replicated, target, rank, SEQUENCE, BATCH) for rank in range(4))
        assert block_communicates(target, replicated, 0, SEQUENCE, BATCH)


def test_blocks_are_no_larger_than_needed():
    two, four = Layout(tp=2, cp=1, dp=4, split=False), Layout(tp=4, cp=1, dp=2, split=True)
    assert block_ranks(two, four, 5) == (4, 5, 6, 7)
    assert block_ranks(two, two, 5) == (4, 5)


def test_odd_degrees():
    source, target = Layout(tp=2, cp=1, dp=3, split=True), Layout(tp=3, cp=1, dp=2, split=True)
    full = torch.arange(12 * 6).view(12, 6)
    for receiver in range(6):
        result = torch.full_like(local(full, target, receiver), -1)
        for piece in pieces_to(source, target, receiver, 12, 6):
            tile = local(full, source, piece.sender)
            result[slice(*piece.rows_to), slice(*piece.columns_to)] = tile[
                slice(*piece.rows_from), slice(*piece.columns_from)
            ]
        assert torch.equal(result, local(full, target, receiver))


def test_a_sequence_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="cannot be split"):
        Layout(tp=4, cp=1, dp=1, split=True).positions(0, 30)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="cannot be split"):
        Layout(tp=1, cp=1, dp=4, split=False).samples(0, 6)
