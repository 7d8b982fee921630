"""Operators on a device."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.cost.compute import (
    FORWARD_PHASES,
    PhaseSeconds,
    gemm_utilization,
    operator_seconds,
    phase_seconds,
)
from galvatron_megatron.cost.counts_values import Operator, gemm
from tests.cost.machines import cluster

SIZE = st.integers(min_value=1, max_value=20000)


@given(batch=st.integers(1, 64), m=SIZE, n=SIZE, k=SIZE, processors=st.sampled_from([58, 108, 132, 148]))
def test_utilization_is_a_fraction(batch: int, m: int, n: int, k: int, processors: int) -> None:
    assert 0 < gemm_utilization(batch, m, n, k, processors) <= 1


def test_utilization_of_known_shapes() -> None:
    assert gemm_utilization(1, 8192, 8192, 8192, 108) > 0.9
    # One wave and a ninth: the second wave leaves most processors idle.
    full, over = (
        gemm_utilization(1, 256 * 9, 128 * 12, 8192, 108),
        gemm_utilization(1, 256 * 9, 128 * 13, 8192, 108),
    )
    assert over < 0.8 * full
    assert gemm_utilization(1, 8192, 8192, 64, 108) < 0.3


def test_operator_is_bound_by_compute_or_traffic() -> None:
    place = cluster("a100-80g")
    constants = replace(
        place.constants, gemm_efficiency=0.5, memory_efficiency=0.5, attention_efficiency=0.25, kernel_us=10.0
    )
    big = gemm("big", "forward", 1, 8192, 8192, 8192, element_bytes=2)
    seconds = operator_seconds(big, place.device, constants, "bf16")
    use = gemm_utilization(1, 8192, 8192, 8192, 108)
    assert seconds == pytest.approx(2 * 8192**3 / (312e12 * 0.5 * use) + 10e-6)
    copy = Operator(name="copy", kind="memory", phase="forward", flops=0, bytes=2 * 10**9)
    assert operator_seconds(copy, place.device, constants, "bf16") == pytest.approx(
        2e9 / (2039e9 * 0.5) + 10e-6
    )
    flash = Operator(
        name="flash", kind="attention", phase="forward", flops=10**13, bytes=1, shape=(1, 8, 8, 4096, 4096, 128)
    )
    causal = 10**13 / 2 / (312e12 * 0.25)
    assert operator_seconds(flash, place.device, constants, "bf16") == pytest.approx(causal + 10e-6)
    assert operator_seconds(big, place.device, constants, "fp32") > 10 * seconds


def test_measured_shapes_stand_for_themselves() -> None:
    place = cluster("a100-80g")
    device = replace(place.device, gemm_efficiencies=((1, 4096, 4096, 4096, 0.4),))
    constants = replace(place.constants, kernel_us=0.0)
    known = gemm("known", "forward", 1, 4096, 4096, 4096, element_bytes=2)
    other = gemm("other", "forward", 1, 4096, 4096, 8192, element_bytes=2)
    assert operator_seconds(known, device, constants, "bf16") == pytest.approx(2 * 4096**3 / (312e12 * 0.4))
    modelled = operator_seconds(other, place.device, constants, "bf16")
    assert operator_seconds(other, device, constants, "bf16") == modelled


def test_small_operators_wait_for_the_host() -> None:
    place = cluster("a100-80g")
    constants = replace(place.constants, host_us=50.0, kernel_us=1.0)
    tiny = gemm("tiny", "forward", 1, 16, 16, 16, element_bytes=2, count=10)
    spent = phase_seconds([tiny], FORWARD_PHASES, place.device, constants, "bf16")
    assert spent.host == pytest.approx(500e-6)
    assert spent.seconds == spent.host > spent.device
    assert phase_seconds([tiny], ("backward",), place.device, constants, "bf16") == PhaseSeconds()
