"""Shows an estimate, or the difference between two, as tables of terms or as JSON."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from galvatron_megatron.cost.estimate import Estimate, StageEstimate
from galvatron_megatron.cost.host_memory import HostUse
from galvatron_megatron.cost.schedule import Simulation
from galvatron_megatron.cost.terms import Term
from galvatron_megatron.describe.cluster import Calibration, Cluster

_GIB = 2**30


def confidence(calibration: Calibration) -> str:
    """One line that says how sure an estimate of time is."""
    if not calibration.runs:
        return "uncalibrated: no measured run of this device was fitted"
    return (
        f"calibrated on {calibration.runs} runs of {calibration.table}: mean error "
        f"{calibration.mean_error:.1%}, 80 % of held-out runs took {calibration.low:.2f} to "
        f"{calibration.high:.2f} times the estimate"
    )


def memory_confidence(calibration: Calibration) -> str:
    """One line that says how sure an estimate of memory is."""
    if not calibration.memory_runs:
        return "uncalibrated: no measured memory of this device was fitted"
    return (
        f"calibrated on {calibration.memory_runs} runs of {calibration.memory_table}: mean error "
        f"{calibration.memory_mean_error:.1%}, 80 % of held-out ranks allocated "
        f"{calibration.memory_low:.2f} to {calibration.memory_high:.2f} times the estimate"
    )


def estimate_document(
    estimate: Estimate,
    cluster: Cluster,
    simulation: Simulation | None = None,
    host: HostUse | None = None,
) -> dict:
    """The estimate as plain values: seconds, bytes and GB (2**30 bytes), one entry per pipeline rank.

    Host memory is of the node that keeps most.
    """
    calibration = cluster.calibration
    document: dict[str, object] = {
        "step_seconds": estimate.step_seconds,
        "pipeline_seconds": estimate.pipeline_seconds,
        "bubble_seconds": estimate.bubble_seconds,
        "sync_seconds": estimate.sync_seconds,
        "overhead_seconds": estimate.overhead_seconds,
        "tokens_per_second_per_device": estimate.tokens_per_second_per_device,
        "model_flops_utilization": estimate.model_flops_utilization,
        "memory_gb": [stage.peak_bytes / _GIB for stage in estimate.stages],
        "calibrated": calibration.runs > 0,
        "memory_calibrated": calibration.memory_runs > 0,
        "stages": [_stage_document(stage) for stage in estimate.stages],
    }
    if calibration.runs:
        document["step_seconds_band"] = [
            estimate.step_seconds * calibration.low,
            estimate.step_seconds * calibration.high,
        ]
    if calibration.memory_runs:
        document["memory_gb_band"] = [
            [
                (stage.allocated_bytes * factor + stage.peak_bytes - stage.allocated_bytes) / _GIB
                for factor in (calibration.memory_low, calibration.memory_high)
            ]
            for stage in estimate.stages
        ]
    if host is not None and host.kept_bytes:
        document["host_memory_gb"] = host.kept_bytes / _GIB
        document["host_memory_fits"] = host.fits if host.node_bytes else None
    if simulation is not None:
        document["simulated_step_seconds"] = simulation.step_seconds + estimate.overhead_seconds
        document["simulated_peak_gb"] = [
            (stage.state_bytes + stage.overhead_bytes + peak) / _GIB
            for stage, peak in zip(estimate.stages, simulation.peak_bytes, strict=True)
        ]
    return document


def _stage_document(stage: StageEstimate) -> dict[str, object]:
    return {
        "micro_batch_seconds": stage.seconds,
        "sync_seconds": stage.sync_seconds,
        "peak_bytes": stage.peak_bytes,
        "micro_batch_terms": _rows(stage.micro_batch_terms),
        "sync_terms": _rows(stage.sync_terms),
        "memory_terms": _rows(stage.memory_terms),
    }


def _rows(terms: Iterable[Term]) -> list[dict[str, object]]:
    return [{"name": term.name, "value": term.value, "source": term.source} for term in terms]


def print_estimate(
    console: Console,
    title: str,
    estimate: Estimate,
    cluster: Cluster,
    memory_bytes: int,
    simulation: Simulation | None = None,
    host: HostUse | None = None,
    prices: Sequence[str] = (),
) -> None:
    """Prints totals, then the terms of time and of memory of the slowest and of the fullest pipeline rank.

    Args:
        console: where to.
        title: of the first table.
        estimate: to print.
        cluster: that was priced.
        memory_bytes: of a device.
        simulation: of the schedule.
        host: what nodes keep of offloaded states.
        prices: lines that say where measured prices come from, in place of how well modelled ones were fitted.
    """
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("step time", f"{estimate.step_seconds * 1e3:,.1f} ms")
    if simulation is not None:
        simulated = simulation.step_seconds + estimate.overhead_seconds
        table.add_row("step time, schedule simulated", f"{simulated * 1e3:,.1f} ms")
    if not prices:
        table.add_row("confidence", confidence(cluster.calibration))
    table.add_row("throughput", f"{estimate.tokens_per_second_per_device:,.0f} tokens/s per device")
    table.add_row("model FLOPs utilisation", f"{estimate.model_flops_utilization:.1%}")
    table.add_row("pipeline bubble", f"{estimate.bubble_seconds * 1e3:,.1f} ms")
    table.add_row("gradients, parameters, optimizer", f"{estimate.sync_seconds * 1e3:,.1f} ms")
    fits = estimate.peak_bytes <= memory_bytes
    limit = f"{memory_bytes / _GIB:.1f} GB"
    table.add_row(
        "memory of the fullest rank",
        f"{estimate.peak_bytes / _GIB:.2f} GB, {'fits' if fits else 'DOES NOT FIT'} in {limit}",
    )
    if host is not None and host.kept_bytes:
        table.add_row("host memory of the fullest node", _host_words(host))
    if not prices:
        table.add_row("confidence in memory", memory_confidence(cluster.calibration))
    console.print(table)
    for line in prices:
        console.print(f"prices: {line}", highlight=False, markup=False, soft_wrap=True)
    slowest = max(range(len(estimate.stages)), key=lambda rank: estimate.stages[rank].seconds)
    fullest = max(range(len(estimate.stages)), key=lambda rank: estimate.stages[rank].peak_bytes)
    time, memory = estimate.stages[slowest], estimate.stages[fullest]
    console.print(
        _terms_table(f"time of one micro-batch, pipeline rank {slowest}", time.micro_batch_terms, 1e3, "ms")
    )
    console.print(_terms_table(f"once per step, pipeline rank {slowest}", time.sync_terms, 1e3, "ms"))
    console.print(_terms_table(f"memory, pipeline rank {fullest}", memory.memory_terms, 1 / _GIB, "GB"))
    if len(estimate.stages) > 1:
        console.print(_stage_table(estimate))


def _host_words(host: HostUse) -> str:
    kept = f"{host.kept_bytes / _GIB:.2f} GB"
    if not host.node_bytes:
        return f"{kept}; what a node has is not known (host.memory_gib in the cluster file says it)"
    return f"{kept}, {'fits' if host.fits else 'DOES NOT FIT'} in {host.node_bytes / _GIB:.1f} GB"


def _terms_table(title: str, terms: Sequence[Term], scale: float, unit: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("term")
    table.add_column(unit, justify="right")
    table.add_column("share", justify="right")
    table.add_column("source")
    total = sum(term.value for term in terms)
    for term in sorted(terms, key=lambda term: -term.value):
        share = term.value / total if total else 0.0
        table.add_row(term.name, f"{term.value * scale:,.3f}", f"{share:.1%}", term.source)
    table.add_section()
    table.add_row("total", f"{total * scale:,.3f}", "", "")
    return table


def _stage_table(estimate: Estimate) -> Table:
    table = Table(title="pipeline ranks", title_justify="left")
    for name in ("rank", "micro-batch ms", "sync ms", "states GB", "activations GB", "transient GB", "peak GB"):
        table.add_column(name, justify="right")
    for rank, stage in enumerate(estimate.stages):
        sizes = (stage.state_bytes, stage.activation_bytes, stage.transient_bytes, stage.peak_bytes)
        table.add_row(
            str(rank),
            f"{stage.seconds * 1e3:,.2f}",
            f"{stage.sync_seconds * 1e3:,.2f}",
            *(f"{size / _GIB:.2f}" for size in sizes),
        )
    return table


def step_terms(estimate: Estimate, micro_batches: int) -> dict[str, float]:
    """Seconds of a step by name: the slowest rank's terms times the micro-batches, and what is around them."""
    slowest = max(estimate.stages, key=lambda stage: stage.seconds)
    terms = {term.name: term.value * micro_batches for term in slowest.micro_batch_terms}
    terms["pipeline bubble"] = estimate.bubble_seconds
    terms["gradients, parameters, optimizer"] = estimate.sync_seconds
    terms["outside all layers"] = estimate.overhead_seconds
    return terms


