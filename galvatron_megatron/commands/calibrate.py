"""``galvatron calibrate``: fits a cluster's constants to measured runs, or a profile to what jobs observed."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from galvatron_megatron.commands.calibrate_observed import check_exists, is_observed, merge_observed
from galvatron_megatron.cost.calibration import calibrate
from galvatron_megatron.cost.layer_factors import LEAST_RUNS
from galvatron_megatron.cost.records.tables import fitting_rows, read_table
from galvatron_megatron.describe.cluster import cluster_document, read_cluster
from galvatron_megatron.describe.profile_store import default_directory
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.document import check_target, write_document
from galvatron_megatron.report.terminal import terminal

DEFAULT_FOLDS = 3
EPILOG = """\
examples:
  galvatron calibrate runs.csv --cluster my-cluster.yaml --output my-cluster-calibrated.yaml
      fits on a third of the rows, so that galvatron validate can judge on the rest
  galvatron calibrate runs.csv --cluster my-cluster.yaml --all-rows
      fits on every row
  galvatron calibrate OBSERVED_DIR
      merges what jobs wrote under --galvatron-observe into the stored profile,
      which the next --galvatron-auto prices with
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="RUNS",
        help="CSV file of measured runs; or files (.jsonl) or directories of --galvatron-observe",
    )
    parser.add_argument(
        "--cluster",
        type=Path,
        help="cluster file, or a shipped name, that the runs of a CSV file were made on",
    )
    parser.add_argument("--output", type=Path, help="write the cluster with the fitted constants here")
    parser.add_argument("--all-rows", action="store_true", help="fit on every row, not on a third of them")
    parser.add_argument("--folds", type=int, help=f"parts of the cross-validation (default: {DEFAULT_FOLDS})")
    parser.add_argument(
        "--constants-only",
        action="store_true",
        help="do not learn, beside the constants, what layers took that at least three runs share",
    )
    parser.add_argument(
        "--profile-dir",
        type=Path,
        help=f"store of the profile that observed files are merged into (default: {default_directory()})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Fits, prints the constants and the cross-validated error, and writes the cluster; or merges jobs.

    Returns:
        0.

    Raises:
        GalvatronError: an input cannot be read, or has too few runs.
    """
    for path in arguments.inputs:
        check_exists(path)
    if is_observed(arguments.inputs):
        for flag in ("cluster", "output", "all_rows", "folds", "constants_only"):
            if getattr(arguments, flag) not in (None, False):
                raise DescriptionError(
                    f"--{flag.replace('_', '-')}: goes with a CSV file of runs; valid: --profile-dir, --json"
                )
        return merge_observed(arguments.inputs, arguments.profile_dir, as_json=arguments.json)
    if len(arguments.inputs) > 1 or arguments.cluster is None or arguments.profile_dir is not None:
        raise DescriptionError(
            f"{arguments.inputs[0]}: fits a cluster's constants; valid: one CSV file, with --cluster and "
            "without --profile-dir (.jsonl files and directories are observed jobs)"
        )
    folds = DEFAULT_FOLDS if arguments.folds is None else arguments.folds
    if folds < 2:
        raise DescriptionError(f"--folds: {folds}; valid: an integer >= 2")
    if arguments.output is not None:
        check_target(arguments.output, "--output", DescriptionError, suffixes=(".yaml", ".yml"))
    cluster = read_cluster(arguments.cluster)
    table = read_table(arguments.inputs[0])
    chosen = fitting_rows(table.runs)
    runs = [run for run in table.runs if arguments.all_rows or run.row in chosen]
    others = [run for run in table.runs if run not in runs]
    fit = calibrate(
        cluster,
        runs,
        table.path.name,
        held_out=others,
        folds=folds,
        layer_factors=not arguments.constants_only,
    )
    if arguments.output is not None:
        write_document(cluster_document(fit.cluster), arguments.output, DescriptionError)
    changes = _changes(asdict(cluster), asdict(fit.cluster))
    if arguments.json:
        document = {
            "runs": fit.cluster.calibration.runs,
            "fitted_error": fit.fitted_error,
            "cross_validated_error": fit.cross_error,
            "folds": fit.folds,
            "layer_factors": [list(entry) for entry in fit.cluster.layer_factors],
            "constants": {name: {"before": before, "after": after} for name, before, after in changes},
        }
        print(json.dumps(document, indent=2))
        return 0
    console = terminal()
    calibration = fit.cluster.calibration
    fitted_runs = max(calibration.runs, calibration.memory_runs)
    shown = Table(title=f"{cluster.name}, fitted on {fitted_runs} runs", title_justify="left")
    shown.add_column("constant")
    shown.add_column("before", justify="right")
    shown.add_column("after", justify="right")
    for name, before, after in changes:
        shown.add_row(name, f"{before:.4g}", f"{after:.4g}")
    console.print(shown)
    if fit.cluster.layer_factors:
        factors = [entry[3] for entry in fit.cluster.layer_factors]
        console.print(
            f"{len(factors)} layers or heads that at least {LEAST_RUNS} runs share took {min(factors):.2f} to "
            f"{max(factors):.2f} times what the constants say"
        )
    if fit.folds:
        console.print(
            f"mean error {fit.fitted_error:.1%} on the runs fitted, {fit.cross_error:.1%} in "
            f"{fit.folds}-fold cross-validation"
        )
        if others:
            console.print(f"mean error {fit.cluster.calibration.mean_error:.1%} on {len(others)} held-out runs")
    if calibration.memory_runs:
        judged = "held-out runs" if any(run.peak_bytes for run in others) else "the runs fitted"
        console.print(f"memory: mean error {calibration.memory_mean_error:.1%} on {judged}")
    if arguments.output is not None:
        console.print(f"written to {arguments.output}")
    return 0


def _changes(before: dict, after: dict) -> list[tuple[str, float, float]]:
    """(constant, before, after) of every number that the fit changed."""
    return [
        (f"{part}.{name}", value, after[part][name])
        for part in ("constants", "intra_node", "inter_node")
        for name, value in before[part].items()
        if after[part][name] != value
    ]
