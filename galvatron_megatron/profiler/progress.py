"""The progress bar of a profiling session on rank 0, and where its time went."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows how far the measurements are and the time that is left; silent on other ranks.

    Where the output is no terminal it prints a line now and then instead of a moving bar. At the end it
    says how long the phases took, where anything was measured.

    Args:
        show: print at all.
        console: where to; the standard error stream by default.
    """

    def __init__(self, *, show: bool, console: Console | None = None) -> None:
        self._show = show
        self._console = console or Console(file=sys.stderr)
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._done = 0
        self._total = 0
        self._begun = 0.0
        self.text = ""
        """What is measured now."""
        self.last_told = monotonic()
        """When anything was begun or finished last, on the clock of ``time.monotonic``."""
        self.seconds: dict[str, float] = defaultdict(float)
        """Seconds by phase; a phase inside another one counts for itself alone."""
        self._phase = "start"
        self._since = self._started = perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._enter("")
        if self._total and exc[0] is None:
            phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
            self.note(f"profiled in {perf_counter() - self._started:.1f} s: {phases}")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time spent inside for a phase, and no longer for the one around it."""
        around = self._enter(name)
        try:
            yield
        finally:
            self._enter(around)

    def _enter(self, name: str) -> str:
        self.last_told = monotonic()
        before, now = self._phase, perf_counter()
        self.seconds[before] += now - self._since
        self._phase, self._since = name, now
        return before

    def start(self, total: int) -> None:
        """Tells how many measurements there are to make."""
        self._total = total
        self._begun = perf_counter()
        if not self._show or not total:
            return
        if self._console.is_terminal:
            self._bar = RichProgress(
                SpinnerColumn(),
                TextColumn("profiling"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        else:
            self._console.print(f"profiling: {total} measurements to make", highlight=False)

    def at(self, text: str) -> None:
        """Names what is measured now."""
        self.text = text
        self.last_told = monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def advance(self, count: int = 1) -> None:
        """Counts finished measurements."""
        self.last_told = monotonic()
        before, self._done = self._done, self._done + count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif self._show and self._total and self._done * 4 // self._total > before * 4 // self._total:
            left = (perf_counter() - self._begun) * (self._total - self._done) / self._done
            self._console.print(
                f"profiling: {self._done} of {self._total} done, about {left:.0f} s left, {self.text}",
                highlight=False,
                soft_wrap=True,
            )

    def note(self, text: str) -> None:
        """Shows a line that must not be missed."""
        if self._show:
            self._console.print(text, highlight=False, soft_wrap=True)
