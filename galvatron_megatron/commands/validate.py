"""``galvatron validate``: the cost model against measured runs."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from galvatron_megatron.cost.records.tables import read_table
from galvatron_megatron.cost.validation import Predictor, TableReport, shipped_test_bed, validate_table
from galvatron_megatron.describe.cluster import Cluster, read_cluster
from galvatron_megatron.report.terminal import terminal
from galvatron_megatron.report.validation_report import accuracy_page, print_reports, report_document

EPILOG = """\
examples:
  galvatron validate
      the tables that come with the package
  galvatron validate runs.csv --cluster my-cluster.yaml
      a table of your own; its kind is recognised from its columns
  galvatron validate --json
      the figures per table
"""
SHIPPED = (
    "vtrain_a100_multi",
    "vtrain_a100_single",
    "megatron_papers",
    "megatron_b200",
    "megatron_golden_memory",
    "heterogeneous_plans",
)
"""Tables that come with the package."""


def shipped_table(name: str) -> Path:
    """The file of a table that comes with the package."""
    return Path(str(files("galvatron_megatron.data") / "validation" / f"{name}.csv"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("tables", nargs="*", type=Path, metavar="TABLE", help="CSV files of measured runs")
    parser.add_argument(
        "--cluster",
        type=Path,
        help="cluster file, or a shipped name, to predict with, instead of the shipped test beds",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print the page docs/accuracy.md")


def run(arguments: argparse.Namespace) -> int:
    """Predicts every run and prints the figures.

    Returns:
        0.

    Raises:
        GalvatronError: a table or the cluster cannot be read.
    """
    paths = arguments.tables or [shipped_table(name) for name in SHIPPED]
    if arguments.cluster is None:
        predict = Predictor()
    else:
        cluster = read_cluster(arguments.cluster)
        predict = Predictor(lambda _: cluster)
    reports = [validate_table(read_table(path), predict) for path in paths]
    if arguments.json:
        print(json.dumps({report.table.name: report_document(report) for report in reports}, indent=2))
    elif arguments.markdown:
        alone = constants_alone(paths) if arguments.cluster is None else []
        print(accuracy_page(reports, alone), end="")
    else:
        print_reports(terminal(), reports)
    return 0


def constants_alone(paths: Sequence[Path]) -> list[TableReport]:
    """Reports of the tables whose test beds have layer factors, predicted without these."""

    def without_factors(name: str) -> Cluster:
        return replace(shipped_test_bed(name), layer_factors=())

    tables = [read_table(path) for path in paths]
    return [
        validate_table(table, Predictor(without_factors))
        for table in tables
        if any(shipped_test_bed(name).layer_factors for name in {run.cluster for run in table.runs})
    ]
