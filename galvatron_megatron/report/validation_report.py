"""Shows how good predictions are: tables for the terminal, JSON, and the page ``docs/accuracy.md``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table as RichTable

from galvatron_megatron.cost.statistics import GOOD_CORRELATION, ErrorFigures
from galvatron_megatron.cost.validation import TableReport

_ODD = 0.2
"""Relative error from which a row is listed on the accuracy page."""

GATES: dict[str, dict[str, float]] = {
    "vtrain_a100_multi": {
        "time mean": 0.08,
        "time bias": 0.03,
        "Spearman": 0.9,
        "regret": 1.03,
        "worst regret": 1.1,
    },
    "vtrain_a100_single": {
        "time mean": 0.12,
        "time bias": 0.03,
        "Spearman": 0.9,
        "regret": 1.03,
        "worst regret": 1.1,
    },
    "megatron_b200": {
        "time mean": 0.05,
        "time bias": 0.03,
        "memory mean": 0.03,
        "memory worst": 0.06,
        "Spearman": 0.9,
        "regret": 1.03,
        "worst regret": 1.1,
    },
    "megatron_golden_memory": {"memory median": 0.05, "memory 90th percentile": 0.12},
    "heterogeneous_plans": {"time mean": 0.08, "time bias": 0.03, "regret": 1.03, "worst regret": 1.1},
    "megatron_papers": {"time worst": 0.05, "time bias": 0.03},
}
"""What the model is meant to reach, by table; a figure is held against its gate on held-out rows."""


_NOTES: dict[str, tuple[str, ...]] = {
    "vtrain_a100_multi": (
        "GPT 39.1B with tp 2, and some rows with tp 4, took 10 to 50 % longer than the same work at tp 1 or",
        "8, and not steadily: tp 2, dp 32, pp 8 took 21.9, 19.1 and 23.1 s at micro-batch 2, 3 and 6. One",
        "layer and sample at tp 4 (step time without the bubble) took 24.4, 19.4 and 19.1 ms at micro-batch",
        "2, 6 and 12 with dp 16, but 21.8, 23.7 and 24.9 ms with dp 8: equal kernels, opposite order. GPT",
        "18.4B with tp 8, dp 32 took 9.6 s at micro-batch 8 and 10.5 s at 16, without a bubble.",
        "",
        "Why Spearman misses its gate: runs with equal layers, which no model of the layers can tell apart,",
        "lie 6.7 % around their mean (1.9 % at tp 8, 10 % at tp 4, 13 % at tp 2), and plans lie as close",
        "together. A model that knew every plan's true time and whose only error were that spread would rank",
        "the held-out rows with 0.73 and 0.84 on average, and with 0.9 about once in ten draws (column",
        "`reachable` above). A free layer time for every (tp, micro-batch), held only to more work taking",
        "longer and a sample no longer in a larger micro-batch, with a free time for every (tp, dp, pp),",
        "fitted to ALL rows, ranks those of 18.4B with 0.891: 21 free values for 15 rows.",
        "",
        "Plans with tp 2 and 4, whose gradient groups have several but not all devices of a node, were",
        "slower than those with tp 1 and 8. The rings of NCCL before 2.12 cannot leave a node by an adapter",
        "beside another device than they came in by, so that such a group drives one share of the adapters",
        "(`spreads_groups: false` in the test bed). This is inferred: the table does not say which NCCL ran.",
        "Without it, the mean error is 6.6 % and the correlations 0.49 and 0.63.",
    ),
    "vtrain_a100_single": (
        "Read as not recomputed, though vTrain's files mark all runs as recomputed: at tp 1 and hidden 2048",
        "one more sample costs a layer 1.88 ms. With recomputation (447 GFLOP) that is 95 % of the device's",
        "peak even where the memory traffic beside it runs at the full bandwidth, which no GEMM library",
        "reaches; without (335 GFLOP) it is 66 %.",
        "",
        "A least-squares split of the step times without a pipeline into layers, ends and constants (within",
        "0.1 % on average) shows that a layer's time depends on hidden size, tp and micro-batch alone, not",
        "on dp, pp or depth, but not smoothly: less work often took longer at equal kernels. In ms: tp 4,",
        "micro-batch 1 and 2: 3.47, 3.34 at hidden 1024, 2.95, 2.73 at 2048; tp 2, hidden 1024, micro-batch",
        "1, 2, 4: 3.33, 3.58, 3.17; tp 8, hidden 1024, micro-batch 1, 2, 4: 5.00, 4.05, 3.76. No model in",
        "which more work takes longer comes closer than 11 % to all of these layers.",
        "",
        "So what the constants cannot hold is learnt per layer: `galvatron calibrate` keeps, beside the",
        "constants, how much longer a layer or head took that at least three of the fitted runs share",
        "(`layer_factors` in the test bed: measured efficiencies by shape, pulled towards 1). They are",
        'fitted on the same third of the rows; "constants alone" below says what is reached without them.',
        "Three layers decide that: hidden 1024, tp 2, micro-batch 4 (25 % too high by the constants) and",
        "hidden 2048, tp 4, micro-batch 1 and 2 (14 and 22 %) are in the fastest plans of their groups; the",
        "host that issued their kernels seems to have been faster, which nothing in the table explains.",
        "",
        "At tp 1, embedding and head took 4.9 ms a sample (hidden 1024) and 8.7 ms (2048), at some 80",
        "TFLOP/s, where tp 2 reached 200: as if the vocabulary was not padded. The table does not say so,",
        "and the tp 1 rows of vtrain_a100_multi, predicted 5 % high, speak against it.",
    ),
    "megatron_papers": (
        "The constants start from those fitted to vtrain_a100_multi, the same device. Table 3 of the paper has",
        "micro-batch 4 for 22B and 1 for the others; pipeline sends are cut over tp (scatter-gather).",
    ),
    "megatron_b200": (
        "Eight devices under a power limit: long GEMMs reach half of the peak, in all rows alike.",
    ),
    "megatron_golden_memory": (
        "The records do not say which attention kernel ran; it is read from the names of container and test",
        "(`galvatron_megatron/cost/records/golden.py`). Runs of one test with equal flags differ by up to 50 %",
        "(cross_entropy_loss_fusion: 1.65 to 2.48 GiB), which no model of the flags can follow; a second run,",
        "which loads a checkpoint first (`_2nd`), may peak while it loads.",
        "",
        "Experts are taken to get equal shares of the tokens. The runs are of 50 to 100 steps from a fresh",
        "router, whose shares are not equal, so that most rows with experts are predicted low (6 % in the",
        "median, up to 19 %); a later run of the same test, with a balanced router, comes within 3 % (row",
        "338). Grouped GEMMs keep 0.13 GiB more workspace on H100 and GB200 than on A100, which is not",
        "modelled. In row 288 Transformer Engine's operator fuser keeps less than the separate operators.",
    ),
    "heterogeneous_plans": (
        "Plans are cut between operators. Which operators are recomputed is not recorded, only how many; their",
        "share of the stage's operators is taken as their share of its forward time. Memory is not predicted.",
    ),
}
"""What a reader of the accuracy page should know, by table."""


_REASONS: dict[tuple[str, int], str] = {
    ("vtrain_a100_multi", 16): "the same plan with micro-batch 3 took 13 % less for the same samples",
    ("megatron_golden_memory", 151): "another run of the test with equal flags allocated 33 % less",
    ("megatron_golden_memory", 307): "a second run, which loads a checkpoint first and may peak while it loads",
}
"""Why a held-out row is far off, by table and row, where something is known."""


def gate_figures(report: TableReport) -> dict[str, float]:
    """The figures of a report that gates are about, by their names in ``GATES``."""
    figures: dict[str, float] = {}
    for kind, errors in (("time", report.time), ("memory", report.memory)):
        if errors is not None:
            figures |= {
                f"{kind} mean": errors.mean,
                f"{kind} median": errors.median,
                f"{kind} 90th percentile": errors.percentile_90,
                f"{kind} worst": errors.worst,
                f"{kind} bias": abs(errors.bias),
            }
    if report.rank_correlations:
        figures["Spearman"] = min(value for _, value, _ in report.rank_correlations)
    if report.regrets:
        figures["regret"] = report.mean_regret
        figures["worst regret"] = max(value for _, value, _ in report.regrets)
    return figures


def passes(name: str, figure: float, gate: float) -> bool:
    """Whether a figure is on the right side of its gate."""
    return figure >= gate if name == "Spearman" else figure <= gate


def report_document(report: TableReport) -> dict[str, object]:
    """The figures of one table as plain values; relative errors are fractions."""
    return {
        "kind": report.table.kind,
        "rows": len(report.predictions) + len(report.unexplained),
        "fitted_rows": sum(prediction.fitted for prediction in report.predictions),
        "time": _errors(report.time, report.worst_time),
        "memory": _errors(report.memory, report.worst_memory),
        "rank_correlations": [_group(*entry) for entry in report.rank_correlations],
        "layer_spread": report.layer_spread,
        "reachable_rank_correlations": [
            {"group": name, "mean": mean, "reaches_gate": often} for name, mean, often in report.reachable
        ],
        "regrets": [_group(*entry) for entry in report.regrets],
        "mean_regret": report.mean_regret,
        "gates": {
            name: {"figure": figure, "gate": gate, "passes": passes(name, figure, gate)}
            for name, gate in GATES.get(report.table.name, {}).items()
            if (figure := gate_figures(report).get(name)) is not None
        },
        "apart": [{"row": row.row, "reason": row.reason} for row in report.unexplained],
    }


def _errors(figures: ErrorFigures | None, worst: str) -> dict[str, object] | None:
    if figures is None:
        return None
    content = asdict(figures)
    del content["worst_index"]
    return content | {"worst_row": worst}


def _group(name: str, value: float, rows: int) -> dict[str, object]:
    return {"group": name, "value": value, "rows": rows}


def _lines(report: TableReport) -> list[tuple[str, ...]]:
    """Rows of the summary: (what, rows, mean, median, 90th percentile, worst, bias)."""
    lines = []
    for kind, figures in (("time", report.time), ("memory", report.memory)):
        if figures is not None:
            lines.append(
                (
                    f"{report.table.name} {kind}",
                    str(figures.rows),
                    f"{figures.mean:.1%}",
                    f"{figures.median:.1%}",
                    f"{figures.percentile_90:.1%}",
                    f"{figures.worst:.1%}",
                    f"{figures.bias:+.1%}",
                )
            )
    return lines


def print_reports(console: Console, reports: Sequence[TableReport]) -> None:
    """Prints errors, choice and gates of several tables."""
    table = RichTable(title="relative error over held-out rows", title_justify="left")
    table.add_column("table")
    for name in ("rows", "mean", "median", "90 %", "worst", "bias"):
        table.add_column(name, justify="right")
    for report in reports:
        for line in _lines(report):
            table.add_row(*line)
    console.print(table)
    gates = RichTable(title="gates", title_justify="left")
    for name in ("table", "figure", "value", "gate", "verdict"):
        gates.add_column(name)
    for report in reports:
        for line in _gate_lines(report):
            gates.add_row(*line)
    if gates.row_count:
        console.print(gates)
    for report in reports:
        if report.time is not None:
            console.print(f"{report.table.name}: worst time {report.worst_time}")
        if report.unexplained:
            console.print(f"{report.table.name}: {len(report.unexplained)} rows apart")
            for reason, count in Counter(row.reason for row in report.unexplained).most_common():
                console.print(f"  {count} x {reason}")


def _gate_lines(report: TableReport) -> list[tuple[str, str, str, str, str]]:
    figures = gate_figures(report)
    lines = []
    for name, gate in GATES.get(report.table.name, {}).items():
        if name in figures:
            verdict = "reached" if passes(name, figures[name], gate) else "MISSED"
            relation = ">=" if name == "Spearman" else "<="
            lines.append((report.table.name, name, f"{figures[name]:.3f}", f"{relation} {gate}", verdict))
    return lines


def accuracy_page(reports: Sequence[TableReport], constants_alone: Sequence[TableReport] = ()) -> str:
    """The page ``docs/accuracy.md``: deterministic, so that a test can hold it against the code.

    Args:
        reports: of every table.
        constants_alone: of tables whose test bed has layer factors, predicted without these.
    """
    lines = [
        "# How accurate the cost model is",
        "",
        "Made by `galvatron validate --markdown`; a test holds this page against the code. The constants of",
        "every test bed (`galvatron_megatron/data/validation/test_beds/`) are fitted by `galvatron calibrate`",
        "on a third of the rows of its table, chosen by a hash of each row's label; all figures are over the",
        "other rows. Sources and licences: `galvatron_megatron/data/validation/README.md`.",
        "",
        "| table | rows | mean error | median | 90th percentile | worst | bias |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        lines += ["| " + " | ".join(line) + " |" for line in _lines(report)]
    lines += ["", "## Gates", "", "| table | figure | value | gate | |", "|---|---|---|---|---|"]
    for report in reports:
        lines += ["| " + " | ".join(line) + " |" for line in _gate_lines(report)]
    lines += ["", "## Choice", ""]
    lines += [
        "Spearman's rank correlation of time per sample among the plans of one model on so many devices:",
        "",
    ]
    lines += [
        "`spread` is how far measured / predicted of runs with equal layers (same kernels on same shapes) lies",
        "around its mean, over the whole table: what no model of the layers can tell apart. `reachable` is the",
        "correlation that predictions whose only error is that spread, at random, reach on average, and how",
        f"often they reach {GOOD_CORRELATION}.",
        "",
        "| model and devices | correlation | rows | spread | reachable |",
        "|---|---|---|---|---|",
    ]
    for report in reports:
        for (name, value, rows), (_, reached, often) in zip(
            report.rank_correlations, report.reachable, strict=True
        ):
            lines.append(
                f"| {name} | {value:.3f} | {rows} | {report.layer_spread:.1%} | {reached:.3f}, {often:.0%} |"
            )
    lines += [
        "",
        "Regret, the measured time of the plan that the model would choose over the best measured one:",
        "",
    ]
    lines += ["| table | groups | mean | worst | worst group |", "|---|---|---|---|---|"]
    for report in reports:
        if report.regrets:
            name, worst, _ = max(report.regrets, key=lambda entry: entry[1])
            figures = f"{len(report.regrets)} | {report.mean_regret:.3f} | {worst:.3f}"
            lines.append(f"| {report.table.name} | {figures} | {name} |")
    if constants_alone:
        lines += ["", "## Constants alone", ""]
        lines += [
            "What the constants reach without the layer factors that `galvatron calibrate` learns beside them:",
            "",
            "| table | mean error | median | bias | Spearman, worst group | regret, mean | regret, worst |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_constants_line(report) for report in constants_alone]
    lines += ["", "## Notes", ""]
    for report in reports:
        note = _NOTES.get(report.table.name)
        if note:
            lines += [f"**{report.table.name}**", "", *note, ""]
    lines += [f"## Held-out rows more than {_ODD:.0%} off", ""]
    for report in reports:
        lines += _odd_rows(report)
    lines += ["", "## Rows that are not predicted, and why", ""]
    for report in reports:
        for reason, count in Counter(row.reason for row in report.unexplained).most_common():
            lines.append(f"- {report.table.name}: {count} rows: {reason}")
    return "\n".join(lines) + "\n"


def _constants_line(report: TableReport) -> str:
    figures = gate_figures(report)
    errors = " | ".join(f"{figures[f'time {name}']:.1%}" for name in ("mean", "median", "bias"))
    choice = " | ".join(f"{figures[name]:.3f}" for name in ("Spearman", "regret", "worst regret"))
    return f"| {report.table.name} | {errors} | {choice} |"


def _odd_rows(report: TableReport) -> list[str]:
    lines = []
    for prediction in report.predictions:
        run = prediction.run
        if prediction.fitted:
            continue
        errors = []
        if run.step_seconds:
            errors.append(("time", prediction.step_seconds / run.step_seconds - 1))
        for (_, predicted), (_, measured) in zip(prediction.allocated_bytes, run.peak_bytes, strict=True):
            errors.append(("memory", predicted / measured - 1))
        for kind, error in errors:
            if abs(error) > _ODD:
                reason = _REASONS.get((report.table.name, run.row), "not explained")
                lines.append(f"- {report.table.name} row {run.row}, {run.label}: {kind} {error:+.1%}; {reason}")
    return lines
