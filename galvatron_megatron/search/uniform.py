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
from galvatron_megatron.search.positions import Positions
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


class _Capacity:
    """How many layers every pipeline rank can hold and finish in a time, each rank by itself and every layer as
    if it were the cheapest of its kinds.

    Args:
        point: the strategy.
        live: distinct rows of live micro-batches, [D, v].
        positions: of the ranks; without a base layout a relaxation.
    """

    def __init__(self, point: UniformPoint, live: np.ndarray, positions: Positions) -> None:
        outer, virtual = point.branch.outer, point.virtual_stages
        self.virtual, self.positions, self.layers = virtual, positions, len(point.branch.kinds)
        prices = np.array([point.branch.options[key].prices[:, index] for key, index in point.chosen.items()])
        self.seconds, _, state, activation, transient, _ = prices.min(0)
        if outer.pp == 1:
            self.seconds = (prices[:, 0] + prices[:, 1] / outer.micro_batches).min()
        spare = positions.budget - np.maximum(positions.transient, transient)
        has_budget = spare.min() >= 0
        held = virtual * state + live.sum(1)[positions.classes] * activation
        # The first and the last virtual stage may lack layers, which makes room for as many on their ranks.
        self.slack = np.zeros(outer.pp)
        if virtual > 1:
            self.slack[0] += MOST_SHORT
            self.slack[-1] += MOST_SHORT
            spare = spare + self.slack * (state + live.max(1)[positions.classes] * activation)
        if held.min() > 0:
            self.by_memory = np.clip(np.floor(spare / held + 1e-9), 0, self.layers)
        else:
            self.by_memory = np.full(outer.pp, float(self.layers))
        self.is_enough = has_budget and self.by_memory.sum() * virtual >= self.layers

    def room(self, slowest: float) -> float:
        """Layers for which there is room if no rank takes longer than ``slowest`` seconds."""
        by_time = np.floor(
            ((slowest - self.positions.seconds) / self.seconds + self.slack) / self.virtual + 1e-9
        )
        return float(np.clip(np.minimum(self.by_memory, by_time), 0, self.layers).sum()) * self.virtual

    def suffices(self, slowest: float) -> bool:
        """Whether all layers find room."""
        return self.is_enough and (
            self.seconds <= 0 or not np.isfinite(slowest) or self.room(slowest) >= self.layers
        )


def capacity_bound(point: UniformPoint, cutoff: float) -> float:
    """Bound of the step time from how many layers every rank can hold and finish in time; infinite if too few.

    Bisects the least time of the slowest rank at which the ranks together have room for all layers.
    """
    branch, virtual = point.branch, point.virtual_stages
    outer = branch.outer
    high = cutoff / outer.micro_batches
    # Most points fail already without embedding, head, sends and overheads, which then need no prices.
    if not _Capacity(point, *branch.positions(virtual, None)).suffices(high):
        return np.inf
    live, positions = branch.positions(virtual, point.base)
    capacity = _Capacity(point, live, positions)
    if not capacity.suffices(high):
        return np.inf
    total = _totals(branch, point.chosen)[0] + positions.seconds.sum()
    low = total / outer.pp
    if capacity.seconds > 0:
        if not np.isfinite(high):
            most = capacity.layers + capacity.slack.max() + virtual
            high = capacity.seconds * most + positions.seconds.max()
        for _ in range(24):
            if high - low <= 1e-6 * high:
                break
            middle = (low + high) / 2
            low, high = (middle, high) if capacity.room(middle) < capacity.layers else (low, middle)
    sync = positions.sync.max()
    return (outer.micro_batches - 1 / virtual) * low * (1 - 1e-9) + total / virtual + sync
