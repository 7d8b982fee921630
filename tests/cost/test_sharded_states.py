"""What stages 2 and 3 add to passes: reductions, and gathers that start while the part in front computes."""

import pytest

from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.sharded_states import (
    GATHER,
    REDUCE,
    AtUse,
    layer_at_use,
    micro_batch_seconds,
)

SENT = {("forward", GATHER): 4.0, ("backward", GATHER): 6.0, ("backward", REDUCE): 5.0}


def added(phase: str, computing: float, share: float, **options: bool) -> float:
    at_use = AtUse(forward=share, backward=share)
    return micro_batch_seconds(phase, computing, SENT, RunOptions(**options), 1.25, at_use)


def test_gathers_hide_behind_the_part_in_front_up_to_its_time() -> None:
    # While both run each is slowed down by a quarter.
    assert added("forward", 10.0, 0.0) == pytest.approx(1.0)
    assert added("forward", 2.0, 0.0) == pytest.approx(4.0 - 2.0 + 0.25 * 2.0)
    assert added("forward", 10.0, 1.0) == pytest.approx(4.0)
    assert added("forward", 10.0, 0.25) == pytest.approx(0.25 * 4.0 + 0.75 * 1.0)
    assert added("forward", 0.0, 0.0) == pytest.approx(4.0)


def test_a_switch_for_updated_parameters_changes_nothing_of_stage_3() -> None:
    assert added("forward", 10.0, 0.25, overlap_parameters=True) == added("forward", 10.0, 0.25)


def test_reductions_share_the_links_with_gathers_where_they_overlap() -> None:
    assert added("backward", 8.0, 0.0) == pytest.approx(5.0 + 0.25 * 6.0)
    # 11 seconds of messages beside 8 of computation.
    assert added("backward", 8.0, 0.0, overlap_gradients=True) == pytest.approx(11 - 8 + 0.25 * 8)
    assert added("backward", 8.0, 1.0, overlap_gradients=True) == pytest.approx(6.0 + 0.25 * 5.0)


def test_which_layers_have_nothing_in_front() -> None:
    assert layer_at_use(8, 1) == AtUse(forward=1 / 8, backward=0.0)
    assert layer_at_use(8, 4) == AtUse(forward=1 / 2, backward=3 / 8)
    assert layer_at_use(1, 4) == AtUse(forward=1.0, backward=3 / 4)
