"""Host memory as a limit: how many layers offload, and that none do without need."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from profiles import FOUR_RANKS, small_model, small_profile

from galvatron_megatron.cost.host_memory import HostUse, node_host_bytes
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.cluster import Host
from galvatron_megatron.describe.profile import StepPoint
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Offload, Recompute, Strategy
from galvatron_megatron.search.branch import Branch
from galvatron_megatron.search.checked_costs import CheckedCosts
from galvatron_megatron.search.decision_tree import Space
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.evaluation import evaluate
from galvatron_megatron.search.host_memory import offloading_no_more, offloads, search_within_hosts
from galvatron_megatron.search.host_spread import fitting_plan
from galvatron_megatron.search.request import SearchRequest

LAYERS = 8
MODEL = small_model(LAYERS)
STEP = StepPoint(tensors=1, parameters=1_000_000, updated=1_000_000, zero=1, seconds=0.02)
PROFILE = replace(small_profile(MODEL), host_steps=(STEP,))
HOST = Host(gb_per_second=8.0, memory_gb_per_second=8.0, efficiency=1.0, memory_gib=16.0, source="measured")
COSTS = MeasuredCostModel(MODEL, replace(FOUR_RANKS, host=HOST), PROFILE, RunOptions(implementation="local"))
CHEAP = MeasuredCostModel(
    MODEL,
    COSTS.cluster,
    replace(PROFILE, host_steps=(replace(STEP, seconds=1e-9),)),
    RunOptions(implementation="local"),
)
"""Stepped on the host as fast as on the device: offloading costs the copies."""


def request(memory_bytes: int, **changes: object) -> SearchRequest:
    fields = {
        "model": MODEL,
        "world_size": 4,
        "devices_per_node": 4,
        "memory_bytes": memory_bytes,
        "global_batch_size": 8,
        "constraints": Constraints(tp=1, pp=1, micro_batch_size=2, recompute=Recompute.NONE, zero=1),
        "offloads": (Offload.NONE, Offload.OPTIMIZER),
        "allow_interleaving": False,
    }
    return SearchRequest(**(fields | changes))


def find(asked: SearchRequest):
    return search(asked, COSTS)


def needs(plan: Plan) -> int:
    return max(evaluate(plan, COSTS).stage_bytes)


def plan_with(count: int, ends: bool) -> Plan:
    """The only plan of the request's space that offloads so many layers, but for their order."""
    device, host = (Strategy(dp=4, zero=1, offload=kind) for kind in (Offload.NONE, Offload.OPTIMIZER))
    kind = MODEL.layers[0].kind
    layers = (LayerPlan(kind=kind, strategy=host),) * count
    layers += (LayerPlan(kind=kind, strategy=device),) * (LAYERS - count)
    base = host if ends else device
    return Plan(pp=1, micro_batch_size=2, micro_batches=1, base=base, stages=(StagePlan(layers=layers),))


ALL = [plan_with(count, ends) for count, ends in product(range(LAYERS + 1), (False, True))]
KEPT = {plan: node_host_bytes(plan, COSTS, 4) for plan in ALL}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("room", [0.25, 0.5, 0.75])
def test_the_fastest_plan_that_fits_device_and_host_is_found(share, room):
    """Against all plans of a small space."""
    least, most = (needs(plan_with(count, count > 0)) for count in (LAYERS, 0))
    memory, host = round(least + share * (most - 1 - least)), round(room * max(KEPT.values()))
    fitting = [plan for plan in ALL if needs(plan) <= memory and KEPT[plan] <= host]
    asked = request(memory)
    if not fitting:
        with pytest.raises(
            SearchError, match=r"would keep .* GiB on a node that has .*; valid: less offloaded"
        ):
            search_within_hosts(asked, COSTS, host, find)
        return
    best = min(evaluate(plan, COSTS).step_seconds for plan in fitting)
    result, note = search_within_hosts(asked, COSTS, host, find)
    assert evaluate(result.plan, COSTS).step_seconds == pytest.approx(best, rel=1e-9)
    assert KEPT.get(result.plan, node_host_bytes(result.plan, COSTS, 4)) <= host
    assert needs(result.plan) <= memory
    free, silent = search_within_hosts(asked, COSTS, None, find)
    assert silent is None and free.step_seconds <= result.step_seconds
    count = sum(layer.strategy.offload is not Offload.NONE for layer in result.plan.layers)
    if node_host_bytes(free.plan, COSTS, 4) > host:
        assert note.startswith("host memory: ") and f"; {count} of {LAYERS} layers are offloaded" in note
    else:
        assert note is None


