"""What ends a rank that waits for another one."""

import threading
import time

import pytest

from galvatron_megatron.profiler import lost_ranks
from galvatron_megatron.profiler.lost_ranks import Watchdog
from galvatron_megatron.profiler.progress import Progress

pytestmark = pytest.mark.alone


@pytest.fixture
def two_ranks(monkeypatch):
    """This process is one rank of two, and patience is short."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lost_ranks, "SIGN_SECONDS", 0.1)
    monkeypatch.setattr(lost_ranks, "GRACE_SECONDS", 0.1)


def test_a_rank_that_is_told_nothing_is_ended_with_what_it_measured(two_ranks):
    lines, ended = [], threading.Event()

    def end(line):
        lines.append(line)
        ended.set()

    progress = Progress(show=False)
    progress.at("all_reduce of 2 ranks")
    with Watchdog(0.2, end) as watchdog:
        watchdog.watch(progress)
        assert ended.wait(10)
    (line,) = lines
    assert line.startswith("profile: rank 1 of 2 waited in vain for ")
    assert "while measuring all_reduce of 2 ranks (at most 0 s: the rendezvous store" in line


def test_a_rank_that_goes_on_is_left_alone(two_ranks):
    lines = []
    progress = Progress(show=False)
    with Watchdog(1.0, lines.append) as watchdog:
        watchdog.watch(progress)
        for _ in range(8):
            time.sleep(0.25)
            progress.advance()
    time.sleep(1.5)
    assert not lines


def test_a_lone_process_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = threading.active_count()
    with Watchdog(0.01, pytest.fail):
        assert threading.active_count() == before
