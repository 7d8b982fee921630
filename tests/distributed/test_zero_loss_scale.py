"""fp16 under ZeRO and pipelines, with tied embeddings: steps are skipped, and the loss scale moves, as stock
Megatron's on as many ranks; also in jobs that go on under other plans."""

import pytest
from runtime_rank import relative, train, weight_difference
from zero_cases import SKIPPING, SKIPPING_ON, SKIPPING_STOCK, skipping_case

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def stock(ranks):
    seen = ranks(4).run(train, SKIPPING_STOCK)[0]
    assert seen["skipped"] == [1, 1, 0, 0, 1, 0, 0, 0], "some overflow by themselves, one is made to"
    assert len(set(seen["loss_scales"])) == 3 and seen["loss_scales"][-1] > seen["loss_scales"][-2]
    return seen


def assert_same_scaling(everyone, stock, steps=slice(None)):
    """Steps are skipped by all ranks alike; losses and norms agree within what fp16 leaves of them."""
    for seen in everyone:
        assert seen["skipped"] == stock["skipped"][steps]
        assert seen["loss_scales"] == stock["loss_scales"][steps]
    assert seen["copies_differ"] == 0.0
    assert not seen["created_again"]
    assert relative(seen["losses"], stock["losses"][steps]) < 5e-4
    norms, expected = ([norm for norm in norms if norm] for norms in (seen["norms"], stock["norms"][steps]))
    if expected:
        assert relative(norms, expected) < 2e-3


def assert_same_weights(seen, stock):
    """But for the biases of keys, whose gradients are rounding and nothing else."""
    weights, expected = (
        {name: weight for name, weight in of["weights"].items() if "linear_qkv.bias" not in name}
        for of in (seen, stock)
    )
    assert weight_difference(weights, expected) < 3e-3


@pytest.mark.parametrize("made", SKIPPING, ids=lambda made: made["name"])
def test_all_ranks_skip_what_stock_megatron_skips(ranks, stock, made):
    everyone = ranks(4).run(train, made)
    assert everyone[0]["states"] == everyone[0]["planned_states"]
    assert_same_scaling(everyone, stock)
    assert_same_weights(everyone[0], stock)
    if made["arguments"].get("eval-iters"):
        assert relative(everyone[0]["evaluated"], stock["evaluated"]) < 5e-4


def test_the_loss_scale_goes_on_under_other_stages_and_pipelines(ranks, stock, tmp_path):
    before = 0
    for last, base, stages, options in SKIPPING_ON:
        arguments = {"train-iters": last, "save": str(tmp_path), "save-interval": last}
        arguments |= {"load": str(tmp_path), "override-opt-param-scheduler": True} if before else {}
        everyone = ranks(4).run(train, skipping_case("on", base, *stages, arguments=arguments, **options))
        assert everyone[0]["states"] == everyone[0]["planned_states"]
        assert_same_scaling(everyone, stock, slice(before, last))
        before = last
    assert_same_weights(everyone[0], stock)
