"""What each rank holds of sharded layers is what the cost model says, to the byte."""

import pytest
from runtime_rank import train
from zero_cases import zero_case

from galvatron_megatron.cost.memory import parameter_bytes, state_bytes
from galvatron_megatron.cost.options import RunOptions

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("model", ["modern", "bf16"])
@pytest.mark.parametrize("degree", ["tp1", "tp2"])
def test_bytes_are_the_cost_models(ranks, model, degree):
    layers = [f"{degree} zero{zero}" for zero in (3, 2, 1, 0)]
    base = "tp4 zero2" if degree == "tp1" else "tp1 zero3"
    made = zero_case("measured", model, base, layers, arguments={"train-iters": 2}, measure=True)
    element = parameter_bytes("bf16" if model == "bf16" else "fp32", RunOptions(gradients_in_fp32=True))
    for seen in ranks(4).run(train, made):
        assert {found["class"][1] for found in seen["live"].values()} == {0, 1, 2, 3}
        for found in seen["live"].values():
            expected = state_bytes(found["parameters"], found["class"][1], found["replicas"], element)
            held = (found["weights"], found["gradients"], found["optimizer"])
            wanted = (expected.weights, expected.gradients, expected.optimizer)
            if found["class"][1] == 1:
                # Megatron's buffers start every parameter at a multiple of 64 elements, and shard that.
                assert held == pytest.approx(wanted, rel=0.03), found["class"]
            else:
                assert held == wanted, found["class"]
