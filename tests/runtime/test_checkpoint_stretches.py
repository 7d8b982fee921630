"""Stretches of flat parameters are blocks of the checkpoint's tensors, and come back from them."""

from dataclasses import replace
from math import prod

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("megatron.core")

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from galvatron_megatron.runtime.checkpoint_stretches import (
    Stretch,
    blocks,
    checkpoint_entries,
    entries_by_parameter,
    take_entries,
)

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES, st.data())
def test_blocks_hold_a_stretch_and_nothing_else(shape, data):
    whole = torch.arange(prod(shape)).view(shape)
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    found = list(blocks(shape, start, stop))
    inside = [whole[tuple(slice(o, o + n) for o, n in zip(*block, strict=True))].flatten() for block in found]
    # Each of consecutive elements, in their order.
    assert torch.cat([*inside, torch.empty(0, dtype=torch.long)]).tolist() == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def stretches(parameter, bounds):
    """Stretches of a parameter, as ranks between them keep it; values tell where they belong."""
    values = torch.arange(parameter.numel(), dtype=torch.float32)
    return [
        Stretch(
            number=3,
            parameter=parameter,
            start=start,
            tensors={
                name: (values + 1000 * index)[start:stop].clone()
                for index, name in enumerate(("param", "exp_avg", "exp_avg_sq"))
            },
        )
        for start, stop in bounds
    ]


def placed(pieces, shape):
    """Pieces of a checkpoint's tensor put together; what none of them has is not a number."""
    whole = torch.full(shape, torch.nan)
    for piece in pieces:
        assert piece.axis_fragmentations is None and piece.prepend_axis_num == 0
        where = tuple(slice(o, o + n) for o, n in zip(piece.global_offset, piece.local_shape, strict=True))
        assert whole[where].isnan().all(), "no two pieces hold the same element"
        whole[where] = piece.data
    return whole


CUTS = [(0, 5), (5, 21), (21, 22), (22, 48)]


def entry_of(kind, parameter):
    """Megatron's checkpoint entry of a parameter [8, 6] on the second of two tp ranks, in layer 1 of 3."""
    rows = ShardedTensor.from_rank_offsets(
        "weight", parameter, (0, 1, 3), (1, 1, 2), replica_id=(0, 0, 5), prepend_axis_num=1
    )
    if kind == "rows":
        return rows
    if kind == "gated":
        return apply_swiglu_sharded_factory(rows, ((0, 1, 3),))

    def columns(key, tensor, replica_id, flattened_range):
        """Halves along the second axis, of which no half is of consecutive elements."""
        like = replace(rows, key=key, data=tensor, dtype=tensor.dtype, replica_id=replica_id)
        halves = [like.narrow(1, start, 3)[0] for start in (0, 3)]
        return {side: replace(half, key=f"{key}.{side}") for side, half in zip("ab", halves, strict=True)}

    return ShardedTensorFactory("weight", parameter, columns, None, (0, 0, 5))


@pytest.mark.parametrize("kind", ["rows", "gated", "columns"])
def test_ranks_put_the_whole_tensor_together_and_take_their_stretches_back(kind):
    parameter = torch.nn.Parameter(torch.zeros(8, 6))
    entry = entry_of(kind, parameter)
    entries = entries_by_parameter({"weight": entry})
    mine = stretches(parameter, CUTS)
    by_rank = [checkpoint_entries([stretch], entries)[3] for stretch in mine]
    for index, name in enumerate(("param", "exp_avg", "exp_avg_sq")):
        values = (torch.arange(48.0) + 1000 * index).view(8, 6)
        built = entry if kind == "rows" else replace(entry, data=values).build()
        expected = {}
        for part in (
            [replace(entry, data=values)]
            if kind == "rows"
            else list(built.values() if isinstance(built, dict) else built)
        ):
            whole = expected.setdefault(
                f"optimizer.state.{name}.{part.key}", torch.full(part.global_shape, torch.nan)
            )
            whole[part.global_slice()] = part.data
        pieces = [piece for rank in by_rank for piece in rank[name].values()]
        for key, whole in expected.items():
            found = placed([piece for piece in pieces if piece.key == key], whole.shape)
            assert torch.equal(found.nan_to_num(-1), whole.nan_to_num(-1))
        assert {piece.key for piece in pieces} == set(expected)
        # Each rank writes its own, whichever replica it is of the weight itself.
        assert {piece.replica_id for piece in pieces} == {(0, 0, 0)}
    kept = {stretch.tensors[name].untyped_storage().data_ptr() for stretch in mine for name in stretch.tensors}
    assert {
        p.data.untyped_storage().data_ptr() for r in by_rank for n in r.values() for p in n.values()
    } == kept
    for stretch, rank in zip(mine, by_rank, strict=True):
        loaded = {name: {at: piece.data + 7 for at, piece in pieces.items()} for name, pieces in rank.items()}
        before = {name: tensor.clone() for name, tensor in stretch.tensors.items()}
        del loaded["param"]
        take_entries([stretch], {3: loaded})
        assert torch.equal(stretch.tensors["param"], before["param"]), "what a checkpoint lacks stays"
        assert all(torch.equal(stretch.tensors[n], before[n] + 7) for n in ("exp_avg", "exp_avg_sq"))


def test_a_factory_that_copies_is_named():
    parameter = torch.nn.Parameter(torch.zeros(4))
    copying = ShardedTensorFactory(
        "odd", parameter, lambda key, t, *_: ShardedTensor.from_rank_offsets(key, t.clone()), None, (0, 0, 0)
    )
    with pytest.raises(RuntimeError, match="odd: is no view"):
        checkpoint_entries(stretches(parameter, [(0, 4)]), entries_by_parameter({"odd": copying}))
