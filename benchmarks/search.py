"""Time and memory of the search engine alone: python benchmarks/search.py [--size NAME] [--growth] [--repeat N]

Every size runs in its own process on one core. The prices of the analytic cost model are recorded in a
table first,
in a search that is not timed; the timed searches read the table, so that the engine is measured and not
the cost model. "with prices" is the untimed search: engine and cost model together.

With --growth two more tables: the time by the number of identical layers, and by the number of bytes, where all
bytes of a recorded table and the memory are multiplied by one factor, so that the same plan is asked for.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


@dataclass(kw_only=True, frozen=True)
class Size:
    """One problem."""

    model: str
    layers: int
    nodes: int
    batch: int
    memory_gb: float
    limit_seconds: float


SIZES = {
    "7B-8": Size(model="llama2-7b", layers=32, nodes=1, batch=64, memory_gb=76, limit_seconds=0.5),
    "70B-64": Size(model="llama2-70b", layers=80, nodes=8, batch=256, memory_gb=76, limit_seconds=2),
    "175B-1024": Size(model="gpt3-175b", layers=96, nodes=128, batch=1536, memory_gb=76, limit_seconds=5),
    "128-layers-16384": Size(
        model="gpt3-175b", layers=128, nodes=2048, batch=4096, memory_gb=76, limit_seconds=20
    ),
}


def request_of(size: Size, memory_gb: float | None = None, layers: int | None = None):
    from galvatron_megatron.cost.analytic import AnalyticCostModel
    from galvatron_megatron.describe.cluster import read_cluster
    from galvatron_megatron.describe.model_file import read_model
    from galvatron_megatron.search.request import SearchRequest

    model = read_model(ROOT / "configs" / "models" / f"{size.model}.yaml")
    model = replace(model, layers=model.layers[:1] * (layers or size.layers))
    cluster = read_cluster(ROOT / "configs" / "clusters" / "a100-80g.yaml", nodes=size.nodes)
    request = SearchRequest(
        model=model,
        world_size=cluster.world_size,
        devices_per_node=cluster.devices_per_node,
        memory_bytes=int((memory_gb or size.memory_gb) * 2**30),
        global_batch_size=size.batch,
    )
    return request, AnalyticCostModel(model, cluster)


LAYERS = (16, 32, 64, 128, 256)
MEMORY_GB = (20, 24, 36, 48, 64, 80)
FACTORS = (1, 100, 10_000)


def timed(request, costs, repeat: int) -> dict:
    """Median times of searches in this process."""
    from galvatron_megatron.search.engine import search

    seconds, cpu = [], []
    for _ in range(max(1, repeat)):
        begun = time.process_time()
        result = search(request, costs)
        cpu.append(time.process_time() - begun)
        seconds.append(result.search_seconds)
    return {
        "seconds": statistics.median(seconds),
        "cpu": statistics.median(cpu),
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "step": result.step_seconds,
        "outer": result.outer_points,
        "solved": result.solved_points,
    }


def recorded(request, costs):
    """Table of the prices that a search asks for."""
    from galvatron_megatron.cost.table import Recorder
    from galvatron_megatron.search.engine import search

    recorder = Recorder(costs, request.model)
    search(request, recorder)
    return recorder.table()


def with_layers(layers: int, repeat: int) -> dict:
    """LLaMA2-7B layers on 64 devices, which hold 256 of them."""
    request, costs = request_of(replace(SIZES["7B-8"], nodes=8), layers=layers)
    return timed(request, recorded(request, costs), repeat)


def with_bytes(memory_gb: float, factor: int, repeat: int) -> dict:
    """LLaMA2-7B on eight devices, every byte counted ``factor`` times."""
    request, costs = request_of(SIZES["7B-8"], memory_gb=memory_gb)
    table = recorded(request, costs)

    def scaled(cost):
        return replace(
            cost,
            state_bytes=cost.state_bytes * factor,
            activation_bytes=cost.activation_bytes * factor,
            transient_bytes=cost.transient_bytes * factor,
        )

    table = replace(
        table,
        layers={key: scaled(cost) for key, cost in table.layers.items()},
        ends={key: (scaled(first), scaled(last)) for key, (first, last) in table.ends.items()},
        overheads={key: tuple(n * factor for n in amounts) for key, amounts in table.overheads.items()},
    )
    return timed(replace(request, memory_bytes=request.memory_bytes * factor), table, repeat)


def growth(repeat: int) -> None:
    """Prints the tables of --growth; every row is measured in a process of its own."""
    for title, first, calls in (
        ("time by the number of identical layers, 64 devices", "layers", [(count,) for count in LAYERS]),
        (
            "time by the number of bytes, 32 layers, 8 devices",
            "GB x factor",
            [(memory, factor) for memory in MEMORY_GB for factor in FACTORS],
        ),
    ):
        table = Table(title=f"{title}, one core, median of {repeat}")
        for column in (first, "engine s", "CPU s", "peak MB", "outer points", "solved", "step s"):
            table.add_column(column, justify="right")
        for call in calls:
            found = in_own_process("--call", *map(str, call), "--repeat", str(repeat))
            table.add_row(
                " x ".join(map(str, call)),
                f"{found['seconds']:.3f}",
                f"{found['cpu']:.3f}",
                f"{found['rss_mb']:.0f}",
                str(found["outer"]),
                str(found["solved"]),
                f"{found['step']:.6f}",
            )
        Console(width=150).print(table)


def in_own_process(*words: str) -> dict:
    """What this program prints with these arguments."""
    command = [sys.executable, __file__, "--in-process", *words]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(name: str, repeat: int) -> dict:
    """One size, in this process."""
    started = time.perf_counter()
    from galvatron_megatron.cost.table import Recorder
    from galvatron_megatron.search.engine import search

    imported = time.perf_counter() - started
    request, costs = request_of(SIZES[name])
    recorder = Recorder(costs, request.model)
    first = search(request, recorder)
    return {
        **timed(request, recorder.table(), repeat),
        "import": imported,
        "with_prices": first.search_seconds,
        "uniform": first.best_uniform[1] if first.best_uniform else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append", help="only these")
    parser.add_argument("--repeat", type=int, default=3, help="timed searches (default: 3)")
    parser.add_argument("--growth", action="store_true", help="by layers and by bytes instead")
    parser.add_argument("--call", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        if arguments.call is None:
            found = measure(arguments.size[0], arguments.repeat)
        else:
            found = (with_layers if len(arguments.call) == 1 else with_bytes)(*arguments.call, arguments.repeat)
        print(json.dumps(found))
        return
    if arguments.growth:
        growth(arguments.repeat)
        return
    table = Table(title=f"search on one core, median of {arguments.repeat}")
    for column in (
        "problem",
        "engine s",
        "CPU s",
        "limit s",
        "with prices s",
        "import s",
        "peak MB",
        "outer points",
        "solved",
        "layer-wise step s",
        "uniform step s",
    ):
        table.add_column(column, justify="right")
    for name in arguments.size or SIZES:
        found = in_own_process("--size", name, "--repeat", str(arguments.repeat))
        table.add_row(
            name,
            f"{found['seconds']:.3f}",
            "-" if found["cpu"] is None else f"{found['cpu']:.3f}",
            f"{SIZES[name].limit_seconds:g}",
            f"{found['with_prices']:.2f}",
            f"{found['import']:.2f}",
            f"{found['rss_mb']:.0f}",
            str(found["outer"]),
            str(found["solved"]),
            f"{found['step']:.4f}",
            "-" if found["uniform"] is None else f"{found['uniform']:.4f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
