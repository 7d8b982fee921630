import pytest

from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy


def test_ranks_and_replicas() -> None:
    megatron = Strategy(tp=4, cp=2, dp=3, sequence_parallel=SequenceParallel.MEGATRON)
    assert (megatron.ranks, megatron.weight_shards, megatron.state_replicas) == (24, 4, 6)
    ulysses = Strategy(tp=4, cp=2, dp=3, sequence_parallel=SequenceParallel.ULYSSES)
    assert (ulysses.ranks, ulysses.weight_shards, ulysses.state_replicas) == (24, 1, 24)


def test_experts_have_groups_of_their_own() -> None:
    strategy = Strategy(tp=2, cp=2, dp=4, expert_parallel=4)
    assert (strategy.expert_shards, strategy.expert_ranks, strategy.expert_replicas) == (2, 8, 2)
    whole = Strategy(tp=2, dp=4, expert_parallel=8, expert_tensor_parallel=1)
    assert (whole.expert_shards, whole.expert_ranks, whole.expert_replicas) == (1, 8, 1)
    assert whole.without_experts == Strategy(tp=2, dp=4)
    assert (whole.layout, whole.state_replicas) == (Strategy(tp=2, dp=4).layout, 4)
    assert Strategy(tp=2, dp=4, expert_tensor_parallel=2) == Strategy(tp=2, dp=4)
    ulysses = Strategy(tp=4, dp=2, sequence_parallel=SequenceParallel.ULYSSES, expert_parallel=8)
    assert ulysses.expert_replicas == 1


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
        ({"expert_parallel": 0}, "strategy.expert_parallel: 0; valid: an integer >= 1"),
        ({"expert_tensor_parallel": 1.0, "tp": 2}, "strategy.expert_tensor_parallel: 1.0; valid"),
        ({"tp": 2, "dp": 3, "expert_parallel": 2}, "strategy.expert_parallel: 2 x expert tensor parallelism 2"),
        ({"recompute": "full"}, "strategy.recompute: 'full' is unknown; valid: none, selective, full"),
        ({"offload": "cpu"}, "strategy.offload: 'cpu' is unknown; valid: none, optimizer, parameters"),
        ({"offload": Offload.OPTIMIZER}, "strategy.offload: 'optimizer' needs zero 1 or higher"),
        ({"offload": Offload.PARAMETERS, "zero": 2}, "strategy.offload: 'parameters' needs zero 3 or higher"),
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
    assert [len(kind.and_less) for kind in Offload] == [1, 2, 3] and Offload.NONE.and_less == (Offload.NONE,)
    assert str(Strategy(dp=2, zero=3, offload=Offload.PARAMETERS)) == "tp1 dp2 zero3 offload-parameters"
    assert str(Strategy(tp=2, dp=4, expert_parallel=4, expert_tensor_parallel=1)) == "tp2 dp4 ep4 etp1"
