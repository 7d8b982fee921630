"""Monotonicity, determinism, batch ranges, interruption and the traps that other planners fell into."""

import math
import random
from dataclasses import replace

import pytest
from random_costs import RandomCosts, tiny_model

from galvatron_megatron.cost.protocol import LayerCost
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.evaluation import evaluate
from galvatron_megatron.search.explanation import explain
from galvatron_megatron.search.nearest import NothingFitsError
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.uniform import uniform_points


def problem(seed: int, **changes):
    generator = random.Random(seed)
    model = tiny_model([generator.randint(0, 1) for _ in range(generator.randint(3, 8))])
    values = {
        "model": model,
        "world_size": 4,
        "devices_per_node": 4,
        "memory_bytes": generator.randint(150, 500),
        "global_batch_size": 8,
        "max_zero": 1,
        "recompute_kinds": (Recompute.NONE, Recompute.FULL),
        "allow_cp": False,
        **changes,
    }
    return SearchRequest(**values), RandomCosts(model, seed, sync=0.5)


def seconds(request, costs) -> float:
    try:
        return search(request, costs).step_seconds
    except SearchError:
        return math.inf


@pytest.mark.parametrize("seed", range(6))
def test_more_memory_never_hurts_and_budgets_are_kept(seed):
    request, costs = problem(seed)
    last = math.inf
    for memory in (60, 90, 130, 190, 191, 260, 400, 800):
        case = replace(request, memory_bytes=memory)
        try:
            result = search(case, costs)
        except SearchError:
            assert math.isinf(last)
            continue
        assert max(result.memory_bytes) <= memory
        assert result.step_seconds <= last * (1 + 1e-12)
        assert result.best_uniform is None or result.step_seconds <= result.best_uniform[1] * (1 + 1e-12)
        last = result.step_seconds
    assert math.isfinite(last)


class _LargerUnits:
    """Another model's prices with every byte count multiplied."""

    def __init__(self, costs, factor: int) -> None:
        self._costs, self._factor = costs, factor

    def __getattr__(self, name):
        return getattr(self._costs, name)

    def _grown(self, cost):
        names = ("state_bytes", "activation_bytes", "transient_bytes")
        return replace(cost, **{name: getattr(cost, name) * self._factor for name in names})

    def layer_cost(self, *arguments):
        return self._grown(self._costs.layer_cost(*arguments))

    def embedding_cost(self, setting):
        return self._grown(self._costs.embedding_cost(setting))

    def head_cost(self, setting):
        return self._grown(self._costs.head_cost(setting))

    def overhead_bytes(self, *arguments):
        return self._costs.overhead_bytes(*arguments) * self._factor


@pytest.mark.parametrize("seed", range(4))
def test_work_does_not_depend_on_the_number_of_bytes(seed):
    request, costs = problem(seed, memory_bytes=300)
    small = search(request, costs)
    factor = 2**30
    large = search(replace(request, memory_bytes=300 * factor), _LargerUnits(costs, factor))
    assert large.plan == small.plan
    assert large.solved_points == small.solved_points


@pytest.mark.parametrize("seed", range(6))
def test_another_dimension_never_hurts(seed):
    request, costs = problem(seed, allow_ulysses=False, max_zero=0, allow_interleaving=False, layerwise=False)
    last = seconds(request, costs)
    for change in (
        {"layerwise": True},
        {"max_zero": 1},
        {"allow_ulysses": True},
        {"allow_interleaving": True},
        {"allow_cp": True},
    ):
        request = replace(request, **change)
        now = seconds(request, costs)
        assert now <= last * (1 + 1e-12)
        last = now


class _Faster:
    """Another model's prices with all communication that it prices apart scaled."""

    def __init__(self, costs, factor: float) -> None:
        self._costs, self._factor = costs, factor

    def __getattr__(self, name):
        return getattr(self._costs, name)

    def layer_cost(self, layer, strategy, setting):
        cost = self._costs.layer_cost(layer, strategy, setting)
        return replace(cost, sync_seconds=cost.sync_seconds * self._factor)

    def reshard_seconds(self, *arguments):
        return self._costs.reshard_seconds(*arguments) * self._factor

    def send_seconds(self, setting):
        return self._costs.send_seconds(setting) * self._factor


