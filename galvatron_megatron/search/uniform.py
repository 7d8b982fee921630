"""The best uniform plan: every layer alike and in the base layout, which stock Megatron can run.

Stages may still be uneven (``--pipeline-model-parallel-layout``). It is the yardstick of the layer-wise
search and, since any uniform plan is also a layer-wise one, its first incumbent.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Recompute, Strategy
from galvatron_megatron.search.branch import Branch
from galvatron_megatron.search.spans import MOST_SHORT


@dataclass(kw_only=True, frozen=True, slots=True)
class UniformPoint:
    """One uniform strategy in one branch, with a bound of its step time."""

    bound: float
    branch: Branch
    virtual_stages: int
    base: Strategy
    chosen: dict
    """Index of the strategy of every kind of layer (and forced recomputation) in ``Branch.options``."""


def uniform_points(branch: Branch) -> Iterator[UniformPoint]:
    """Generates the uniform strategies of a branch."""
    outer = branch.outer
    index_of = {
        key: {strategy: index for index, strategy in enumerate(options.strategies)}
        for key, options in branch.options.items()
    }
    # Megatron has one pair of expert degrees; a layer without experts has none.
    with_experts = {key for key in index_of if branch.layers[key[0]].experts is not None}
    degrees = sorted(
        {(s.expert_parallel, s.expert_tensor_parallel or 0) for key in with_experts for s in index_of[key]}
    ) or [(1, 0)]
    for base in branch.bases:
        for recompute, (expert_parallel, expert_shards) in product(Recompute, degrees):
            chosen = {}
            for key, indices in index_of.items():
                kind = Recompute.NONE if key[1] is False else recompute
                wanted = Strategy(
                    tp=base.tp,
                    sequence_parallel=base.sequence_parallel,
                    cp=base.cp,
                    dp=base.dp,
                    zero=base.zero,
                    recompute=kind,
                    offload=base.offload,
                )
                if key in with_experts:
                    if base.ranks % (expert_parallel * (expert_shards or base.weight_shards)):
                        break
                    wanted = replace(
                        wanted,
                        expert_parallel=expert_parallel,
                        expert_tensor_parallel=expert_shards or None,
                    )
                if wanted not in indices:
                    break
                chosen[key] = indices[wanted]
            if len(chosen) < len(index_of):
                continue
            seconds, sync = _totals(branch, chosen)
            for virtual in branch.virtual_stages:
                bound = (
                    (outer.micro_batches - 1 / virtual) * seconds / outer.pp
                    + seconds / virtual
                    + sync / outer.pp
                )
                yield UniformPoint(bound=bound, branch=branch, virtual_stages=virtual, base=base, chosen=chosen)


def _totals(branch: Branch, chosen: dict) -> tuple[float, float]:
    flags = {flag for _, flag in chosen}
    per_kind = [
        np.min([branch.options[kind, flag].prices[:2, chosen[kind, flag]] for flag in flags], axis=0)
        for kind in range(len(branch.shares))
    ]
    total = branch.counts @ np.array(per_kind)
    return float(total[0]), float(total[1])


def solve_uniform(point: UniformPoint, cutoff: float) -> Plan | None:
    """Finds the best partition of a uniform strategy; None where none is below the cutoff."""
    options = {key: point.branch.options[key].take(np.array([index])) for key, index in point.chosen.items()}
    return point.branch.solve(point.virtual_stages, point.base, cutoff, options)


def capacity_bound(point: UniformPoint, cutoff: float) -> float:
    """Bound of the step time from how many layers every rank can hold and finish in time; infinite if too few.

    Bisects the least time of the slowest rank at which the ranks together have room for all layers, each
    rank by itself and every layer as if it were the cheapest of its kinds.
    """
    branch, virtual = point.branch, point.virtual_stages
    outer = branch.outer
    live, positions = branch.positions(virtual, point.base)
    prices = np.array([branch.options[key].prices[:, index] for key, index in point.chosen.items()])
    seconds, _, state, activation, transient = prices.min(0)
    if outer.pp == 1:
        seconds = (prices[:, 0] + prices[:, 1] / outer.micro_batches).min()
    spare = positions.budget - np.maximum(positions.transient, transient)
    if spare.min() < 0:
        return np.inf
    held = virtual * state + live.sum(1)[positions.classes] * activation
    # The first and the last virtual stage may lack layers, which makes room for as many on their ranks.
    slack = np.zeros(outer.pp)
    if virtual > 1:
        slack[0] += MOST_SHORT
        slack[-1] += MOST_SHORT
    spare = spare + slack * (state + live.max(1)[positions.classes] * activation)
    by_memory = np.floor(spare / held + 1e-9) if held.min() > 0 else np.full(outer.pp, np.inf)
    layers = len(branch.kinds)
    if (np.minimum(by_memory, layers) * virtual).sum() < layers:
        return np.inf
    total = _totals(branch, point.chosen)[0] + positions.seconds.sum()

    def room(slowest: float) -> float:
        by_time = np.floor(((slowest - positions.seconds) / seconds + slack) / virtual + 1e-9)
        return float((np.clip(np.minimum(by_memory, by_time), 0, layers) * virtual).sum())

    low = total / outer.pp
    high = cutoff / outer.micro_batches
    if seconds > 0:
        if not np.isfinite(high):
            high = seconds * (layers + slack.max() + virtual) + positions.seconds.max()
        elif room(high) < layers:
            return np.inf
        for _ in range(24):
            if high - low <= 1e-6 * high:
                break
            middle = (low + high) / 2
            low, high = (middle, high) if room(middle) < layers else (low, middle)
    sync = positions.sync.max()
    return (outer.micro_batches - 1 / virtual) * low * (1 - 1e-9) + total / virtual + sync
