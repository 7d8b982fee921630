"""Overlap of computation and communication."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.cost.overlap import exposed_seconds, overlapped_seconds

TIME = st.floats(0, 1e3)


@given(computation=TIME, communication=TIME, slowdown=st.floats(1, 3))
def test_between_the_longer_and_both(computation: float, communication: float, slowdown: float) -> None:
    together = overlapped_seconds(computation, communication, slowdown)
    assert max(computation, communication) <= together <= computation + communication + 1e-9


def test_both_slow_down() -> None:
    assert overlapped_seconds(10, 4, 1.25) == pytest.approx(11)
    assert exposed_seconds(4, 10, 1.25) == pytest.approx(1)
    assert exposed_seconds(4, 10, 1) == 0
