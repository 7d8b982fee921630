"""Whole training jobs for tests: every rank a process of its own, as a launcher would start it."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ranks import free_port

SMALL = Path(__file__).parents[1] / "pretrain_small.py"
SIZES = shlex.split(
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 255 --log-interval 1 --eval-iters 0 --eval-interval 1000 --hidden-dropout 0 "
    "--attention-dropout 0 --num-workers 0 --galvatron-device cpu"
)
_ITERATION = re.compile(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)")


@dataclass(kw_only=True, frozen=True)
class Job:
    """What became of a job."""

    codes: list[int]
    """Exit code by rank; a launcher's where one was used."""
    outputs: list[str]
    """Standard output and error together, by rank."""

    @property
    def text(self) -> str:
        return "\n".join(self.outputs)

    @property
    def losses(self) -> dict[int, float]:
        """Loss by iteration, from Megatron's own log."""
        return {int(number): float(loss) for number, loss in _ITERATION.findall(self.text)}

    @property
    def errors(self) -> list[str]:
        """Lines with which the package ended the job."""
        lines = self.text.splitlines()
        return [
            line
            for line in lines
            if re.match(r"galvatron( rank \d+)?: ", line) and "device cpu sets" not in line
        ]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a rank."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_"))}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""} | extra


def run_ranks(world_size: int, words: list[str], *, timeout_seconds: float = 300.0, **extra: str) -> Job:
    """Starts the ranks of a job without a launcher: nobody ends a rank but the rank itself.

    Args:
        world_size: ranks.
        words: of every rank, behind the interpreter.
        timeout_seconds: a rank that runs longer is left behind: an error.
        extra: environment.
    """
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world_size),
                LOCAL_WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                **extra,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Job(codes=[process.returncode for process in processes], outputs=outputs)


def torchrun(world_size: int, words: list[str], *, timeout_seconds: float = 300.0) -> Job:
    """Starts a job with torchrun."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *words),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_seconds,
    )
    return Job(codes=[done.returncode], outputs=[done.stdout])


def deepspeed(words: list[str], *launcher_words: list[str], timeout_seconds: float = 300.0) -> Job:
    """Starts a job with the deepspeed launcher.

    Args:
        words: script and its arguments.
        launcher_words: the launcher's own, once per node that it is started on.
        timeout_seconds: for all of it.
    """
    port = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    launchers = [
        subprocess.Popen(
            [sys.executable, str(Path(sys.executable).with_name("deepspeed")), *own, *port, *words],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in launcher_words
    ]
    try:
        outputs = [launcher.communicate(timeout=timeout_seconds)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()
    return Job(codes=[launcher.returncode for launcher in launchers], outputs=outputs)


def hand_words(report: Path) -> list[str]:
    """Megatron's arguments for the plan of a job's report, as a user would type them."""
    from galvatron_megatron.plan.megatron_arguments import command_line
    from galvatron_megatron.plan.serialization import plan_from_dict

    return command_line(plan_from_dict(json.loads(report.read_text())["plan"]))
