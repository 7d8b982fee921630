"""Resharding between every pair of layouts on real ranks: right values, right gradients, minimum bytes.

On eight ranks also the communicators of plans, whose stages are there large enough for sets of all kinds.
"""

from argparse import Namespace
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


EIGHT = [
    # base layout, layers by stage
    ("tp2", [["tp4", "tp2+megatron", "tp1"], ["tp4+ulysses", "tp1 zero1", "tp2"]]),
    ("tp2 zero1", [["tp1 cp4", "tp2 cp2"], ["tp2+megatron cp2 zero3", "tp2"]]),
    ("tp1", [["tp4 zero2"], ["tp2"], ["tp2+ulysses"], ["tp1"]]),  # interleaved on two pipeline ranks
    ("tp4", [["tp2", "tp8", "tp1 cp2"]]),
    ("tp2", [["tp1 ep4", "tp4+megatron ep2 etp2"], ["tp2 etp1 ep4", "tp1 ep2"]]),
]


def create_groups_of_plans(rank, world_size):
    """Creates what each plan needs beside Megatron's groups.

    Returns:
        By plan: what was created again, what was created, and what the plan needs that Megatron has not.
    """
    from megatron.core import parallel_state
    from runtime_communicators import created_again, record_communicators
    from runtime_job import strategy_of

    from galvatron_megatron.plan.layer_kind import LayerKind
    from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
    from galvatron_megatron.runtime.context import RuntimeContext
    from galvatron_megatron.runtime.groups import GroupRegistry, planned_sets

    def create(base, stages, pp):
        found, kind = [], LayerKind.MOE_BLOCK if "ep" in str(stages) else LayerKind.BLOCK
        per_stage = world_size // pp
        layers = [[LayerPlan(kind=kind, strategy=strategy_of(w, per_stage)) for w in stage] for stage in stages]
        plan = Plan(
            pp=pp,
            virtual_stages=len(stages) // pp,
            micro_batch_size=per_stage,
            micro_batches=2 * pp,
            base=strategy_of(base, per_stage),
            stages=tuple(StagePlan(layers=tuple(stage)) for stage in layers),
        )
        undo = record_communicators(found)
        try:
            parallel_state.initialize_model_parallel(plan.base.tp, pp, create_gloo_process_groups=False)
            context = RuntimeContext.create(plan, Namespace(seed=1))
            for index in range(len(plan.layers)):
                context.layer(index)  # needs nothing but what was created
            context.destroy()
        finally:
            undo()
            parallel_state.destroy_model_parallel()
        megatrons = {ranks for ranks, ours in found if not ours} | {tuple(range(world_size))}
        created = sorted(ranks for ranks, ours in found if ours)
        return created_again(found, world_size), created, sorted(set(planned_sets(plan)) - megatrons)

    answers = [create(base, stages, min(2, len(stages))) for base, stages in EIGHT]
    adopt, GroupRegistry.adopt = GroupRegistry.adopt, lambda self, sets, group: None
    try:
        return answers, create(*EIGHT[0], 2)
    finally:
        GroupRegistry.adopt = adopt


def test_megatrons_communicators_are_used_where_they_are(ranks):
    results = ranks(8).run(create_groups_of_plans)
    for rank, (answers, alone) in enumerate(results):
        for (base, stages), (again, created, missing) in zip(EIGHT, answers, strict=True):
            assert not again, (base, stages)
            assert created == missing, (base, stages)
        assert [len(created) for _, created, _ in answers] == [0, 0, 8, 6, 0]
        # Megatron made one for the whole stage of four ranks for itself; without it there would be two.
        assert tuple(range(4 * (rank // 4), 4 * (rank // 4) + 4)) in alone[0]
