"""What each rank holds of sharded layers is what the cost model says, to the byte."""

import pytest
from runtime_rank import train
from zero_cases import zero_case

from galvatron_megatron.cost.memory import Share, parameter_bytes, state_bytes
from galvatron_megatron.cost.offload import host_bytes, kept_on_device
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.plan.strategy import Offload, Strategy

pytestmark = pytest.mark.distributed

NONE, OPTIMIZER, PARAMETERS = Offload.NONE, Offload.OPTIMIZER, Offload.PARAMETERS
HIDDEN = 32
HELD = ("weights", "gradients", "optimizer")


@pytest.mark.parametrize("model", ["modern", "bf16"])
@pytest.mark.parametrize(
    ("base", "layers", "kinds"),
    [
        ("tp4 zero2", [f"tp1 zero{zero}" for zero in (3, 2, 1, 0)], {(z, NONE) for z in range(4)}),
        ("tp1 zero3", [f"tp2 zero{zero}" for zero in (3, 2, 1, 0)], {(z, NONE) for z in range(4)}),
        (
            "tp2 zero3 offload-parameters",
            [
                "tp1 zero1 offload-optimizer",
                "tp1 zero2 offload-optimizer",
                "tp1 zero3 offload-optimizer",
                "tp1 zero3 offload-parameters",
            ],
            {(1, OPTIMIZER), (2, OPTIMIZER), (3, OPTIMIZER), (3, PARAMETERS)},
        ),
    ],
)
def test_bytes_are_the_cost_models(ranks, model, base, layers, kinds):
    made = zero_case("measured", model, base, layers, arguments={"train-iters": 2}, measure=True)
    element = parameter_bytes("bf16" if model == "bf16" else "fp32", RunOptions(gradients_in_fp32=True))
    for seen in ranks(4).run(train, made):
        assert {found["class"][1:] for found in seen["live"].values()} == kinds
        for found in seen["live"].values():
            shards, zero, offload = found["class"]
            share = Share(parameters=found["parameters"], replicas=found["replicas"], stride=shards)
            strategy = Strategy(tp=shards, dp=share.replicas, zero=zero, offload=offload)
            # Two norms of 32 are less than a hundredth of a layer at tp 1; the base's class has no layer.
            has_layer = (shards, zero) == (1, 3) and base != "tp1 zero3"
            wholes = 2 * HIDDEN if has_layer and offload is not PARAMETERS else 0
            assert found["whole"] == wholes
            state = state_bytes(share.parameters, zero, share.replicas, element, whole=wholes)
            expected = kept_on_device(state, strategy)
            held = tuple(found[name] for name in HELD)
            wanted = tuple(getattr(expected, name) for name in HELD)
            assert found["host"] == host_bytes([share], strategy, element), found["class"]
            if (zero, offload) == (1, NONE):
                # Megatron's buffers start every parameter at a multiple of 64 elements, and shard that.
                assert held == pytest.approx(wanted, rel=0.03), found["class"]
            else:
                assert held == wanted, found["class"]
