"""The cost model against published measurements: gates, and the page that reports them."""

from functools import cache
from pathlib import Path

import pytest

from galvatron_megatron.commands.validate import SHIPPED, constants_alone, shipped_table
from galvatron_megatron.cost.records.tables import read_table
from galvatron_megatron.cost.validation import Predictor, TableReport, shipped_test_bed, validate_table
from galvatron_megatron.report.validation_report import GATES, accuracy_page, gate_figures, passes

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"

MISSED = {
    ("vtrain_a100_multi", "Spearman"),
}
"""Gates that are not reached; docs/accuracy.md lists them as missed."""


@cache
def reports() -> tuple[TableReport, ...]:
    predict = Predictor()
    return tuple(validate_table(read_table(shipped_table(name)), predict) for name in SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_gates(name: str) -> None:
    report = next(report for report in reports() if report.table.name == name)
    figures = gate_figures(report)
    assert set(GATES[name]) <= set(figures)
    missed = {(name, gate) for gate, value in GATES[name].items() if not passes(gate, figures[gate], value)}
    assert missed == {entry for entry in MISSED if entry[0] == name}, {
        gate: figures[gate] for gate in GATES[name]
    }


def test_missed_rank_correlations_are_beyond_the_spread_of_equal_layers() -> None:
    """A model whose only error is that spread would miss these gates too, and reach all others."""
    for report in reports():
        for (name, value, _), (group, reached, often) in zip(
            report.rank_correlations, report.reachable, strict=True
        ):
            assert name == group
            assert 0 <= often <= 1
            missed = value < GATES[report.table.name]["Spearman"]
            assert missed == (reached < GATES[report.table.name]["Spearman"]), name


def test_the_page_is_up_to_date() -> None:
    """``galvatron validate --markdown > docs/accuracy.md`` makes it."""
    alone = constants_alone([shipped_table(name) for name in SHIPPED])
    assert PAGE.read_text(encoding="utf-8") == accuracy_page(reports(), alone)


def test_figures_are_over_held_out_rows() -> None:
    for report in reports():
        held_out = [prediction for prediction in report.predictions if not prediction.fitted]
        fitted = len(report.predictions) - len(held_out)
        assert 0 < fitted <= len(report.predictions) / 3
        if report.time is not None:
            assert report.time.rows == len(held_out)


def test_no_row_is_lost() -> None:
    for report in reports():
        rows = {prediction.run.row for prediction in report.predictions} | {
            row.row for row in report.unexplained
        }
        assert len(rows) == len(report.predictions) + len(report.unexplained)
        assert rows == set(range(1, len(rows) + 1))


def test_one_device_one_description() -> None:
    """The device of a test bed is the shipped cluster's, only the network and the constants differ."""
    devices = [shipped_test_bed(name).device for name in ("vtrain-multi", "vtrain-single", "selene")]
    assert devices == devices[:1] * 3