def test_stages_of_a_pipeline_share_a_node():
    """Two stages with two ranks each keep theirs in one host; what offloads no more recomputes instead."""
    fixed = Constraints(tp=1, pp=2, micro_batch_size=2, zero=1)
    slow = replace(COSTS.cluster, host=replace(HOST, gb_per_second=2.0))
    costs = MeasuredCostModel(MODEL, slow, CHEAP.profile, COSTS.options)
    asked = request(1 << 40, constraints=fixed)
    plain = search(replace(asked, offloads=(Offload.NONE,)), costs)
    recomputed = replace(fixed, recompute=Recompute.FULL)
    least = search(replace(asked, offloads=(Offload.NONE,), constraints=recomputed), costs)
    asked = replace(asked, memory_bytes=(max(plain.memory_bytes) + max(least.memory_bytes)) // 2)

    def ask(asked: SearchRequest):
        return search(asked, costs)

    free, _ = search_within_hosts(asked, costs, None, ask)
    kept = node_host_bytes(free.plan, costs, 4)
    assert kept
    found, note = search_within_hosts(asked, costs, kept, ask)
    assert (found.plan, note) == (free.plan, None)
    found, note = search_within_hosts(asked, costs, kept - 1, ask)
    assert max(found.memory_bytes) <= asked.memory_bytes and found.step_seconds > free.step_seconds and note
    for plan in (found.plan, *(plan for plan, _ in found.runners_up)):
        assert node_host_bytes(plan, costs, 4) < kept


def test_states_stay_on_the_device_unless_it_gains_more_than_the_margin():
    fixed = Constraints(tp=1, pp=1, micro_batch_size=2, zero=1)
    least = evaluate(plan_with(LAYERS, True), CHEAP).stage_bytes[0]
    asked = request(round(least * 1.1), constraints=fixed)
    # In so little memory layers that stay on the device are computed again.
    plain = search(replace(asked, offloads=(Offload.NONE,)), CHEAP)
    free = search(asked, CHEAP)
    gain = 1 - plain.samples_per_second / free.samples_per_second
    assert offloads(free.plan) and 0.01 < gain < 0.49
    for margin, offloaded in ((gain - 0.01, True), (gain + 0.01, False)):
        asked = replace(asked, uniform_margin=margin)
        found, note = search_within_hosts(asked, CHEAP, None, lambda asked: search(asked, CHEAP))
        assert (offloads(found.plan), note) == (offloaded, None)
    # With memory to spare nothing is gained, however fast the host is.
    ample, _ = search_within_hosts(request(1 << 40), CHEAP, None, lambda asked: search(asked, CHEAP))
    assert not offloads(ample.plan)


def test_where_the_devices_have_the_whole_node_nothing_is_offloaded():
    found, note = search_within_hosts(request(1 << 40), COSTS, 0, find)
    assert not offloads(found.plan) and note.endswith("; nothing is offloaded")
    only = request(1 << 40, offloads=(Offload.NONE,))
    assert search_within_hosts(only, COSTS, 0, find)[1] is None


def test_stages_have_shares_of_their_own():
    """Against all plans of a small space: the first stage has more micro-batches alive, and keeps more."""
    pipeline = {"constraints": Constraints(tp=1, pp=2, micro_batch_size=1, recompute=Recompute.NONE, zero=1)}
    plans = [
        pipelined(cut, (first, second), ends)
        for cut in range(1, LAYERS)
        for first in range(cut + 1)
        for second in range(LAYERS - cut + 1)
        for ends in (False, True)
    ]
    kept = {plan: node_host_bytes(plan, COSTS, 4) for plan in plans}
    seconds = {plan: evaluate(plan, COSTS).step_seconds for plan in plans}
    shares = set()
    least, most = (needs(pipelined(LAYERS // 2, (count, count), count > 0)) for count in (LAYERS // 2, 0))
    for share in (0.1, 0.4, 0.7):
        asked = request(round(least + share * (most - 1 - least)), **pipeline)
        room = [plan for plan in plans if needs(plan) <= asked.memory_bytes]
        for host in (max(kept.values()) * part // 10 for part in (4, 6, 8)):
            fitting = [plan for plan in room if kept[plan] <= host]
            if not fitting:
                with pytest.raises(SearchError, match="nothing fits"):
                    search(replace(asked, host_bytes=host), COSTS)
                continue
            found = search(replace(asked, host_bytes=host), COSTS)
            assert seconds[found.plan] == min(map(seconds.get, fitting))
            assert found.gap == 0.0
            assert HostUse.of(found.plan, COSTS, COSTS.cluster).kept_bytes <= host
            stages = found.plan.stages
            shares.add(tuple(sum(x.strategy.offload is not Offload.NONE for x in s.layers) for s in stages))
    assert any(first != second for first, second in shares)


def pipelined(cut: int, counts: tuple[int, int], ends: bool) -> Plan:
    """Two stages with so many layers whose states are offloaded."""
    device, host = (Strategy(dp=2, zero=1, offload=kind) for kind in (Offload.NONE, Offload.OPTIMIZER))
    kind = MODEL.layers[0].kind
    stages = []
    for count, layers in zip(counts, (cut, LAYERS - cut), strict=True):
        chosen = [host] * count + [device] * (layers - count)
        stages.append(StagePlan(layers=tuple(LayerPlan(kind=kind, strategy=each) for each in chosen)))
    base = host if ends else device
    return Plan(pp=2, micro_batch_size=1, micro_batches=4, base=base, stages=tuple(stages))


def test_a_plan_that_fits_is_found_soon_and_searched_on_from():
    """Where the search under the limit finds nothing faster, the plan that it starts from is its answer."""
    least, most = (needs(plan_with(count, count > 0)) for count in (LAYERS, 0))
    asked = request((least + most) // 2)
    room = max(KEPT.values()) * 3 // 4
    plan = fitting_plan(asked, 0.75, lambda plan: node_host_bytes(plan, COSTS, 4) <= room, find)
    assert offloads(plan) and node_host_bytes(plan, COSTS, 4) <= room and needs(plan) <= asked.memory_bytes
    limited = replace(asked, host_bytes=room)
    best = search(limited, COSTS)
    assert evaluate(plan, COSTS).step_seconds >= evaluate(best.plan, COSTS).step_seconds
    again = search(replace(limited, known=(best.plan,)), COSTS)
    assert (again.plan, again.gap) == (best.plan, 0.0)
    late = search(replace(limited, known=(plan,), most_seconds=0.0), COSTS)
    assert late.plan == plan and 0 < late.gap < 1
    assert fitting_plan(asked, 0.5, lambda plan: False, find) is None
    restricted = search(offloading_no_more(replace(asked, memory_bytes=asked.memory_bytes * 2), plan), COSTS)
    pairs = zip(restricted.plan.layers, plan.layers, strict=True)
    assert all(new.strategy.offload in (Offload.NONE, old.strategy.offload) for new, old in pairs)
    everything = replace(asked, offloads=(Offload.OPTIMIZER,), memory_bytes=most)
    assert fitting_plan(everything, 0.5, lambda plan: True, find) is None


@pytest.mark.parametrize("host", [None, max(KEPT.values()) // 2])
def test_a_setting_is_left_when_time_is_over(host):
    """Not between settings alone: one may take longer than all the time there is."""
    memory = (needs(plan_with(LAYERS, True)) + needs(plan_with(0, False))) // 2
    asked = replace(request(memory, constraints=Constraints(tp=1, pp=1, micro_batch_size=2)), host_bytes=host)
    space, costs = Space(request=asked), CheckedCosts(COSTS)
    found = []
    for deadline in (0.0, np.inf):
        branches = [Branch(space, costs, outer) for outer in space.outers()]
        solved = [
            branch.solve(1, base, np.inf, deadline=deadline) for branch in branches for base in branch.bases
        ]
        found.append(sum(plan is not None for plan in solved))
    assert found[0] < found[1]


def test_host_memory_is_a_number_of_bytes():
    with pytest.raises(SearchError, match="search host_bytes: -1; valid: an integer >= 0, or None"):
        request(1, host_bytes=-1)