@pytest.mark.parametrize("seed", range(6))
def test_more_bandwidth_never_hurts(seed):
    request, costs = problem(seed)
    slow, same, fast = (seconds(request, _Faster(costs, factor)) for factor in (2.0, 1.0, 0.5))
    assert fast <= same * (1 + 1e-12) <= slow * (1 + 1e-11)


def test_the_same_question_gets_the_same_answer():
    request, costs = problem(3)
    first, second = search(request, costs), search(request, costs)
    assert first.plan == second.plan and first.runners_up == second.runners_up


class _Flat(RandomCosts):
    """Every strategy costs the same: only simplicity can decide."""

    def _draw_layer(self, layer, strategy, pp, micro_batches, samples):
        return LayerCost(
            micro_batch_seconds=float(samples),
            sync_seconds=0.0,
            state_bytes=1,
            activation_bytes=1,
            transient_bytes=0,
        )


def test_ties_go_to_the_uniform_plan():
    request, _ = problem(1, memory_bytes=10**6)
    result = search(request, _Flat(request.model, 1, reshard=0.0))
    assert result.plan.is_uniform
    assert result.plan == result.best_uniform[0]


def test_margin_prefers_the_uniform_plan_and_reports_the_layerwise_one():
    request, costs = next(
        (r, c)
        for r, c in (problem(seed) for seed in range(40))
        if math.isfinite(seconds(replace(r, layerwise=False), c))
        and seconds(r, c) < seconds(replace(r, layerwise=False), c)
    )
    free = search(request, costs)
    careful = search(replace(request, uniform_margin=0.99), costs)
    assert not free.plan.is_uniform and careful.plan.is_uniform
    assert careful.best_layerwise[1] == pytest.approx(free.step_seconds)


def test_a_range_of_batches_takes_the_best_throughput():
    request, costs = problem(5)
    several = replace(request, global_batch_size=None, global_batch_sizes=(4, 6, 8, 12))
    best = max(
        search(replace(request, global_batch_size=size), costs).samples_per_second for size in (4, 6, 8, 12)
    )
    assert search(several, costs).samples_per_second == pytest.approx(best, rel=1e-9)


def test_batch_divisibility_is_exact():
    # 7 samples cannot be shared by 2 or 4 data-parallel ranks; a planner that rounds down finds "more"
    # throughput.
    request, costs = problem(2, global_batch_size=7, memory_bytes=10**6)
    plan = search(request, costs).plan
    assert plan.global_batch_size == 7
    with pytest.raises(SearchError, match="multiple of 2"):
        search(replace(request, constraints=Constraints(tp=2, pp=1)), costs)


def test_constraints_are_kept():
    request, costs = problem(4, memory_bytes=10**6)
    for fixed in (
        Constraints(tp=2, pp=2),
        Constraints(recompute=Recompute.FULL),
        Constraints(sequence_parallel=SequenceParallel.ULYSSES, pp=1),
        Constraints(pp=2, first_stage_layers=1),
        Constraints(pp=2, virtual_stages=1, stage_layers=(1, len(request.model.layers) - 1)),
        Constraints(pp=2, recompute=Recompute.FULL, recomputed_layers_per_stage=1, virtual_stages=1),
        Constraints(micro_batch_size=2),
    ):
        if fixed.sequence_parallel is SequenceParallel.ULYSSES:
            continue  # the base layout cannot be Ulysses
        fixed.check(search(replace(request, constraints=fixed), costs).plan)


def test_interruption_returns_the_best_so_far_with_its_gap():
    request, costs = problem(7, memory_bytes=10**6)
    calls = 0

    def stop(state):
        nonlocal calls
        calls += 1
        if state.best is not None and calls > 2:
            raise KeyboardInterrupt

    result = search(request, costs, progress=stop)
    exact = search(request, costs)
    assert 0 < result.gap < 1
    assert exact.step_seconds >= result.step_seconds * (1 - result.gap) * (1 - 1e-9)