def compare_document(names: Sequence[str], estimates: Sequence[Estimate], micro_batches: Sequence[int]) -> dict:
    """Two estimates side by side by term: seconds of the step, bytes of the fullest rank."""
    times = [step_terms(*pair) for pair in zip(estimates, micro_batches, strict=True)]
    fullest = [max(estimate.stages, key=lambda stage: stage.peak_bytes) for estimate in estimates]
    sizes = [{term.name: term.value for term in stage.memory_terms} for stage in fullest]
    return {
        "plans": list(names),
        "step_seconds": [estimate.step_seconds for estimate in estimates],
        "peak_bytes": [stage.peak_bytes for stage in fullest],
        "time": _differences(times),
        "memory": _differences(sizes),
    }


def _differences(sides: Sequence[dict[str, float]]) -> list[dict[str, object]]:
    names = dict.fromkeys(name for side in sides for name in side)
    rows = [{"name": name, "values": [side.get(name, 0.0) for side in sides]} for name in names]
    return sorted(rows, key=lambda row: -abs(row["values"][1] - row["values"][0]))


def print_comparison(console: Console, document: dict) -> None:
    """Prints what :func:`compare_document` made, the largest difference first."""
    for title, key, total, scale, unit in (
        ("step time", "time", "step_seconds", 1e3, "ms"),
        ("memory of the fullest pipeline rank", "memory", "peak_bytes", 1 / _GIB, "GB"),
    ):
        table = Table(title=f"{title} ({unit})", title_justify="left")
        table.add_column("term")
        for name in (*document["plans"], "difference"):
            table.add_column(str(name), justify="right")
        rows = [(row["name"], row["values"]) for row in document[key]]
        for name, values in [*rows, ("total", document[total])]:
            left, right = (value * scale for value in values)
            if name == "total":
                table.add_section()
            table.add_row(name, f"{left:,.3f}", f"{right:,.3f}", f"{right - left:+,.3f}")
        console.print(table)
