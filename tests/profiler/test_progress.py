"""The progress bar: on a terminal it moves and tells the time left; elsewhere there are a few lines."""

import io
import time

import pytest
from rich.console import Console

from galvatron_megatron.profiler.progress import Progress

pytestmark = pytest.mark.alone


def shown(*, terminal: bool, show: bool = True, total: int = 8) -> str:
    """What a session of eight measurements prints."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=150, color_system=None)
    with Progress(show=show, console=console) as progress:
        progress.start(total)
        with progress.phase("links"):
            for index in range(total):
                progress.at(f"curve {index}")
                time.sleep(0.03)
                progress.advance()
    return stream.getvalue()


def test_on_a_terminal_a_bar_moves_and_tells_the_time_left():
    text = shown(terminal=True)
    frames = {line.strip() for line in text.replace("\r", "\n").splitlines() if "profiling" in line}
    assert len(frames) > 2, text
    # Done and all, the time left as h:mm:ss, and what is measured now.
    counts = [f"{done}/8" for done in range(9)]
    assert sum(any(count in frame for frame in frames) for count in counts) >= 2, text
    assert any("0:00:00" in frame and "curve" in frame for frame in frames), text


def test_without_a_terminal_quarters_are_told_with_the_time_left():
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "profiling: 8 measurements to make"
    assert lines[1] == "profiling: 2 of 8 done, about 0 s left, curve 1"
    assert len(lines) == 6 and lines[-1].startswith("profiled in 0.")


def test_the_time_left_follows_from_the_time_taken(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("galvatron_megatron.profiler.progress.perf_counter", lambda: now[0])
    stream = io.StringIO()
    with Progress(show=True, console=Console(file=stream, width=150)) as progress:
        progress.start(40)
        with progress.phase("links"):
            now[0] += 30
            with progress.phase("storing"):
                now[0] += 2
            progress.advance(10)
        with progress.phase("layers"):
            now[0] += 10
    lines = stream.getvalue().splitlines()
    assert "10 of 40 done, about 96 s left" in lines[1]
    assert lines[-1] == "profiled in 42.0 s: start 0.0 s, links 30.0 s, storing 2.0 s, layers 10.0 s"


def test_other_ranks_and_sessions_without_work_are_silent():
    assert shown(terminal=True, show=False) == ""
    assert shown(terminal=False, show=False) == ""
    assert shown(terminal=False, total=0) == ""
