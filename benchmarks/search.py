"""Time and memory of the search engine alone: python benchmarks/search.py [--size NAME] [--repeat N]

Every size runs in its own process on one core. The prices of the analytic cost model are recorded in a
table first,
in a search that is not timed; the timed searches read the table, so that the engine is measured and not
the cost model. "with prices" is the untimed search: engine and cost model together.
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


def measure(name: str, repeat: int) -> dict:
    """One size, in this process."""
    started = time.perf_counter()
    from galvatron_megatron.cost.table import Recorder
    from galvatron_megatron.search.engine import search

    imported = time.perf_counter() - started
    request, costs = request_of(SIZES[name])
    recorder = Recorder(costs, request.model)
    first = search(request, recorder)
    table = recorder.table()
    seconds, cpu, result = [], [], first
    for _ in range(repeat):
        begun = time.process_time()
        result = search(request, table)
        cpu.append(time.process_time() - begun)
        seconds.append(result.search_seconds)
    return {
        "import": imported,
        "seconds": statistics.median(seconds) if seconds else first.search_seconds,
        "cpu": statistics.median(cpu) if cpu else None,
        "with_prices": first.search_seconds,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "step": result.step_seconds,
        "uniform": result.best_uniform[1] if result.best_uniform else None,
        "outer": result.outer_points,
        "solved": result.solved_points,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append", help="only these")
    parser.add_argument("--repeat", type=int, default=3, help="timed searches (default: 3)")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps(measure(arguments.size[0], arguments.repeat)))
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
        command = [sys.executable, __file__, "--in-process", "--size", name, "--repeat", str(arguments.repeat)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
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