def test_nothing_fits_names_the_nearest_plan():
    request, costs = problem(8, memory_bytes=1)
    with pytest.raises(NothingFitsError, match=r"nearest is pp .* lacks .* GB; to fit: at least") as caught:
        search(request, costs)
    needed = caught.value.needed_bytes
    assert max(evaluate(caught.value.nearest_plan, costs).stage_bytes) == needed
    search(replace(request, memory_bytes=needed), costs)


def test_explanation_measures_what_if():
    request, costs = problem(0, memory_bytes=140)
    request = next(
        case
        for memory in range(80, 400, 10)
        if math.isfinite(seconds(case := replace(request, memory_bytes=memory), costs))
    )
    result = search(request, costs)
    found = explain(request, costs, result, [("a link twice as fast", request, _Faster(costs, 0.5))])
    ample = seconds(replace(request, memory_bytes=request.memory_bytes * 4), costs)
    assert found.ample_memory_gain == pytest.approx(1 - ample / result.step_seconds, abs=1e-9)
    assert found.what_if[1].gain >= -1e-12
    assert found.fullest_stage == max(range(len(result.memory_bytes)), key=result.memory_bytes.__getitem__)


def test_uniform_points_exist_only_in_the_base_layout():
    from galvatron_megatron.search.branch import Branch
    from galvatron_megatron.search.decision_tree import Space

    request, costs = problem(1)
    space = Space(request=request)
    for outer in space.outers():
        branch = Branch(space, costs, outer)
        for point in uniform_points(branch):
            for key, index in point.chosen.items():
                assert branch.options[key].strategies[index].layout == point.base.layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bytes": 0}, "memory_bytes"),
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"world_size": 6, "devices_per_node": 4}, "world_size"),
        ({"max_zero": 4}, "max_zero"),
        ({"uniform_margin": 1.5}, "uniform_margin"),
    ],
)
def test_bad_requests_are_refused(change, message):
    request, _ = problem(0)
    with pytest.raises(SearchError, match=message):
        replace(request, **change)


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
def test_bad_prices_are_named_before_the_search(bad):
    request, _ = problem(0)

    class Broken(RandomCosts):
        def layer_cost(self, layer, strategy, setting):
            cost = super().layer_cost(layer, strategy, setting)
            return replace(cost, micro_batch_seconds=bad) if strategy.tp == 2 else cost

    with pytest.raises(SearchError, match=r"layer 0 under tp2.*micro_batch_seconds"):
        search(request, Broken(request.model, 0))


class _BrokenEnds(RandomCosts):
    """One price outside the layers is no number to plan with."""

    broken, bad = "", math.nan

    def _maybe(self, name, value):
        return self.bad if name == self.broken else value

    def embedding_cost(self, setting):
        cost = super().embedding_cost(setting)
        return replace(cost, sync_seconds=self._maybe("embedding", cost.sync_seconds))

    def head_cost(self, setting):
        cost = super().head_cost(setting)
        return replace(cost, state_bytes=self._maybe("head", cost.state_bytes))

    def reshard_seconds(self, *arguments):
        return self._maybe("resharding", super().reshard_seconds(*arguments))

    def send_seconds(self, setting):
        return self._maybe("send", super().send_seconds(setting))

    def overhead_bytes(self, *arguments):
        return self._maybe("overhead", super().overhead_bytes(*arguments))


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
@pytest.mark.parametrize("broken", ["embedding", "head", "resharding", "send", "overhead"])
def test_bad_prices_outside_the_layers_are_named(broken, bad):
    request, _ = problem(0)
    costs = _BrokenEnds(request.model, 0)
    costs.broken, costs.bad = broken, bad
    with pytest.raises(SearchError, match=rf"cost of .*{broken}.* is (nan|-1.0|inf)"):
        search(request, costs)
