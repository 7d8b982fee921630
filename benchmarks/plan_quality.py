"""Prediction against reality: every uniform plan of a small GPT on CPU ranks, in Megatron's own training loop.

Profiles the ranks of this machine, predicts the step time of every uniform plan, trains each for some
iterations (in shuffled order, round by round, so that a disturbance does not fall on one plan alone), and
prints both, the mean absolute error, and how far the chosen plan is from the best one measured.

    .venv/bin/python benchmarks/plan_quality.py --ranks 2 --rounds 2
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from galvatron_megatron.cost.estimate import estimate_plan
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.megatron_args import model_from_arguments, parse_command_line
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.profile_store import from_json
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.serialization import write_plan
from galvatron_megatron.plan.strategy import Recompute, Strategy
from galvatron_megatron.profiler.needs import divisors, tensor_degrees
from galvatron_megatron.profiler.topology import cluster_from_ranks

ROOT = Path(__file__).resolve().parent.parent


def model_words(options: argparse.Namespace) -> list[str]:
    """Megatron's arguments that describe the model."""
    sizes = {
        "--num-layers": options.layers,
        "--hidden-size": options.hidden,
        "--num-attention-heads": 4,
        "--seq-length": options.sequence,
        "--max-position-embeddings": options.sequence,
        "--vocab-size": 1000,
        "--tokenizer-type": "NullTokenizer",
        "--hidden-dropout": 0,
        "--attention-dropout": 0,
        "--lr": 1e-4,
        "--global-batch-size": options.batch,
    }
    return [str(word) for pair in sizes.items() for word in pair] + ["--mock-data"]


def uniform_plans(model: Model, options: argparse.Namespace) -> Iterator[Plan]:
    """tp, dp and pp in all combinations; recomputation and ZeRO-1 at one micro-batch size each."""
    middle = options.sizes[len(options.sizes) // 2]
    for tp in tensor_degrees(model, options.ranks):
        for pp in divisors(options.ranks // tp):
            dp = options.ranks // tp // pp
            if len(model.layers) % pp:
                continue
            for size in options.sizes:
                if options.batch % (dp * size):
                    continue
                for zero in (0, 1) if dp > 1 and size == middle else (0,):
                    for recompute in (Recompute.NONE, Recompute.FULL) if size == middle else (Recompute.NONE,):
                        base = Strategy(tp=tp, dp=dp, zero=zero)
                        layer = LayerPlan(
                            kind=model.layers[0].kind, strategy=replace(base, recompute=recompute)
                        )
                        yield Plan(
                            pp=pp,
                            micro_batch_size=size,
                            micro_batches=options.batch // dp // size,
                            base=base,
                            stages=(StagePlan(layers=(layer,) * (len(model.layers) // pp)),) * pp,
                        )


def environment() -> dict[str, str]:
    """One thread a rank, no GPU, little talk."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }


def under_lock(options: argparse.Namespace, command: list[str]) -> list[str]:
    """The command, holding a lock file where measurements on this machine are to be made one at a time."""
    return ["flock", str(options.lock), *command] if options.lock else command


def measured_seconds(plan: Plan, options: argparse.Namespace, folder: Path) -> float:
    """Median step time of a training run under the plan."""
    file, report = folder / "plan.yaml", folder / "report.json"
    write_plan(plan, file)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "launch/pretrain_small.py"]
    command += [*model_words(options), "--micro-batch-size", str(plan.micro_batch_size)]
    command += ["--train-iters", str(options.iterations), "--eval-iters", "0"]
    command += ["--eval-interval", "1000", "--log-interval", "1000"]
    command += ["--galvatron-plan", str(file), "--galvatron-device", "cpu", "--galvatron-report", str(report)]
    done = subprocess.run(
        under_lock(options, command), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )
    if not report.exists():
        raise SystemExit(f"plan_quality: training failed\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return json.loads(report.read_text())["measured_step_seconds"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="micro-batch sizes")
    parser.add_argument("--iterations", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lock", type=Path, help="lock file to hold while something is measured")
    parser.add_argument("--directory", type=Path, help="profile store to use and keep")
    options = parser.parse_args()
    words = model_words(options)
    model = model_from_arguments(parse_command_line(words))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = options.directory or folder
        command = [sys.executable, "-m", "galvatron_megatron", "profile", "--ranks", str(options.ranks)]
        command += ["--directory", str(store), "--device", "cpu", "--json"]
        for size in options.sizes:
            command += ["--micro-batch-size", str(size)]
        done = subprocess.run(
            under_lock(options, [*command, "--", *words]),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        profile = from_json(done.stdout, "galvatron profile")
        costs = MeasuredCostModel(
            model, cluster_from_ranks(profile), profile, RunOptions(implementation="local")
        )
        plans = list(uniform_plans(model, options))
        predicted = [estimate_plan(plan, costs).step_seconds for plan in plans]
        measured: list[list[float]] = [[] for _ in plans]
        for turn in range(options.rounds):
            order = list(range(len(plans)))
            random.Random(turn).shuffle(order)
            for index in order:
                measured[index].append(measured_seconds(plans[index], options, folder))
                print(
                    f"round {turn + 1}: {describe(plans[index])}: {measured[index][-1] * 1e3:.1f} ms, "
                    f"predicted {predicted[index] * 1e3:.1f} ms",
                    flush=True,
                )
    show(plans, predicted, [statistics.median(times) for times in measured])
    return 0


def describe(plan: Plan) -> str:
    """A plan in a few words."""
    return f"pp{plan.pp} {plan.layers[0].strategy}, {plan.micro_batches} x {plan.micro_batch_size}"


def show(plans: list[Plan], predicted: list[float], measured: list[float]) -> None:
    """Prints the table, the error and the choice."""
    table = Table(header_style="bold")
    for name in ("plan", "predicted ms", "measured ms", "predicted / measured"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for _, index in sorted(zip(measured, range(len(plans)), strict=True)):
        row = (predicted[index] * 1e3, measured[index] * 1e3)
        table.add_row(describe(plans[index]), *(f"{v:.1f}" for v in row), f"{row[0] / row[1]:.2f}")
    Console(width=110).print(table)
    errors = [abs(p - m) / m for p, m in zip(predicted, measured, strict=True)]
    chosen = min(range(len(plans)), key=predicted.__getitem__)
    print(f"mean absolute error {statistics.mean(errors):.1%}, median {statistics.median(errors):.1%}")
    print(
        f"chosen by prediction: {describe(plans[chosen])}, "
        f"{measured[chosen] / min(measured) - 1:.1%} slower than the best measured"
    )


if __name__ == "__main__":
    sys.exit(main())
