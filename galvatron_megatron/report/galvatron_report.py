"""Shows profiles that were imported from Hetu-Galvatron."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from galvatron_megatron.describe.galvatron_store import GalvatronImport
from galvatron_megatron.describe.galvatron_tables import machine_tables, model_tables
from galvatron_megatron.report.profile_report import age_of


def print_imports(entries: Sequence[GalvatronImport], console: Console) -> None:
    """One line per profile."""
    table = Table(title="imported from Hetu-Galvatron", title_justify="left", header_style="bold")
    for name in ("fingerprint", "machine", "model", "sequence length", "files changed", "imported"):
        table.add_column(name)
    for entry in entries:
        table.add_row(
            entry.fingerprint(),
            ", ".join(f"{nodes} x {devices}" for nodes, devices in entry.files.machines()) or "-",
            entry.model or "-",
            ", ".join(map(str, entry.files.seq_lengths())) or "-",
            f"{age_of(entry.changed)} ago",
            f"{age_of(entry.imported)} ago",
        )
    console.print(table)


def print_import(entry: GalvatronImport, console: Console) -> None:
    """The whole profile, in tables."""
    console.print(
        f"profile {entry.fingerprint()}: imported from Hetu-Galvatron {age_of(entry.imported)} ago, files last "
        f"changed {age_of(entry.changed)} ago, from {', '.join(entry.sources)}",
        highlight=False,
        soft_wrap=True,
    )
    links = Table(title="machine: bandwidth, GB/s", header_style="bold", title_justify="left")
    for name in ("nodes x devices", "all-reduce of ranks, consecutive", "strided", "send at pp"):
        links.add_column(name)
    for nodes, devices in entry.files.machines():
        found = machine_tables(entry.files, nodes * devices, nodes)
        rings = sorted(found["all_reduce_gb_per_second"].items())
        links.add_row(
            f"{nodes} x {devices}",
            *(
                _pairs({ranks: value for (ranks, near), value in rings if near == kind})
                for kind in (True, False)
            ),
            _pairs(found["send_gb_per_second"]),
        )
    if entry.has_machine:
        console.print(links)
        slowdown = found["overlap_slowdown"]
        console.print(f"slow-down of computation and communication side by side: {slowdown:.2f}")
    layers = Table(title=f"model {entry.model}: one sample", header_style="bold", title_justify="left")
    columns = ("sequence length", "layer forward ms by batch", "embedding and head ms", "layer MB in fp32")
    for name in (*columns, "kept MB by tp"):
        layers.add_column(name)
    for seq_length in entry.files.seq_lengths():
        model = model_tables(entry.files, seq_length)
        layers.add_row(
            str(seq_length),
            _pairs(model["layer_ms"]),
            _pairs(model["other_ms"]),
            f"{model['parameter_mb']:.1f}",
            f"{_pairs(model['activation_mb'])}; recomputed: {model['checkpoint_mb']:.4g}",
        )
    if entry.model:
        console.print(layers)


def _pairs(values: dict[int, float]) -> str:
    return ", ".join(f"{key}: {value:.4g}" for key, value in sorted(values.items()))
