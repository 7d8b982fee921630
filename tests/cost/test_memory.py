"""Bytes per parameter against Megatron's table, and what overlap and resharding add."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.cost.memory import (
    held_bytes,
    optimizer_traffic_bytes,
    parameter_bytes,
    parameter_shares,
    state_bytes,
)
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.plan.strategy import Strategy


@pytest.mark.parametrize(
    ("precision", "fp32_gradients", "plain", "kept", "shared"),
    [("fp16", False, 20, 4, 16), ("bf16", True, 18, 6, 12), ("fp32", True, 16, 8, 8)],
)
def test_megatrons_table(precision: str, fp32_gradients: bool, plain: int, kept: int, shared: int) -> None:
    """Megatron-LM docs/source/api-guide/dist_optimizer.md."""
    element = parameter_bytes(precision, RunOptions(gradients_in_fp32=fp32_gradients))
    assert state_bytes(1000, 0, 8, element).total == plain * 1000
    assert state_bytes(1000, 1, 8, element).total == kept * 1000 + shared * 125


@given(
    parameters=st.integers(1, 10**9),
    replicas=st.integers(1, 1024),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
)
def test_each_stage_keeps_no_more(parameters: int, replicas: int, precision: str) -> None:
    element = parameter_bytes(precision, RunOptions())
    totals = [state_bytes(parameters, zero, replicas, element).total for zero in range(4)]
    assert totals == sorted(totals, reverse=True)
    assert totals[3] >= totals[0] / replicas
    traffic = [optimizer_traffic_bytes(parameters, zero, replicas, element) for zero in range(3)]
    assert traffic == sorted(traffic, reverse=True)
    if replicas == 1:
        assert len(set(totals)) == 1


@pytest.mark.parametrize(("zero", "deepspeed", "kept", "shared"), [(1, True, 6, 12), (2, False, 2, 16)])
def test_deepspeed_adds_gradients_up_in_fp32(zero: int, deepspeed: bool, kept: int, shared: int) -> None:
    options = RunOptions(gradients_in_fp32=False, deepspeed_zero_1=deepspeed)
    strategy = Strategy(dp=8, zero=zero)
    shares = parameter_shares(1000, 0, strategy)
    for precision in ("fp16", "bf16"):
        state = held_bytes(shares, strategy, parameter_bytes(precision, options), options)
        assert state.total == kept * 1000 + shared * 125


def test_experts_are_replicated_and_sharded_by_ranks_of_their_own() -> None:
    strategy = Strategy(tp=2, dp=8, zero=1, expert_parallel=4)
    dense, experts = parameter_shares(1000, 600, strategy)
    assert (dense.parameters, dense.replicas, dense.stride) == (400, 8, 2)
    assert (experts.parameters, experts.replicas, experts.stride) == (600, 2, 8)
    assert parameter_shares(1000, 0, strategy) == (replace(dense, parameters=1000),)


def test_instances_of_the_optimizer_shard_among_themselves() -> None:
    (share,) = parameter_shares(1000, 0, Strategy(dp=8, zero=1), instances=2)
    assert (share.replicas, share.sharding) == (8, 4)
    (alone,) = parameter_shares(1000, 0, Strategy(zero=1), instances=2)
    assert alone.sharding == 1
