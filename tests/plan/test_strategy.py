import pytest

from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy


def test_ranks_and_replicas() -> None:
    megatron = Strategy(tp=4, cp=2, dp=3, sequence_parallel=SequenceParallel.MEGATRON)
    assert (megatron.ranks, megatron.weight_shards, megatron.state_replicas) == (24, 4, 6)
    ulysses = Strategy(tp=4, cp=2, dp=3, sequence_parallel=SequenceParallel.ULYSSES)
    assert (ulysses.ranks, ulysses.weight_shards, ulysses.state_replicas) == (24, 1, 24)


def test_equal_layouts_are_what_needs_no_resharding() -> None:
    megatron = Strategy(tp=4, dp=2, sequence_parallel=SequenceParallel.MEGATRON)
    ulysses = Strategy(tp=4, dp=2, sequence_parallel=SequenceParallel.ULYSSES, zero=3, recompute=Recompute.FULL)
    assert megatron.layout == ulysses.layout
    assert Strategy(tp=4, dp=2).layout != megatron.layout


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": 0}, "strategy.tp: 0; valid: an integer >= 1"),
        ({"dp": True}, "strategy.dp: True; valid: an integer >= 1"),
        ({"cp": 2.0}, "strategy.cp: 2.0; valid: an integer >= 1"),
        ({"zero": 4}, "strategy.zero: 4 is not a ZeRO stage; valid: 0, 1, 2, 3"),
        ({"zero": True}, "strategy.zero: True"),
        ({"recompute": "full"}, "strategy.recompute: 'full' is unknown; valid: none, selective, full"),
        ({"sequence_parallel": SequenceParallel.ULYSSES}, "strategy.sequence_parallel: 'ulysses' needs tp > 1"),
    ],
)
def test_bad_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Strategy(**values)
    assert str(caught.value).startswith(message)


def test_text() -> None:
    strategy = Strategy(
        tp=2, cp=2, dp=4, sequence_parallel=SequenceParallel.MEGATRON, zero=1, recompute=Recompute.FULL
    )
    assert str(strategy) == "tp2+megatron cp2 dp4 zero1 recompute-full"
    assert str(Strategy()) == "tp1 dp1"
