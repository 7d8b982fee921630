"""Recognises a table by its columns and reads its rows as measured runs."""

import csv
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from galvatron_megatron.cost.records import b200, golden, mist, throughput
from galvatron_megatron.cost.records.values import MeasuredRun, RowReader
from galvatron_megatron.errors import DescriptionError, GalvatronError

_KINDS: dict[str, tuple[frozenset[str], Callable[[RowReader], MeasuredRun]]] = {
    "vtrain": (throughput.VTRAIN_COLUMNS, throughput.vtrain_run),
    "papers": (throughput.PAPER_COLUMNS, throughput.paper_run),
    "b200": (b200.COLUMNS, b200.b200_run),
    "golden": (golden.COLUMNS, golden.golden_run),
    "heterogeneous": (mist.COLUMNS, mist.mist_run),
}


@dataclass(kw_only=True, frozen=True, slots=True)
class Unread:
    """A row that is no run, and why."""

    row: int
    reason: str


@dataclass(kw_only=True, frozen=True, slots=True)
class Table:
    """A table of measured runs."""

    path: Path
    kind: str
    """``vtrain``, ``papers``, ``b200``, ``golden`` or ``heterogeneous``."""
    runs: tuple[MeasuredRun, ...]
    unread: tuple[Unread, ...]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def read_table(path: str | Path) -> Table:
    """Reads a table; its kind is recognised by its columns.

    A row that cannot be read as a run is kept with the reason, none is dropped in silence.

    Raises:
        DescriptionError: the file cannot be read, has no rows, or columns of no known kind.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, rows = set(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DescriptionError(f"table {path}: {reason}; valid: a readable CSV file") from error
    kinds = [kind for kind, (needed, _) in _KINDS.items() if needed <= columns]
    if not kinds:
        known = "; ".join(f"{kind}: {', '.join(sorted(needed))}" for kind, (needed, _) in _KINDS.items())
        raise DescriptionError(f"table {path}: columns of no known kind; valid: {known}")
    if not rows:
        raise DescriptionError(f"table {path}: no rows; valid: at least one")
    parse = _KINDS[kinds[0]][1]
    runs, unread = [], []
    for number, row in enumerate(rows, start=1):
        try:
            runs.append(parse(RowReader(row, number, path.name)))
        except GalvatronError as error:
            unread.append(Unread(row=number, reason=str(error)))
    return Table(path=path, kind=kinds[0], runs=tuple(runs), unread=tuple(unread))


def fitting_rows(runs: Iterable[MeasuredRun]) -> frozenset[int]:
    """Rows that constants are fitted on: a third of those without doubt, the same in every run of the program.

    The choice is by a hash of the row's label, so it depends neither on the order of the table nor on anything
    that is measured.

    Returns:
        Row numbers; the others are held out.
    """
    certain = sorted(
        (hashlib.sha256(f"{run.label}|{run.row}".encode()).hexdigest(), run.row)
        for run in runs
        if not run.doubt
    )
    return frozenset(row for _, row in certain[: len(certain) // 3])
