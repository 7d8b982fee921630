"""Programs of a test that run in a process of their own, because they import torch and megatron."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def answer_of(program: str, *words: str) -> Any:
    """Runs a program that can import what tests import.

    Args:
        program: its text; the last line that it prints is JSON.
        words: its arguments.

    Returns:
        The value of that line.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
