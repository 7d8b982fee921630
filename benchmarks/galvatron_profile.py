"""Plans for LLaMA2-7B on Hetu-Galvatron's A100 tables by memory: python benchmarks/galvatron_profile.py [DIR]

Prints the table of docs/search.md as Markdown: sequence length 2048, 8 devices, global batch 64.
"""

import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from galvatron_megatron.cost.galvatron_table import GalvatronCostModel
from galvatron_megatron.describe.galvatron_tables import read_galvatron_profile
from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.errors import SearchError
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.request import SearchRequest

ROOT = Path(__file__).resolve().parent.parent
MEMORY_GB = (8, 12, 16, 20, 24, 36, 80)


def layers_of(plan) -> str:
    counts = Counter(layer.strategy for layer in plan.layers)
    return ", ".join(f"{count} x {strategy}" for strategy, count in counts.items())


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "data" / "galvatron_a100_8gpu"
    profile = read_galvatron_profile(directory, seq_length=2048, world_size=8)
    model = replace(read_model(ROOT / "configs" / "models" / "llama2-7b.yaml"), seq_length=2048)
    costs = GalvatronCostModel(model, profile)
    print(
        "| GB | samples/s | over uniform | fullest GB | pp, virtual, micro-batches | base | layers | search s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for gigabytes in MEMORY_GB:
        request = SearchRequest(
            model=model,
            world_size=8,
            devices_per_node=8,
            memory_bytes=gigabytes * 2**30,
            global_batch_size=64,
            allow_cp=False,
            allow_plain_tp=False,
        )
        started = time.perf_counter()
        try:
            result = search(request, costs)
        except SearchError as error:
            print(f"| {gigabytes} | - | - | - | {error} | | | {time.perf_counter() - started:.2f} |")
            continue
        plan = result.plan
        gain = "-" if result.best_uniform is None else f"{result.best_uniform[1] / result.step_seconds - 1:.2%}"
        print(
            f"| {gigabytes} | {result.samples_per_second:.2f} | {gain} | "
            f"{max(result.memory_bytes) / 2**30:.2f} | "
            f"{plan.pp}, {plan.virtual_stages}, {plan.micro_batches} x {plan.micro_batch_size} | {plan.base} | "
            f"{layers_of(plan)} | {result.search_seconds:.2f} |"
        )


if __name__ == "__main__":
    main()
