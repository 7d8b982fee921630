"""Resharding between every pair of layouts on real ranks: right values, right gradients, minimum bytes."""

from itertools import product

import pytest

pytestmark = pytest.mark.distributed
SEQUENCE, BATCH, HIDDEN = 16, 8, 3


def every_layout(ranks):
    from galvatron_megatron.runtime.layout import Layout

    degrees = [d for d in range(1, ranks + 1) if ranks % d == 0]
    return [
        Layout(tp=tp, cp=cp, dp=ranks // (tp * cp), split=split)
        for tp, cp, split in product(degrees, degrees, (False, True))
        if ranks % (tp * cp) == 0 and (tp > 1 or not split)
    ]


def move_all_pairs(rank, world_size, bits):
    """Moves a tile between all pairs of layouts; returns wrong pairs and bytes received by pair."""
    import torch
    import torch.distributed as dist

    from galvatron_megatron.runtime.groups import GroupRegistry, block_sets
    from galvatron_megatron.runtime.resharding import Resharder

    layouts = every_layout(world_size)
    registry = GroupRegistry()
    pairs = list(product(layouts, layouts))
    registry.create(ranks for source, target in pairs for ranks in block_sets(source, target, world_size))
    assert len(registry.created) == len(set(registry.created)) <= 2 * world_size
    kind = {16: torch.bfloat16, 32: torch.float32}[bits]
    full = torch.arange(SEQUENCE * BATCH * HIDDEN).view(SEQUENCE, BATCH, HIDDEN).to(kind)

    def tile(layout):
        rows = torch.cat([full[start:stop] for start, stop in layout.positions(rank, SEQUENCE)])
        return rows[:, slice(*layout.samples(rank, BATCH))].contiguous()

    wrong, received = [], []
    for source, target in pairs:
        group = registry.of(block_sets(source, target, world_size))
        resharder = Resharder(source=source, target=target, rank=rank, group=group)
        activation = tile(source).requires_grad_()
        moved = resharder(activation)
        received.append(resharder.counter.received_bytes)
        moved.backward(tile(target))
        right = torch.equal(moved, tile(target)) and torch.equal(activation.grad, tile(source))
        alone = moved._base is None and moved.is_contiguous()
        if not right or not (alone or source == target):
            wrong.append((str(source), str(target)))
        if source == target:
            assert moved is activation
    dist.barrier()
    registry.destroy()
    return wrong, received


def cells(layout, rank):
    first, last = layout.samples(rank, BATCH)
    rows = [s for start, stop in layout.positions(rank, SEQUENCE) for s in range(start, stop)]
    return {(s, b) for s in rows for b in range(first, last)}


@pytest.mark.parametrize(("world_size", "bits"), [(4, 32), (4, 16), (8, 32)])
def test_every_pair(ranks, world_size, bits):
    results = ranks(world_size).run(move_all_pairs, bits)
    layouts = every_layout(world_size)
    for rank, (wrong, received) in enumerate(results):
        assert not wrong
        for (source, target), seen in zip(product(layouts, layouts), received, strict=True):
            missing = cells(target, rank) - cells(source, rank)
            assert seen == len(missing) * HIDDEN * bits // 8, (source, target)
