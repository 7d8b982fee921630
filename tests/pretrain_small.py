"""The training script of the tests: the one that ``make demo`` runs."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "launch" / "pretrain_small.py"), run_name="__main__")
