"""Runs the tests with both cores of a small machine in use: ``python tests/run.py [words for pytest]``.

Ranks that are kept for one test after another wait for each other a fourth of the time. All that needs none of
them, tests without ranks and those that start whole jobs (marked ``jobs``), runs beside, at a lower priority.
Tests that assert on measured times (marked ``alone``) come last, with nothing beside them.
Which tests run and what they check is as in one plain ``pytest``; so is everything where the words choose by
markers or name a file for results.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest
from filelock import FileLock

BESIDE = "(jobs or not distributed) and not alone"
RANKS = "alone or (distributed and not jobs)"
NICENESS = 5
LOCK = "GALVATRON_TESTS_BESIDE"
"""Environment variable for conftest.py: a file that is locked while there are tests beside."""
OWN_WORDS = ("-m", "--junit", "--collect")
"""Beginnings of words with which two sessions would be in each other's way."""


def start(part: str, words: list[str], beside: Path, output: IO[bytes] | None = None) -> subprocess.Popen:
    """Starts pytest on a part of the tests; one whose output is kept runs at a lower priority."""
    command = [sys.executable, "-m", "pytest", "-m", part, *words]
    if output is not None:
        command = ["nice", "-n", str(NICENESS), *command]
    return subprocess.Popen(command, env=os.environ | {LOCK: str(beside)}, stdout=output)


def main(words: list[str]) -> int:
    """Runs both parts.

    Args:
        words: for pytest.

    Returns:
        pytest's exit code: the first that tells of a failure, that for no tests where neither part has any.
    """
    if any(word.startswith(OWN_WORDS) for word in words):
        return subprocess.call([sys.executable, "-m", "pytest", *words])
    # So that what was started is ended as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        beside = Path(folder, "beside")
        running: list[subprocess.Popen] = []
        try:
            # Whoever must be alone waits for this lock.
            with FileLock(beside):
                running.append(start(BESIDE, words, beside, output))
                running.append(start(RANKS, words, beside))
                running[0].wait()
            running[1].wait()
        finally:
            for process in running:
                process.terminate()
                process.wait()
            output.seek(0)
            print(f"\ntests beside ({BESIDE}):")
            sys.stdout.flush()
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    codes = [process.returncode for process in running]
    return next((code for code in codes if code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED)), min(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
