"""Figures of merit."""

import pytest

from galvatron_megatron.cost.statistics import error_figures, rank_correlation, regret


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
