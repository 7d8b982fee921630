"""The engine equals exhaustive enumeration on random instances without any structure."""

import math

import pytest
from brute_force import best_step_seconds
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_costs import RandomCosts, tiny_model

from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.strategy import Recompute
from galvatron_megatron.search.decision_tree import Space
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.evaluation import evaluate
from galvatron_megatron.search.request import SearchRequest

CONFIGURATIONS = (
    {
        "max_zero": 0,
        "recompute_kinds": (Recompute.NONE, Recompute.FULL),
        "allow_ulysses": False,
        "allow_cp": False,
    },
    {"max_zero": 1, "recompute_kinds": (Recompute.NONE,), "allow_ulysses": True, "allow_cp": False},
    {"max_zero": 0, "recompute_kinds": (Recompute.NONE,), "allow_ulysses": False, "allow_cp": True},
    {
        "max_zero": 3,
        "recompute_kinds": (Recompute.NONE,),
        "allow_ulysses": False,
        "allow_sequence_parallel": False,
        "allow_cp": False,
    },
)


@st.composite
def instances(draw):
    kinds = draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
    world = draw(st.sampled_from([1, 2, 2, 3, 4, 4]))
    options = draw(st.sampled_from(CONFIGURATIONS))
    model = tiny_model(kinds)
    request = SearchRequest(
        model=model,
        world_size=world,
        devices_per_node=draw(st.sampled_from([d for d in (1, 2, 4) if world % d == 0] or [world])),
        memory_bytes=draw(st.integers(60, 600)),
        global_batch_size=draw(st.sampled_from([2, 4, 4, 6, 8])),
        **options,
    )
    costs = RandomCosts(
        model,
        draw(st.integers(0, 10**6)),
        levels=draw(st.sampled_from([0, 0, 2, 5])),
        reshard=draw(st.sampled_from([0.0, 0.1, 0.5, 2.0])),
        sync=draw(st.sampled_from([0.0, 0.5, 5.0])),
        trade=draw(st.booleans()),
    )
    return request, costs


def _too_large(request) -> bool:
    try:
        space = Space(request=request)
        outers = space.outers()
    except SearchError:
        return True
    most = max(len(space.strategies(request.model.layers[0], outer)) for outer in outers)
    return most ** len(request.model.layers) > 30_000


@settings(max_examples=320, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(instances())
def test_equals_exhaustive_enumeration(instance):
    request, costs = instance
    assume(not _too_large(request))
    wanted = best_step_seconds(request, costs)
    if math.isinf(wanted):
        with pytest.raises(SearchError):
            search(request, costs)
        return
    result = search(request, costs)
    assert result.step_seconds == pytest.approx(wanted, rel=1e-9)
    assert evaluate(result.plan, costs).step_seconds == pytest.approx(wanted, rel=1e-9)
    assert max(result.memory_bytes) <= request.memory_bytes
    uniform = best_step_seconds(request, costs, uniform=True)
    found = math.inf if result.best_uniform is None else result.best_uniform[1]
    assert found == pytest.approx(uniform, rel=1e-9)
    assert result.step_seconds <= uniform * (1 + 1e-12)
