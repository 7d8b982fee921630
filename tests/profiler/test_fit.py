"""Robust statistics and the latency-bandwidth fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.describe.typical import typical
from galvatron_megatron.profiler.fit import latency_bandwidth, uncertainty, undisturbed

SIZES = [1 << k for k in range(10, 27, 3)]


@given(st.floats(min_value=1e-6, max_value=1e-2), st.floats(min_value=1e-12, max_value=1e-7))
def test_a_straight_line_is_found_exactly(latency, slope):
    points = [(size, latency + size * slope) for size in SIZES]
    found_latency, found_slope, residual = latency_bandwidth(points)
    for size in SIZES:
        assert found_latency + size * found_slope == pytest.approx(latency + size * slope, rel=1e-5)
    assert residual < 1e-5


@given(st.lists(st.floats(min_value=1e-6, max_value=10), min_size=len(SIZES), max_size=len(SIZES)))
def test_neither_latency_nor_slope_is_ever_negative(times):
    latency, slope, residual = latency_bandwidth(list(zip(SIZES, times, strict=True)))
    assert latency >= 0 and slope >= 0 and residual >= 0
    assert latency > 0 or slope > 0


def test_noise_shows_in_the_residual():
    noisy = [(size, (1e-4 + size * 1e-9) * (1.2 if index % 2 else 0.8)) for index, size in enumerate(SIZES)]
    assert 0.1 < latency_bandwidth(noisy)[2] < 0.4


def test_a_disturbance_of_the_message_before_the_largest_leaves_a_bandwidth():
    points = [(size, 1e-4 + size * 1e-9) for size in SIZES]
    points[-2] = (SIZES[-2], 5.0)
    assert latency_bandwidth(points)[1] == pytest.approx(1e-9, rel=0.01)


def test_disturbances_do_not_move_the_result():
    quiet = [1.0, 1.01, 0.99, 1.0, 1.02, 1.0, 0.98, 1.0]
    assert undisturbed([*quiet, 5.0, 7.0, 20.0])[0] == pytest.approx(undisturbed(quiet)[0], rel=0.02)
    assert undisturbed([3.0]) == (3.0, 0.0)
    # Of few samples one disturbed one must not count at all.
    assert undisturbed([9.0, 3.0])[0] == undisturbed([4.0, 3.0, 9.0])[0] == 3.0


def test_the_typical_value_is_that_of_the_middle_half():
    assert typical([4.0, 1.0, 3.0, 100.0])[0] == 3.5
    assert typical([3.0]) == (3.0, 0.0)
    assert typical([2.0, 3.0])[0] == 2.5
    # A quarter of three samples is three quarters of the least and of the largest one.
    assert typical([2.0, 6.0, 4.0])[0] == pytest.approx(4.0)
    assert typical([2.0, 9.0, 4.0])[0] == pytest.approx((0.25 * 2 + 4 + 0.25 * 9) / 1.5)


def test_one_call_in_two_that_takes_longer_counts_in_the_typical_value_and_not_in_the_undisturbed_one():
    samples = [1.0, 2.0] * 8
    assert typical(samples)[0] == pytest.approx(1.5)
    assert undisturbed(samples)[0] == 1.0


def test_the_uncertainty_is_the_standard_error_of_normal_samples():
    draws = np.random.default_rng(0).normal(10.0, 1.0, size=(4000, 24))
    found = [typical(row) for row in draws]
    error = np.std([value for value, _ in found])
    expected = np.mean([value * uncertainty(spread, 24) for value, spread in found])
    assert expected == pytest.approx(error, rel=0.1)
