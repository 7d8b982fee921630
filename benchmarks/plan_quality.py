"""Prediction against reality: every uniform plan of a small GPT on CPU ranks, in Megatron's own training loop.

Profiles the ranks of this machine, predicts the step time of every uniform plan, trains each for some
iterations (in shuffled order, round by round, so that a disturbance does not fall on one plan alone), and
prints both, the mean absolute error, and how far the chosen plan is from the best one measured. Every rank has
one core. With ``--link`` the machine plays two nodes joined by a link of that rate. What has been measured is
kept in ``--directory``; started again, the program goes on from there.

    .venv/bin/python benchmarks/plan_quality.py --rounds 2 --zero 2 3
    .venv/bin/python benchmarks/plan_quality.py --directory KEPT --link 200mbit --link 1gbit --link 10gbit
"""

import argparse
import fcntl
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from _small_gpt import add_arguments, size_words
from rich.console import Console
from rich.table import Table

from galvatron_megatron.cost.estimate import estimate_plan
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.megatron_args import model_from_arguments, parse_command_line
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.describe.profile_cluster import cluster_from_ranks
from galvatron_megatron.describe.profile_store import list_profiles
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.serialization import write_plan
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy
from galvatron_megatron.profiler.needs import divisors, tensor_degrees

ROOT = Path(__file__).resolve().parent.parent


def model_words(options: argparse.Namespace) -> list[str]:
    """Megatron's arguments that describe the model."""
    words = "--hidden-dropout 0 --attention-dropout 0 --lr 1e-4 --mock-data"
    return [*size_words(options, options.batch), *words.split()]


