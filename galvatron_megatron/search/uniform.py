"""The best uniform plan: every layer alike and in the base layout, which stock Megatron can run.

Stages may still be uneven (``--pipeline-model-parallel-layout``). It is the yardstick of the layer-wise search and,
since any uniform plan is also a layer-wise one, its first incumbent.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from galvatron_megatron.plan.strategy import Recompute, Strategy
from galvatron_megatron.search.branch import Branch


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
    for base in branch.bases:
        for recompute in Recompute:
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
    total = sum(per_kind[kind] for kind in branch.kinds)
    return float(total[0]), float(total[1])


def solve_uniform(point: UniformPoint, cutoff: float):
    """Finds the best partition of a uniform strategy; None where none is below the cutoff."""
    options = {key: point.branch.options[key].take(np.array([index])) for key, index in point.chosen.items()}
    return point.branch.solve(point.virtual_stages, point.base, cutoff, options)
