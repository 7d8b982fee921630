"""Wall and CPU seconds of ``galvatron profile`` on CPU ranks: the first call, and the one that finds all kept.

python benchmarks/profiling.py [--ranks 4] [--hidden 256] [--sequence 256]
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from _small_gpt import add_arguments, size_words


def timed(words: list[str]) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds of all its processes and the error output of one call."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"profile: {' '.join(words)} failed\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    add_arguments(parser)
    parser.add_argument("--batch", type=int, help="samples per step (default: 8 a rank)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        words = [sys.executable, "-m", "galvatron_megatron", "profile", "--device", "cpu", "--directory", store]
        words += ["--ranks", str(options.ranks), "--"]
        words += size_words(options, options.batch or 8 * options.ranks)
        wall, cpu, talk = timed(words)
        print(f"first call: {wall:.1f} s wall, {cpu:.1f} s CPU of {options.ranks} ranks")
        print(next(line for line in talk.splitlines() if line.startswith("profiled in")))
        again = [timed(words)[:2] for _ in range(5)]
        walls, cpus = zip(*again, strict=True)
        print(
            f"again: {statistics.median(walls):.2f} s wall, {statistics.median(cpus):.2f} s CPU (median of 5)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
