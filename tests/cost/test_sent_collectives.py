"""What parts of a stage send for their states: messages that they share, shards that are summed, waits."""

import pytest

from galvatron_megatron.cost.memory import Share, parameter_bytes
from galvatron_megatron.cost.options import RunOptions, run_options
from galvatron_megatron.cost.overlap import exposed_seconds
from galvatron_megatron.cost.sharded_states import (
    GATHER,
    REDUCE,
    SentCollective,
    layer_at_use,
    micro_batch_seconds,
    partial_sum,
    sent_collectives,
    sent_seconds,
    tied_sum,
)
from galvatron_megatron.plan.strategy import Offload, SequenceParallel, Strategy

OPTIONS = RunOptions()
ELEMENT = parameter_bytes("bf16", OPTIONS)
LAYERS = 8


def found(zero: int, parameters: int = 1000, options: RunOptions = OPTIONS, **asked: int) -> dict:
    """(when, role) -> (number, bytes of all) for a layer of eight on four ranks."""
    strategy = Strategy(dp=4, zero=zero)
    share = Share(parameters=parameters, replicas=4, stride=1)
    sent = sent_collectives([share], strategy, ELEMENT, options, together=LAYERS, **asked)
    return {(entry.when, entry.role): (entry.count, entry.count * entry.bytes) for entry in sent}


def test_layers_share_messages_and_send_their_own_bytes() -> None:
    assert found(0) == {("reduction", REDUCE): (1 / 8, 4000)}
    assert found(1) == {("reduction", REDUCE): (1 / 8, 4000), ("update", GATHER): (1 / 8, 2000)}
    # DeepSpeed gathers matrices and vectors one after another.
    assert found(2, settings=2) == {("backward", REDUCE): (1 / 8, 4000), ("update", GATHER): (2 / 8, 2000)}
    # Modules gather by themselves; what stays whole is gathered in one message.
    assert found(3, modules=4, whole=100) == {
        ("forward", GATHER): (4, 1800),
        ("backward", GATHER): (4, 1800),
        ("backward", REDUCE): (1 / 8, 4000),
        ("update", GATHER): (1 / 8, 200),
    }


def test_full_buckets_are_messages_of_their_own() -> None:
    small = RunOptions(overlap_gradients=True, bucket_elements=500)
    assert found(0, options=small)["reduction", REDUCE] == (16 / 8, 4000)
    assert found(2, options=small)["backward", REDUCE] == (16 / 8, 4000)
    # Without overlap Megatron reduces everything at once, DeepSpeed at most 40 million elements.
    assert found(0, 10**7)["reduction", REDUCE][0] == 1 / 8
    assert found(2, 10**7)["backward", REDUCE][0] == 2 / 8
    counted = run_options({"overlap_grad_reduce": True, "ddp_num_buckets": 4})
    assert found(0, options=counted)["reduction", REDUCE] == found(3, options=counted)["backward", REDUCE]
    assert found(0, options=counted)["reduction", REDUCE] == (4 / 8, 4000)


def test_instances_of_the_optimizer_sum_their_shards() -> None:
    share = Share(parameters=1000, replicas=8, stride=2, instances=2)
    sent = sent_collectives([share], Strategy(tp=2, dp=8, zero=1), ELEMENT, OPTIONS)
    assert [(e.kind, e.bytes, e.ranks, e.stride) for e in sent] == [
        ("reduce_scatter", 4000, 4, 2),
        ("all_reduce", 1000, 2, 8),
        ("all_gather", 2000, 4, 2),
    ]


@pytest.mark.parametrize(
    ("zero", "options", "offload", "size"),
    [
        (0, OPTIONS, Offload.NONE, 400),
        (1, OPTIONS, Offload.NONE, 400),
        (1, RunOptions(deepspeed_zero_1=True), Offload.NONE, 100),
        (1, OPTIONS, Offload.OPTIMIZER, 100),
        (3, OPTIONS, Offload.NONE, 100),
        # However narrow they are reduced, DeepSpeed adds them up in fp32.
        (2, RunOptions(gradients_in_fp32=False), Offload.NONE, 100),
    ],
)
def test_engines_sum_the_parts_that_they_keep(zero, options, offload, size) -> None:
    strategy = Strategy(tp=2, sequence_parallel=SequenceParallel.MEGATRON, dp=4, zero=zero, offload=offload)
    share = Share(parameters=1000, replicas=4, stride=2)
    element = parameter_bytes("bf16", options)
    (partial,) = partial_sum(100, share, strategy, element, options, together=LAYERS)
    assert (partial.ranks, partial.stride, partial.count * partial.bytes) == (2, 1, size)
    assert partial.count == 1 / LAYERS
    (tied,) = tied_sum(100, 24, share, strategy, element, options)
    assert (tied.ranks, tied.stride, tied.count, tied.bytes) == (2, 24, 1, size)
    assert not tied_sum(0, 24, share, strategy, element, options)


def test_seconds_are_those_of_each_message() -> None:
    def price(kind: str, message_bytes: float, ranks: int, stride: int) -> float:
        return 10.0 + message_bytes

    share = Share(parameters=1000, replicas=4, stride=1)
    sent = sent_collectives([share], Strategy(dp=4, zero=1), ELEMENT, OPTIONS, together=LAYERS)
    assert all(isinstance(entry, SentCollective) for entry in sent)
    seconds = sent_seconds(sent, price)
    assert seconds == {("reduction", REDUCE): 10 / 8 + 4000, ("update", GATHER): 10 / 8 + 2000}


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_shares_of_waits_add_up_to_those_of_a_stage(pp: int) -> None:
    """Of a stage's layers one waits forward, and on all but the last stage one backward: none knows which."""
    gather, computing, slowdown = 4.0, 3.0, 1.25
    layers, at_use = LAYERS // pp, layer_at_use(LAYERS, pp)
    sent = {("forward", GATHER): gather, ("backward", GATHER): gather}
    forward, backward = (
        layers * micro_batch_seconds(phase, computing, sent, OPTIONS, slowdown, at_use)
        for phase in ("forward", "backward")
    )
    hidden = exposed_seconds(gather, computing, slowdown)
    assert forward == pytest.approx(gather + (layers - 1) * hidden)
    # Over all stages: pp - 1 of them have a last layer that nothing computes in front of.
    assert pp * backward == pytest.approx((pp - 1) * gather + (LAYERS - pp + 1) * hidden)
