"""What a whole job sends to keep states equal, or sharded, is what the cost model charges it for.

Every collective is recorded at the process groups of jobs that Megatron's ``pretrain`` runs under a plan, and
held against the very values that prices are made from: when, what, among which ranks, how often, how large.
"""

from math import ceil

import pytest
from runtime_rank import train, trained_once
from test_zero_memory import CASES as MEASURED
from test_zero_memory import measured
from zero_cases import DEEPSPEED, FOUR

pytestmark = pytest.mark.distributed

NUMBERS = "numbers"
BUCKETS = {"overlap-grad-reduce": True, "ddp-bucket-size": 120_000}
"""About as many elements as a layer of these models has on a rank."""
UNIFORM = (
    measured("slices-3", "modern", "tp2+megatron zero3", ["tp2+megatron zero3 recompute-full"] * 4, **FOUR),
    measured("ulysses-2", "bf16", "tp1 zero2", ["tp2+ulysses zero2"] * 4),
    measured("deepspeed-1", "modern", "tp1 zero1", ["tp1 zero1"] * 4, **DEEPSPEED),
    measured("pipeline-3", "bf16", "tp1 zero3", ["tp1 zero3"] * 2, ["tp1 zero3"] * 2, pp=2, **FOUR),
    measured("stock-slices", "classic", "tp2+megatron", ["tp2+megatron"] * 4),
    *(made for made in MEASURED if made["name"] == "stock"),
)
"""All layers of a job run alike, embedding and head as they do."""
MIXED = (
    measured("heads", "grouped", "tp2", ["tp2 zero2", "tp2 zero3", "tp2+megatron", "tp2"]),
    *(made for made in MEASURED if made["name"] != "stock"),
)
BUCKETED = tuple(
    measured(f"buckets-{zero}", "modern", f"tp1 zero{zero}", [f"tp1 zero{zero}"] * 4, arguments=asked)
    for zero, asked in ((1, BUCKETS), (2, {"overlap-grad-reduce": True, "ddp-num-buckets": 4}), (3, BUCKETS))
)
HANDED_ON = 3 * 128
"""Elements of the biases that a layer's linears hand on: with weights in host memory they are the only small
vectors that do not stay whole; DeepSpeed, which the price does not follow there, keeps them until the step."""


def is_of_a_pass(key):
    """Whether modules gather parameters for themselves."""
    return key[0] in ("forward", "backward") and key[1] == "all_gather"


def assert_as_charged(case, seen):
    """Nothing is sent that is not charged, nothing charged that is not sent; bytes are equal."""
    for rank, each in enumerate(seen):
        sent, charged = each["sent"][-1], each["priced"]
        numbers = {key for key in sent if key[0] == NUMBERS}
        assert sent.keys() - numbers == charged.keys(), rank
        # Norm, zeros (by class and chunk) and overflow.
        assert sum(sent[key][1] for key in numbers) <= 8 * sum(sent[key][0] for key in numbers) <= 8 * 16
        for key, (layers, ends, size, most) in charged.items():
            number, total = sent[key]
            if case["name"] == "interleaved-offloaded" and is_of_a_pass(key) and rank < 2:
                kept = HANDED_ON * 2 * FOUR["micro_batches"]
                assert size - kept <= total <= size, (rank, key)
                continue
            assert total == pytest.approx(size, rel=1e-12), (rank, key)
            if is_of_a_pass(key):
                assert number == layers + ends, (rank, key)
            else:
                assert 1 <= number <= most, (rank, key)


@pytest.mark.parametrize("case", MIXED, ids=[case["name"] for case in MIXED])
def test_a_mixed_job_sends_what_it_is_charged_for(ranks, case):
    assert_as_charged(case, trained_once(ranks, case))


@pytest.mark.parametrize("case", UNIFORM, ids=[case["name"] for case in UNIFORM])
def test_layers_that_run_alike_send_their_messages_together(ranks, case):
    """As they are charged, each for its share; embedding and head, charged with their own, go with them."""
    seen = trained_once(ranks, case)
    assert_as_charged(case, seen)
    for each in seen:
        for key, (layers, *_) in each["priced"].items():
            if layers and not is_of_a_pass(key):
                assert each["sent"][-1][key][0] == pytest.approx(layers), key


@pytest.mark.parametrize("case", BUCKETED, ids=[case["name"] for case in BUCKETED])
def test_buckets_are_charged_one_by_one(ranks, case):
    """A bucket ends with a parameter: never as full as could be, at most one more for each of the ends."""
    seen = trained_once(ranks, case)
    assert_as_charged(case, seen)
    for each in seen:
        for key, (layers, ends, *_) in each["priced"].items():
            if not is_of_a_pass(key) and key[1] != "all_gather":
                assert 1 < ceil(layers) / 2 <= each["sent"][-1][key][0] <= layers + ends, key


MISTAKEN = next(made for made in MEASURED if made["name"] == "split")


@pytest.mark.parametrize("mistake", ["zero_wrong_group", "zero_nothing_whole", "zero_sums_apart"])
def test_a_mistake_is_noticed(ranks, mistake):
    """Another group, a vector gathered where it could have stayed, the same bytes in more messages."""
    seen = ranks(4).run(train, MISTAKEN | {"mutation": mistake, "measure": False})
    with pytest.raises(AssertionError):
        assert_as_charged(MISTAKEN, seen)
