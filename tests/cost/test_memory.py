"""Bytes per parameter against Megatron's table, and what overlap and resharding add."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.cost.memory import optimizer_traffic_bytes, parameter_bytes, state_bytes
from galvatron_megatron.cost.options import RunOptions


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
