"""Figures of merit."""

import pytest

from galvatron_megatron.cost.statistics import (
    error_figures,
    expected_correlation,
    rank_correlation,
    regret,
    spread_within,
)


def test_error_figures() -> None:
    figures = error_figures([1.1, 0.8, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
    assert figures.rows == 4
    assert figures.mean == pytest.approx(0.075)
    assert figures.median == pytest.approx(0.05)
    assert figures.bias == pytest.approx(-0.025)
    assert (figures.worst, figures.worst_index) == (pytest.approx(0.2), 1)


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([3, 2, 1], [10, 20, 30]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(0.866, abs=1e-3)
    assert rank_correlation([1, 1], [1, 2]) == 1


def test_regret() -> None:
    assert regret([1, 2, 3], [5, 6, 4]) == pytest.approx(1.25)
    assert regret([3, 2, 1], [5, 6, 4]) == 1


def test_spread_within_groups_ignores_their_means() -> None:
    assert spread_within([[1.0, 3.0], [10.0, 12.0], [5.0]]) == pytest.approx(2**0.5)
    assert spread_within([[1.0], [7.0]]) == 0
    assert spread_within([]) == 0


def test_expected_correlation_falls_with_the_spread() -> None:
    times = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    exact, close, far = (expected_correlation(times, spread) for spread in (1e-6, 0.05, 0.5))
    assert exact == (pytest.approx(1), 1)
    assert 0.8 < close[0] < 1
    assert 0 < far[0] < 0.5
    assert far[1] < close[1] < 1
    assert expected_correlation(times, 0.05) == close
