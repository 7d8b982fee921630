"""How long it takes to price one plan, and to simulate a large schedule.

Prints medians. Pricing is measured with the counts of every layer known (a search knows them after its first
plan) but the layers' prices not, by a new cost model per plan, and once more with the prices known.
"""

from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.estimate import estimate_plan, simulate_estimate
from galvatron_megatron.cost.records.values import gpt_layer, uniform_plan
from galvatron_megatron.describe.cluster import read_cluster
from galvatron_megatron.describe.model import Model
from galvatron_megatron.plan.strategy import SequenceParallel, Strategy

ROUNDS = 41
CLUSTER = Path(__file__).parents[1] / "configs" / "clusters" / "h100.yaml"


def seconds(work) -> float:
    times = []
    for _ in range(ROUNDS):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return median(times)


def main() -> None:
    layer = gpt_layer(12288, 96)
    model = Model(name="gpt-175b", hidden_size=12288, seq_length=2048, vocab_size=50257, layers=(layer,) * 96)
    cluster = read_cluster(CLUSTER, nodes=128)
    strategy = Strategy(tp=8, dp=8, zero=1, sequence_parallel=SequenceParallel.MEGATRON)
    plan = uniform_plan(model, strategy, pp=16, micro_batch_size=1, micro_batches=96)
    estimate_plan(plan, AnalyticCostModel(model, cluster))
    new = seconds(lambda: estimate_plan(plan, AnalyticCostModel(model, cluster)))
    costs = AnalyticCostModel(model, cluster)
    estimate_plan(plan, costs)
    known = seconds(lambda: estimate_plan(plan, costs))
    print(f"one plan of 1,024 devices, 16 pipeline ranks, layer prices new   {new * 1e3:8.3f} ms")
    print(f"one plan of 1,024 devices, 16 pipeline ranks, layer prices known {known * 1e3:8.3f} ms")
    deep = uniform_plan(
        replace(model, layers=(layer,) * 128),
        Strategy(tp=8, dp=2, sequence_parallel=SequenceParallel.MEGATRON),
        pp=64,
        micro_batch_size=1,
        micro_batches=512,
    )
    estimate = estimate_plan(deep, AnalyticCostModel(replace(model, layers=(layer,) * 128), cluster))
    times = []
    for _ in range(5):
        start = perf_counter()
        simulation = simulate_estimate(estimate, deep.micro_batches)
        times.append(perf_counter() - start)
    rate = len(simulation.events) / median(times)
    print(
        f"1,024 devices, 64 pipeline ranks, 512 micro-batches simulated in {median(times):.3f} s "
        f"({len(simulation.events):,} events, {rate / 1e6:.2f} million a second)"
    )


if __name__ == "__main__":
    main()
