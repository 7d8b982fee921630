"""Layers sharded by ZeRO 1 to 3 train as one rank of stock Megatron does, through Megatron's pretrain."""

import pytest
from runtime_cases import CLIP
from runtime_rank import assert_same_training, expected_of, relative, train, weight_difference
from zero_cases import FOUR, HALF, PLANS, zero_case

pytestmark = pytest.mark.distributed


def test_the_plans_are_many_and_differ():
    assert len({str((made["base"], made["stages"], made["model"])) for made in PLANS}) >= 30
    words = {word for made in PLANS for stage in made["stages"] for layer in stage for word in layer.split()}
    assert {"zero1", "zero2", "zero3"} <= words
    assert sum(made.get("micro_batches") == 4 for made in PLANS) >= 15


@pytest.mark.parametrize("made", PLANS, ids=lambda made: made["name"])
def test_same_training(ranks, made):
    expected = expected_of(ranks, made)
    assert min(expected["norms"]) > CLIP, "clipping must be active"
    seen = ranks(4).run(train, made)[0]
    assert seen["planned"] and seen["states"] == seen["planned_states"]
    assert_same_training(seen, expected)


@pytest.mark.parametrize("made", HALF, ids=lambda made: made["name"])
def test_half_precision_within_its_noise(ranks, made):
    expected = expected_of(ranks, made)
    seen = ranks(4).run(train, made)[0]
    assert seen["states"] == seen["planned_states"]
    assert seen["skipped"] == expected["skipped"]
    assert seen["copies_differ"] == 0.0
    kept = [step for step, skipped in enumerate(seen["skipped"]) if not skipped]
    noise = 3e-3 if made["model"] == "bf16" else 1e-3
    assert relative(seen["losses"], expected["losses"]) < noise
    norms = [seen["norms"][step] for step in kept]
    assert relative(norms, [expected["norms"][step] for step in kept]) < 3 * noise
    assert weight_difference(seen["weights"], expected["weights"]) < 3 * noise


MISTAKEN = zero_case(
    "mistaken", "modern", "tp2", ["tp2 zero2", "tp4 zero3", "tp2+megatron zero3", "tp2+megatron zero2"], **FOUR
)
NAMED = {made["name"]: made for made in (*PLANS, *HALF, MISTAKEN)}


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        ("zero_scale", "mistaken"),
        ("zero_scaled_twice", "uniform-2"),
        ("zero_wrong_group", "mistaken"),
        ("zero_skipped_sum", "mistaken"),
        ("zero_last_micro_batch", "mistaken"),
        ("zero_duplicates_counted", "mistaken"),
        ("zero_untied", "pipeline-tied-2"),
        ("zero_stale", "all-3"),
    ],
)
def test_a_mistake_is_noticed(ranks, mistake, name):
    """In losses or norms, by ten times what is allowed; both are compared step by step."""
    made = NAMED[name] | {"mutation": mistake}
    expected = expected_of(ranks, made)
    seen = ranks(4).run(train, made)[0]
    with pytest.raises(AssertionError):
        assert_same_training(seen, expected)
    assert not seen["created_again"]
    assert max(relative(seen[kind], expected[kind]) for kind in ("losses", "norms")) > 1e-4


def test_a_stage_that_is_not_the_planned_one_is_noticed(ranks):
    """Which losses cannot tell."""
    made = NAMED["mistaken"] | {"mutation": "zero_lowered"}
    seen = ranks(4).run(train, made)[0]
    assert_same_training(seen, expected_of(ranks, made))
    assert seen["planned_states"] - seen["states"] == {("deepspeed", 2, 2, 2, False)}
