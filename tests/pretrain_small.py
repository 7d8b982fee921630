"""The training script of the tests: the one that ``make demo`` runs, whose profiles take less time."""

import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
import short_points  # noqa: E402, F401

runpy.run_path(str(TESTS.parent / "launch" / "pretrain_small.py"), run_name="__main__")
