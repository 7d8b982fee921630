"""The slow-down is the inverse of the overlap model that the planner uses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.cost.overlap import overlapped_seconds
from galvatron_megatron.profiler.overlap import slowdown

SECONDS = st.floats(min_value=1e-4, max_value=1.0)


@given(SECONDS, SECONDS, st.floats(min_value=1.0, max_value=2.0))
def test_the_factor_that_made_a_time_is_found_again(computation, communication, factor):
    together = overlapped_seconds(computation, communication, factor)
    assert slowdown(computation, communication, together) == pytest.approx(factor, abs=1e-6)


@given(SECONDS, SECONDS, SECONDS)
def test_it_is_always_between_free_and_one_after_the_other(computation, communication, together):
    assert 1 <= slowdown(computation, communication, together) <= 2
