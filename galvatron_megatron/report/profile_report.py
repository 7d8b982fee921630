"""Shows a profile: tables in the terminal, measured points and fitted curves in a picture."""

from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from galvatron_megatron.describe.profile import EMBEDDING, HEAD, Profile
from galvatron_megatron.errors import GalvatronError


def age(profile: Profile, now: datetime | None = None) -> str:
    """How long ago the last measurement was made, in words."""
    return age_of(profile.provenance.updated, now)


def age_of(time: str, now: datetime | None = None) -> str:
    """How long ago a time was (UTC, ISO 8601), in words."""
    try:
        then = datetime.fromisoformat(time)
    except ValueError:
        return "unknown"
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(seconds, 0):.0f} seconds"


def provenance_line(profile: Profile) -> str:
    """On what a profile was measured, when and with what."""
    place = profile.provenance
    software = ", ".join(f"{name} {version}" for name, version in place.software)
    switches = f"; {place.switches}" if place.switches else ""
    return (
        f"profile {profile.fingerprint()}: {place.nodes} x {place.ranks_per_node} ranks on {place.device} "
        f"({place.backend}), measured {age(profile)} ago with {software}{switches}"
    )


def print_list(profiles: list[Profile], console: Console) -> None:
    """One line per profile, newest first."""
    table = Table(title=None, header_style="bold")
    for name in ("fingerprint", "device", "ranks", "backend", "age", "layer points", "curves"):
        table.add_column(name)
    for profile in profiles:
        place = profile.provenance
        table.add_row(
            profile.fingerprint(),
            place.device,
            f"{place.nodes} x {place.ranks_per_node}",
            place.backend,
            age(profile),
            str(len(profile.parts)),
            str(len(profile.collectives)),
        )
    console.print(table)


def print_profile(profile: Profile, console: Console) -> None:
    """The whole profile, in tables."""
    console.print(provenance_line(profile), highlight=False, soft_wrap=True)
    links = Table(title="collectives", header_style="bold", title_justify="left")
    for name in ("collective", "ranks", "stride", "nodes", "siblings", "latency us", "GB/s", "fit error"):
        links.add_column(name, justify="left" if name == "collective" else "right")
    for curve in profile.collectives:
        links.add_row(
            curve.collective,
            str(curve.ranks),
            str(curve.stride),
            str(curve.nodes),
            "at once" if curve.contention else "idle",
            f"{curve.latency_seconds * 1e6:.0f}",
            f"{curve.bandwidth_bytes_per_second / 1e9:.3g}",
            f"{curve.residual:.0%}",
        )
    if profile.collectives:
        console.print(links)
    if profile.overlaps:
        found = ", ".join(f"{entry.collective} {entry.slowdown:.2f}" for entry in profile.overlaps)
        console.print(f"slow-down of computation and communication side by side: {found}", highlight=False)
    parts = Table(title="parts of the model, one micro-batch", header_style="bold", title_justify="left")
    for name in ("part", "tp", "recompute", "samples", "forward ms", "backward ms", "kept MB", "peak above MB"):
        parts.add_column(name, justify="left" if name in ("part", "tp", "recompute") else "right")
    for point in profile.parts:
        kind = "" if point.sequence_parallel.value == "none" else f" {point.sequence_parallel.value}"
        name = point.part if point.part in (EMBEDDING, HEAD) else f"layer {point.part[:6]}"
        row = [name, f"{point.tp}{kind}", point.recompute.value, str(point.micro_batch_size)]
        if point.failure:
            parts.add_row(*row, point.failure)
            continue
        numbers = (point.forward_seconds * 1e3, point.backward_seconds * 1e3)
        sizes = (point.activation_bytes / 1e6, point.transient_bytes / 1e6)
        parts.add_row(*row, *(f"{value:.2f}" for value in (*numbers, *sizes)))
    if profile.parts:
        console.print(parts)
    steps = Table(title="optimizer step", header_style="bold", title_justify="left")
    for name in ("zero", "tensors", "parameters", "updated here", "ms"):
        steps.add_column(name, justify="right")
    for where, found in (("", profile.steps), (" in host memory", profile.host_steps)):
        for step in found:
            counts = (f"{step.zero}{where}", step.tensors, step.parameters, step.updated)
            steps.add_row(*(str(count) for count in counts), f"{step.seconds * 1e3:.2f}")
    if profile.steps:
        console.print(steps)
    for note in profile.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def plot_profile(profile: Profile, path: Path) -> None:
    """Draws measured points and fitted curves: collectives on the left, layers on the right.

    Args:
        profile: what to draw.
        path: picture to write; the ending decides the format.

    Raises:
        GalvatronError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise GalvatronError(
            "--plot: matplotlib is not installed; valid: pip install 'galvatron_megatron[report]'"
        ) from None
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    links, layers = figure.subplots(1, 2)
    for curve in profile.collectives:
        sizes = [size for size, _ in curve.points]
        line = links.plot(sizes, [seconds * 1e3 for _, seconds in curve.points], "o", markersize=4)[0]
        fitted = [(curve.latency_seconds + size * curve.seconds_per_byte) * 1e3 for size in sizes]
        label = f"{curve.collective} {curve.ranks} ranks, stride {curve.stride}"
        label += "" if curve.contention else ", alone"
        links.plot(sizes, fitted, "-", color=line.get_color(), linewidth=1, label=label)
    links.set(
        xscale="log", yscale="log", xlabel="message bytes", ylabel="ms", title="collectives: points and fit"
    )
    groups: dict[tuple, list] = {}
    for point in profile.parts:
        if not point.failure and point.part not in (EMBEDDING, HEAD):
            groups.setdefault(point.key[:-1], []).append(point)
    for key, points in groups.items():
        points.sort(key=lambda point: point.micro_batch_size)
        times = [(point.forward_seconds + point.backward_seconds) * 1e3 for point in points]
        kind = "" if key[2] == "none" else f" {key[2]}"
        label = f"{key[0][:6]} tp {key[1]}{kind}, recompute {key[3]}"
        layers.plot([point.micro_batch_size for point in points], times, "o-", markersize=4, label=label)
    layers.set(xlabel="samples per micro-batch", ylabel="forward + backward, ms", title="layers")
    for axes in (links, layers):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise GalvatronError(
            f"--plot {path}: cannot be written ({error}); valid: a .png, .svg or .pdf file"
        ) from None