def uniform_plans(model: Model, options: argparse.Namespace) -> Iterator[Plan]:
    """tp, dp and pp in all combinations; recomputation and ZeRO at one micro-batch size each."""
    middle = options.sizes[len(options.sizes) // 2]
    for tp in tensor_degrees(model, options.ranks):
        for pp in divisors(options.ranks // tp):
            dp = options.ranks // tp // pp
            if len(model.layers) % pp:
                continue
            for size in options.sizes:
                if options.batch % (dp * size):
                    continue
                for zero in (0, 1, *options.zero) if dp > 1 and size == middle else (0,):
                    for recompute in (Recompute.NONE, Recompute.FULL) if size == middle else (Recompute.NONE,):
                        base = Strategy(tp=tp, dp=dp, zero=zero)
                        layer = LayerPlan(
                            kind=model.layers[0].kind, strategy=replace(base, recompute=recompute)
                        )
                        uniform = Plan(
                            pp=pp,
                            micro_batch_size=size,
                            micro_batches=options.batch // dp // size,
                            base=base,
                            stages=(StagePlan(layers=(layer,) * (len(model.layers) // pp)),) * pp,
                        )
                        yield uniform
                        if options.offload and zero and recompute is Recompute.NONE:
                            yield from offloaded_plans(uniform)


def offloaded_plans(plan: Plan) -> Iterator[Plan]:
    """A uniform plan with what its ZeRO stage allows in host memory."""
    for offload in (Offload.OPTIMIZER, Offload.PARAMETERS)[: 2 if plan.base.zero == 3 else 1]:
        layer = plan.layers[0]
        layer = replace(layer, strategy=replace(layer.strategy, offload=offload))
        layers = (layer,) * (len(plan.layers) // plan.pp)
        base = replace(plan.base, offload=offload)
        yield replace(plan, base=base, stages=(StagePlan(layers=layers),) * plan.pp)


def ulysses_plans(model: Model, options: argparse.Namespace) -> Iterator[Plan]:
    """All layers under Ulysses, over a base that splits the sequence too, or the batch."""
    middle = options.sizes[len(options.sizes) // 2]
    for tp in tensor_degrees(model, options.ranks)[1:]:
        dp = options.ranks // tp
        layer = Strategy(tp=tp, dp=dp, sequence_parallel=SequenceParallel.ULYSSES)
        split = replace(layer, sequence_parallel=SequenceParallel.MEGATRON)
        for base in (split, Strategy(dp=options.ranks)):
            for size in options.sizes:
                # Sizes of a layer's micro-batch; the base layout has a share of it.
                if size * dp % base.dp or options.batch % (size * dp):
                    continue
                for recompute in (Recompute.NONE, Recompute.FULL) if size == middle else (Recompute.NONE,):
                    planned = LayerPlan(kind=model.layers[0].kind, strategy=replace(layer, recompute=recompute))
                    yield Plan(
                        pp=1,
                        micro_batch_size=size * dp // base.dp,
                        micro_batches=options.batch // (size * dp),
                        base=base,
                        stages=(StagePlan(layers=(planned,) * len(model.layers)),),
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


def training_words(plan: Plan, options: argparse.Namespace, file: Path, report: Path) -> list[str]:
    """Command line of a training run under a plan, which it writes."""
    write_plan(plan, file)
    words = [*model_words(options), "--micro-batch-size", str(plan.micro_batch_size)]
    words += ["--train-iters", str(options.iterations), "--eval-iters", "0"]
    words += ["--eval-interval", "1000", "--log-interval", "1000"]
    return [
        *words,
        "--galvatron-plan",
        str(file),
        "--galvatron-device",
        "cpu",
        "--galvatron-report",
        str(report),
    ]


def run_jobs(jobs: list[dict], link: str | None, options: argparse.Namespace) -> None:
    """Runs jobs one after the other, as many as there is time for while the machine is held.

    Args:
        jobs: see benchmarks/_jobs_on_rank.py.
        link: rate of the link between two nodes that this machine plays, or None for one node.
        options: of the command line.

    Raises:
        SystemExit: a job failed.
    """
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        for job in jobs:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                job["port"] = probe.getsockname()[1]
        request = folder / "jobs.json"
        request.write_text(json.dumps({"folder": temporary, "seconds": options.hold_seconds, "jobs": jobs}))
        worker = [sys.executable, str(ROOT / "benchmarks" / "_jobs_on_rank.py"), str(request)]
        if options.lock:
            # Waits in the kernel's queue, as the flock command does.
            fcntl.flock(stack.enter_context(options.lock.open("a")), fcntl.LOCK_EX)
        log = stack.enter_context((folder / "log").open("w+"))
        places = [environment()]
        if link is None:
            everyone = {"WORLD_SIZE": str(options.ranks), "LOCAL_WORLD_SIZE": str(options.ranks)}
            everyone |= {"MASTER_ADDR": "127.0.0.1"}
            places = [
                environment() | everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                for rank in range(options.ranks)
            ]
        else:
            script = ROOT / "launch" / "two_nodes.sh"
            worker = ["bash", str(script), link, str(options.ranks // 2), *worker]
        started = [subprocess.Popen(worker, cwd=ROOT, env=env, stdout=log, stderr=log) for env in places]
        codes = [process.wait() for process in started]
        if any(codes):
            log.seek(0)
            raise SystemExit(f"plan_quality: a job failed\n{log.read()[-4000:]}")


def profile_request(store: Path, options: argparse.Namespace) -> dict:
    """What ``galvatron profile`` is asked for."""
    return {
        "megatron": model_words(options),
        "directory": str(store),
        "device": "cpu",
        "global_batch_size": options.batch,
        "micro_batch_sizes": options.sizes,
        "tps": None,
        "again": False,
        "offload": options.offload,
    }


def measure_link(
    link: str | None, plans: list[Plan], options: argparse.Namespace
) -> tuple[Profile, list[list[float]]]:
    """Profile and step times under one link speed, kept in the directory piece by piece.

    Returns:
        The profile, and the median step time of every round of every plan.
    """
    folder = options.directory / (link or "one-node")
    store = folder / "store"
    store.mkdir(parents=True, exist_ok=True)
    pieces: list[tuple[Path, dict]] = [(folder / "profiled", {"profile": profile_request(store, options)})]
    for turn in range(options.rounds):
        order = list(range(len(plans)))
        random.Random(turn).shuffle(order)
        for index in order:
            name = describe(plans[index]).replace(" ", "_").replace(",", "")
            report = folder / f"{turn}-{name}.json"
            words = training_words(plans[index], options, folder / f"{name}.yaml", report)
            pieces.append((report, {"words": words}))
    while missing := [(path, job) for path, job in pieces if not path.exists()]:
        print(f"{link or 'one node'}: {len(missing)} of {len(pieces)} measurements to make", flush=True)
        run_jobs([job for _, job in missing], link, options)
        if profiles := list_profiles(store):
            (folder / "profiled").touch()
        if len(missing) == len([path for path, _ in pieces if not path.exists()]):
            raise SystemExit(
                f"plan_quality: nothing was measured; valid: --hold-seconds above {options.hold_seconds}"
            )
    profiles = list_profiles(store)
    measured = [
        [
            json.loads(
                (folder / f"{turn}-{describe(plan).replace(' ', '_').replace(',', '')}.json").read_text()
            )["measured_step_seconds"]
            for turn in range(options.rounds)
        ]
        for plan in plans
    ]
    return profiles[0], measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    add_arguments(parser)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="micro-batch sizes")
    parser.add_argument(
        "--zero", type=int, nargs="+", choices=(2, 3), default=[], help="ZeRO stages to try beside 0 and 1"
    )
    parser.add_argument("--ulysses", action="store_true", help="also plans with all layers under Ulysses")
    parser.add_argument("--offload", action="store_true", help="also sharded plans with states in host memory")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--link",
        action="append",
        help="rate of a link between two nodes made of this machine (200mbit; needs root); repeatable",
    )
    parser.add_argument("--lock", type=Path, help="lock file to hold while something is measured")
    parser.add_argument(
        "--hold-seconds", type=float, default=110, help="start no measurement later than this under one lock"
    )
    parser.add_argument("--directory", type=Path, help="where measurements are kept, to go on from there")
    options = parser.parse_args()
    model = model_from_arguments(parse_command_line(model_words(options)))
    with tempfile.TemporaryDirectory() as temporary:
        options.directory = (options.directory or Path(temporary)).resolve()
        plans = list(uniform_plans(model, options))
        if options.ulysses:
            plans += ulysses_plans(model, options)
        for link in options.link or [None]:
            profile, measured = measure_link(link, plans, options)
            costs = MeasuredCostModel(
                model, cluster_from_ranks(profile), profile, RunOptions(implementation="local")
            )
            predicted = [estimate_plan(plan, costs).step_seconds for plan in plans]
            show(link, plans, predicted, [statistics.median(times) for times in measured])
    return 0


def describe(plan: Plan) -> str:
    """A plan in a few words."""
    layer, base = plan.layers[0].strategy, plan.base
    words = f"pp{plan.pp} {layer}, {plan.micro_batches} x {plan.micro_batch_size}"
    return words if (base.tp, base.dp) == (layer.tp, layer.dp) else f"{words} on dp{base.dp}"


def show(link: str | None, plans: list[Plan], predicted: list[float], measured: list[float]) -> None:
    """Prints the table, the error and the choice."""
    table = Table(header_style="bold", title=link and f"two nodes, {link}")
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
