"""The competitors beside the winner, against exhaustive enumeration."""

from dataclasses import replace

import numpy as np
import pytest
from brute_force import best_in_setting
from random_costs import RandomCosts, tiny_model

from galvatron_megatron.search.decision_tree import Space
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.request import SearchRequest


def problem(seed: int) -> tuple[SearchRequest, RandomCosts]:
    model = tiny_model([0, 0, 1, 0] if seed % 2 else [0, 0, 0])
    request = SearchRequest(
        model=model,
        world_size=4,
        devices_per_node=4,
        memory_bytes=10**9,
        global_batch_size=8,
        allow_ulysses=False,
        min_tokens_per_rank=1,
    )
    return request, RandomCosts(model, seed)


def families(request: SearchRequest, costs: RandomCosts) -> dict[tuple, float]:
    """Seconds of the best uniform plan of every combination of outer decisions."""
    space, found = Space(request=request), {}
    for outer in space.outers():
        for virtual in space.virtual_stages(outer):
            for base in space.bases(outer):
                value = best_in_setting(request, costs, space, outer, virtual, base, uniform=True)
                key = (outer.pp, virtual, outer.micro_batches, base.layout)
                found[key] = min(found.get(key, np.inf), value)
    return {key: value for key, value in found.items() if np.isfinite(value)}


@pytest.mark.parametrize("seed", range(6))
def test_uniform_competitors_are_the_best_of_other_outer_decisions(seed):
    request, costs = problem(seed)
    result = search(replace(request, layerwise=False), costs)
    expected = sorted(families(request, costs).values())
    assert len(expected) > 6
    seconds = [result.step_seconds] + [seconds for _, seconds in result.runners_up]
    assert seconds == pytest.approx(expected[:6], rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_layerwise_competitors_are_no_slower_than_uniform_ones(seed):
    request, costs = problem(seed)
    result = search(request, costs)
    uniform = families(request, costs)
    assert len(result.runners_up) == 5
    assert [seconds for _, seconds in result.runners_up] == sorted(s for _, s in result.runners_up)
    shown = {
        (plan.pp, plan.virtual_stages, plan.micro_batches, plan.base.layout): seconds
        for plan, seconds in [(result.plan, result.step_seconds), *result.runners_up]
    }
    assert len(shown) == 6
    for key, seconds in shown.items():
        assert seconds <= uniform.get(key, np.inf) * (1 + 1e-9)
    missing = [seconds for key, seconds in uniform.items() if key not in shown]
    assert min(missing, default=np.inf) >= result.runners_up[-1][1] * (1 - 1e-9)
