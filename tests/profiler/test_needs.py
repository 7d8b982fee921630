"""What is measured for a job: every shape its plans can use, and nothing that Megatron cannot run."""

import itertools
from dataclasses import replace

import pytest
from profiles import small_model

from galvatron_megatron.describe.model import Attention, Mamba, Mlp
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.profiler.collectives import GroupShape, message_sizes, shapes_of_plans
from galvatron_megatron.profiler.needs import ProfileNeeds, can_exchange, divisors, tensor_degrees


@pytest.mark.parametrize("world_size", [1, 2, 4, 6, 8, 12])
def test_every_group_of_every_uniform_plan_has_its_shape_measured(world_size):
    shapes = shapes_of_plans(world_size, divisors(world_size))
    for tp in divisors(world_size):
        assert tp == 1 or GroupShape(ranks=tp, stride=1) in shapes["all_reduce"]
        for pp in divisors(world_size // tp):
            dp = world_size // tp // pp
            if dp > 1:
                for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
                    assert GroupShape(ranks=dp, stride=tp) in shapes[kind]
                if pp == 1:
                    assert GroupShape(ranks=dp, stride=tp) in shapes["broadcast"]
            if pp % 2 == 0:
                assert GroupShape(ranks=2, stride=world_size // pp) in shapes["send"]


@pytest.mark.parametrize("world_size", [2, 4, 6, 8])
def test_the_groups_of_a_shape_hold_every_rank_once(world_size):
    for shapes in shapes_of_plans(world_size, divisors(world_size)).values():
        for shape in shapes:
            groups = shape.groups(world_size)
            assert sorted(rank for group in groups for rank in group) == list(range(world_size))
            assert all(b - a == shape.stride for group in groups for a, b in itertools.pairwise(group))


def test_measurements_grow_with_the_logarithm_of_the_ranks():
    def curves(world_size: int) -> int:
        return sum(len(shapes) for shapes in shapes_of_plans(world_size, (1, 2, 4, 8)).values())

    counts = {world_size: curves(world_size) for world_size in (8, 16, 32, 64, 128, 256, 512, 1024)}
    steps = [after - before for before, after in itertools.pairwise(counts.values())]
    # One more doubling adds a shape per tensor-parallel degree and collective, however many ranks there are.
    assert max(steps) <= 20, counts
    assert counts[1024] < 170, counts


def test_messages_reach_the_largest_and_half_as_many_are_sent_alone():
    together = message_sizes(1 << 30, contention=True)
    alone = message_sizes(1 << 30, contention=False)
    assert together[0] == alone[0] == 1 << 10 and together[-1] == alone[-1] == 1 << 30
    assert together == sorted(set(together)) and set(alone) <= set(together)
    assert len(together) == 8 and len(alone) == 5
    assert message_sizes(1 << 9, contention=True) == [1 << 10]


def test_the_optimizer_of_zero_1_is_measured_for_higher_stages():
    needs = {
        zeros: ProfileNeeds.for_job(small_model(), 4, 8, zeros=zeros).zeros for zeros in ((0,), (1, 3), (2, 3))
    }
    assert needs == {(0,): (0,), (1, 3): (1,), (2, 3): (1,)}


def test_degrees_that_do_not_divide_the_model_are_left_out():
    model = small_model()
    assert tensor_degrees(model, 8) == [1, 2, 4]
    grouped = replace(model.layers[0], attention=replace(model.layers[0].attention, heads=12, query_groups=3))
    # 3 and 6 divide the heads but not the feed-forward width of 512.
    assert tensor_degrees(replace(model, layers=(grouped,)), 12) == [1]
    wider = replace(grouped, mlp=replace(grouped.mlp, ffn_hidden_size=768))
    assert tensor_degrees(replace(model, layers=(wider,)), 12) == [1, 3, 6, 12]


def test_micro_batches_reach_from_one_to_the_largest_that_a_plan_can_use():
    model = small_model()
    assert ProfileNeeds.for_job(model, 4, 8).micro_batch_sizes == (1, 2, 4, 8)
    assert ProfileNeeds.for_job(model, 4, 12).micro_batch_sizes == (1, 2, 4, 8, 12)
    long = replace(model, seq_length=1 << 15)
    assert ProfileNeeds.for_job(long, 4, 8).micro_batch_sizes == (1, 2)
    assert ProfileNeeds.for_job(model, 4, 8, micro_batch_sizes=[2]).micro_batch_sizes == (2,)


def test_sizes_reach_as_far_as_plans_that_fill_their_stages():
    needs = ProfileNeeds.for_job(small_model(), 4, 32)
    assert [needs.sizes(tp)[-1] for tp in (1, 2, 4)] == [8, 16, 32]
    # The next one above the limit of 3; two where the limit is below the first.
    assert ProfileNeeds.for_job(small_model(), 4, 12).sizes(1) == (1, 2, 4)
    assert ProfileNeeds.for_job(small_model(), 64, 8).sizes(1) == (1, 2)
    asked = ProfileNeeds.for_job(small_model(), 4, 32, micro_batch_sizes=[4, 32])
    assert asked.sizes(1) == asked.sizes(4) == (4, 32)


@pytest.mark.parametrize("world_size, batch", [(2, 8), (4, 32), (8, 24), (6, 12)])
def test_plans_beyond_the_sizes_have_idle_stages_that_smaller_micro_batches_fill(world_size, batch):
    needs = ProfileNeeds.for_job(small_model(), world_size, batch)
    beyond = 0
    degrees = [(tp, pp) for tp in divisors(world_size) for pp in divisors(world_size // tp)]
    for tp, pp in degrees:
        dp = world_size // tp // pp
        if batch % dp:
            continue
        for size in divisors(batch // dp):
            count = batch // dp // size
            if size > needs.sizes(tp)[-1]:
                beyond += 1
                assert count < pp
                assert (count + pp - 1) / (2 * count + pp - 1) >= 2 / 3
    assert beyond


def test_recomputation_is_measured_at_the_ends_only():
    needs = ProfileNeeds.for_job(small_model(), 2, 8, micro_batch_sizes=(1, 2, 4, 8))
    settings = needs.settings(2)
    assert [size for recompute, size in settings if recompute is Recompute.NONE] == [1, 2, 4, 8]
    assert [size for recompute, size in settings if recompute is Recompute.FULL] == [1, 8]
    assert needs.layouts() == [
        (1, SequenceParallel.NONE),
        (2, SequenceParallel.NONE),
        (2, SequenceParallel.MEGATRON),
    ]


def test_ulysses_is_measured_with_its_degrees_and_few_sizes():
    needs = ProfileNeeds.for_job(small_model(), 4, 32, ulysses=[4, 2])
    ulysses = SequenceParallel.ULYSSES
    assert [layout for layout in needs.layouts() if layout[1] is ulysses] == [(2, ulysses), (4, ulysses)]
    assert needs.settings(4, ulysses) == [(Recompute.NONE, 1), (Recompute.NONE, 8)]
    assert needs.settings(4, SequenceParallel.MEGATRON) == needs.settings(4)
    # Nothing to add it to where one rank is not measured.
    assert not replace(needs, tps=(2,)).is_added(ulysses)


@pytest.mark.parametrize(
    ("changes", "degrees"),
    [
        ({}, [1, 2, 4]),
        ({"attention": Attention(heads=8, query_groups=2, head_dim=32)}, [1, 2]),
        ({"mlp": Mlp(ffn_hidden_size=511)}, [1, 2, 4]),
        ({"kind": LayerKind.MLP, "attention": None}, [1, 2, 3, 4, 6, 8]),
        ({"kind": LayerKind.MAMBA, "attention": None, "mlp": None, "mamba": Mamba()}, []),
        (
            {
                "attention": Attention(
                    heads=4, query_groups=4, head_dim=32, kv_lora_rank=16, qk_head_dim=16, v_head_dim=16
                )
            },
            [],
        ),
    ],
)
def test_layers_are_measured_under_ulysses_where_every_rank_gets_whole_heads(changes, degrees):
    layer = replace(small_model().layers[0], **changes)
    assert [tp for tp in (1, 2, 3, 4, 6, 8) if can_exchange(layer, tp)] == degrees
