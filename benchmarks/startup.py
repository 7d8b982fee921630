"""Time that --galvatron-auto adds to a job whose plan is kept, and that the start-up hook adds to Python.

Runs the same small job, alternately with arguments given by hand and with --galvatron-auto on a kept plan, and
compares the time from the start of the process to the end of Megatron's argument validation (a line that the
job prints then). Prints medians of wall times and their difference; the aim is under 1 s.

    python benchmarks/startup.py [--rounds 7] [--ranks 1]
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "pretrain_small.py"
JOB = shlex.split(
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--global-batch-size 8 --train-iters 2 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 255 --log-interval 1 --eval-iters 0 --eval-interval 1000 --hidden-dropout 0 "
    "--attention-dropout 0 --galvatron-device cpu"
)
VALIDATED = "arguments ----"
"""Part of the line that Megatron prints once its arguments are validated."""


def seconds_to_validation(words: list[str], ranks: int) -> float:
    """Wall time of a job from its start to validated arguments."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(SCRIPT), *JOB, *words]
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        found, lines = None, []
        for line in job.stdout:
            lines.append(line)
            if found is None and VALIDATED in line:
                found = time.perf_counter() - started
    if job.returncode or found is None:
        sys.exit("".join(lines[-30:]) + "startup: the job failed")
    return found


def python_start(words: list[str]) -> float:
    """Wall time of a Python that does nothing."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass", *words], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        auto = ["--galvatron-auto", "--galvatron-uniform", "--galvatron-profile-dir", directory]
        by_hand = ["--micro-batch-size", "4"]
        kept = [*auto, *by_hand]
        seconds_to_validation(kept, arguments.ranks)  # Measures, searches and keeps the plan.
        times: dict[str, list[float]] = {"by hand": [], "kept plan": []}
        for _ in range(arguments.rounds):
            times["by hand"].append(seconds_to_validation(by_hand, arguments.ranks))
            times["kept plan"].append(seconds_to_validation(kept, arguments.ranks))
    for name, values in times.items():
        print(
            f"{name}: median {statistics.median(values):.2f} s to validated arguments over {len(values)} runs"
        )
    added = [b - a for a, b in zip(times["by hand"], times["kept plan"], strict=True)]
    print(f"added by --galvatron-auto: median {statistics.median(added):.2f} s (aim: under 1 s)")
    starts = {"without": [], "with": []}
    for _ in range(20):
        starts["without"].append(python_start([]))
        starts["with"].append(python_start(["--galvatron-auto"]))
    plain, hooked = (statistics.median(starts[name]) for name in ("without", "with"))
    print(f"Python alone: {plain * 1e3:.1f} ms; with the flag: {(hooked - plain) * 1e3:+.1f} ms")


if __name__ == "__main__":
    main()
