"""The tests' own runner: nothing is left out, failures are told, and what must be alone is."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
SUITE = """
import time
from pathlib import Path
import pytest

@pytest.mark.alone
def test_alone():
    assert Path("beside").exists() and Path("ranks").exists()

def test_beside():
    time.sleep(1)
    Path("beside").touch()

@pytest.mark.distributed
def test_ranks():
    Path("ranks").touch()

@pytest.mark.distributed
@pytest.mark.jobs
def test_jobs():
    assert Path("beside").exists()
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TESTS / "run.py"), "-q", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_all_run_and_what_must_be_alone_waits_for_the_others(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").symlink_to(TESTS / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone\n    distributed\n    jobs\n")
    (tmp_path / "test_suite.py").write_text(SUITE)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("2 passed, 2 deselected") == 2
    (tmp_path / "test_wrong.py").write_text("def test_wrong(): assert False\n")
    done = run(tmp_path)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout
    assert run(tmp_path, "-k", "nothing").returncode == 5
