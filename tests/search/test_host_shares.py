"""The memory of nodes as a limit of the search: equal to exhaustive enumeration, on random instances."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from brute_force import best_step_seconds, fits_hosts
from random_costs import RandomCosts, tiny_model

from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.strategy import Offload, Recompute
from galvatron_megatron.search import host_shares
from galvatron_megatron.search.decision_tree import Space
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.host_shares import HostShares
from galvatron_megatron.search.request import SearchRequest

INSTANCES = 60


def instance(seed: int) -> tuple[SearchRequest, RandomCosts]:
    """A small question with little host memory, and prices; stages share nodes, or have some of their own."""
    draw = random.Random(seed)
    world = draw.choice([2, 3, 4, 4, 4])
    model = tiny_model([draw.randint(0, 1) for _ in range(draw.randint(1, 5))])
    request = SearchRequest(
        model=model,
        world_size=world,
        devices_per_node=draw.choice([nodes for nodes in (1, 2, 4, world) if world % nodes == 0]),
        memory_bytes=draw.randint(80, 500),
        global_batch_size=draw.choice([2, 4, 8]),
        constraints=Constraints(tp=draw.choice([1, 1, None]), zero=draw.choice([1, 3, 3, None])),
        recompute_kinds=(Recompute.NONE,),
        allow_ulysses=False,
        allow_cp=False,
        allow_sequence_parallel=False,
        offloads=draw.choice([(Offload.NONE, Offload.OPTIMIZER), tuple(Offload)]),
        host_bytes=draw.choice([draw.randint(0, 30), draw.randint(0, 100)]),
        runners_up=draw.choice([0, 3]),
    )
    costs = RandomCosts(
        model,
        seed,
        levels=draw.choice([0, 0, 2, 5]),
        reshard=draw.choice([0, 0.1, 0.5]),
        sync=draw.choice([0.0, 0.5, 5.0]),
    )
    return request, costs


def is_small(request: SearchRequest) -> bool:
    try:
        space = Space(request=request)
        outers = space.outers()
    except SearchError:
        return False
    most = max(len(space.strategies(request.model.layers[0], outer)) for outer in outers)
    return most ** len(request.model.layers) <= 5_000


def kept(plan, costs) -> list[int]:
    """Host bytes of a rank of each stage."""
    setting, index = Setting.of(plan), 0
    found = [0] * plan.pp
    for number, stage in enumerate(plan.stages):
        for layer in stage.layers:
            found[number % plan.pp] += costs.layer_cost(index, layer.strategy, setting).host_bytes
            index += 1
    found[0] += costs.embedding_cost(setting).host_bytes
    found[-1] += costs.head_cost(setting).host_bytes
    return found


def test_equals_exhaustive_enumeration():
    limited = 0
    for seed in range(INSTANCES):
        request, costs = instance(seed)
        if not is_small(request):
            continue
        wanted = best_step_seconds(request, costs)
        try:
            result = search(request, costs)
        except SearchError:
            assert math.isinf(wanted), seed
            continue
        assert result.step_seconds == pytest.approx(wanted, rel=1e-9), seed
        plans = [result.plan, *(plan for plan, _ in result.runners_up)]
        plans += [entry[0] for entry in (result.best_uniform,) if entry is not None]
        for plan in plans:
            assert fits_hosts(request, plan.base.ranks, kept(plan, costs)), seed
        limited += any(kept(result.plan, costs))
    assert limited > INSTANCES // 10


@pytest.mark.parametrize(
    ("stages", "ranks", "per_node", "nodes"),
    [
        (2, 2, 4, [[2, 2]]),
        (2, 4, 4, [[0, 4], [4, 0]]),
        (2, 8, 4, [[0, 4], [4, 0]]),
        (2, 6, 4, [[0, 4], [2, 2], [4, 0]]),
        (4, 1, 2, [[0, 0, 1, 1], [1, 1, 0, 0]]),
    ],
)
def test_ranks_of_stages_on_nodes(stages, ranks, per_node, nodes):
    shares = HostShares(ranks, per_node, 100, np.arange(stages))
    assert shares.ranks.tolist() == nodes
    assert shares.free.tolist() == [100 - sum(c * p for p, c in enumerate(row)) for row in nodes]


def test_what_one_stage_keeps_the_others_cannot():
    shares = HostShares(2, 4, 100, np.zeros(2))
    nothing, free = np.zeros(2), np.full(2, np.inf)
    assert shares.most(nothing, free).tolist() == [50, 50]
    assert shares.most(np.array([30.0, 0.0]), free).tolist() == [50, 20]
    assert (shares.most(np.array([30.0, 30.0]), free) < 30).any()


def test_a_search_that_is_cut_short_says_what_it_may_have_missed(monkeypatch):
    missed = 0
    for seed in range(INSTANCES):
        request, costs = instance(seed)
        if request.devices_per_node < request.world_size or not is_small(request):
            continue
        with monkeypatch.context() as patched:
            patched.setattr(host_shares, "MOST_BOXES", 1)
            try:
                found = search(request, costs)
            except SearchError:
                continue
        if found.gap:
            assert found.step_seconds * (1 - found.gap) <= search(request, costs).step_seconds * (1 + 1e-9), (
                seed
            )
            missed += 1
        assert fits_hosts(request, found.plan.base.ranks, kept(found.plan, costs)), seed
    assert missed


def test_without_time_the_best_plan_so_far_is_the_answer():
    late = 0
    for seed in range(INSTANCES // 2):
        request, costs = instance(seed)
        for asked in (request, replace(request, layerwise=False)):
            try:
                found = search(replace(asked, most_seconds=0.0), costs)
            except SearchError:
                continue
            best = search(asked, costs)
            assert found.step_seconds * (1 - found.gap) <= best.step_seconds * (1 + 1e-9), seed
            late += found.gap > 0
    assert late
