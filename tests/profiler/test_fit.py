"""Robust statistics and the latency-bandwidth fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.profiler.fit import latency_bandwidth, undisturbed

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
