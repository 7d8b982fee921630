"""One rank of a series of short jobs: imports Megatron once and forks a process for each job.

Started by benchmarks/plan_quality.py, once per rank, with the usual variables of torchrun:

    python benchmarks/_jobs_on_rank.py JOBS.json

``JOBS.json`` holds ``folder`` (for what ranks tell each other), ``seconds`` (no job starts later than this) and
``jobs``, each with ``port`` and either ``profile`` (a request of ``galvatron profile``) or ``words`` (a command
line of launch/pretrain_small.py). Rank i keeps to core i: a job has one core per rank.
"""

import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "pretrain_small.py"
LONGEST_JOB_SECONDS = 120.0


def keep_to_one_core() -> None:
    """Pins this rank to one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})


def import_once() -> None:
    """Imports what every job needs, with the hook on Megatron's parser in place."""
    from galvatron_megatron.integration.start_up import arm

    arm()
    import megatron.core.models.gpt
    import megatron.training  # noqa: F401

    import galvatron_megatron.commands.profile_worker
    import galvatron_megatron.integration.job
    import galvatron_megatron.profiler.session
    import galvatron_megatron.runtime.attach  # noqa: F401


def run_job(job: dict) -> None:
    """Runs one job in this process."""
    os.environ["MASTER_PORT"] = str(job["port"])
    if "profile" in job:
        from galvatron_megatron.commands.profile_worker import run_rank

        run_rank(job["profile"])
        return
    sys.argv = [str(SCRIPT), *job["words"]]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def forked(job: dict) -> int:
    """Runs a job in a child process.

    Returns:
        The child's exit code; 124 where it was ended for taking too long.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run_job(job)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0) if isinstance(end.code, int | None) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + LONGEST_JOB_SECONDS
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return 124
        time.sleep(0.02)


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text())
    started = time.monotonic()
    folder, first = Path(request["folder"]), int(os.environ["RANK"]) == 0
    keep_to_one_core()
    import_once()
    for number, job in enumerate(request["jobs"]):
        sign = folder / f"job-{number}"
        if first:
            word = "go" if time.monotonic() - started < request["seconds"] else "stop"
            sign.with_suffix(".new").write_text(word)
            sign.with_suffix(".new").rename(sign)
        else:
            while not sign.exists():
                time.sleep(0.02)
        if sign.read_text() == "stop":
            return 0
        if code := forked(job):
            print(f"job {number} on rank {os.environ['RANK']} ended with exit code {code}", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
