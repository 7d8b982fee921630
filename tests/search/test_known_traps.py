"""Mistakes that other planners were found to make, each held against this one."""

from collections import Counter
from dataclasses import replace

import pytest
from random_costs import RandomCosts, tiny_model

from galvatron_megatron.cost.protocol import LayerCost
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.strategy import Recompute
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.evaluation import evaluate
from galvatron_megatron.search.request import SearchRequest


class ListedCosts:
    """Seconds and synchronisation per layer index kind, alike under every strategy unless told otherwise."""

    def __init__(self, seconds, sync=0.0, reshard: float = 0.0) -> None:
        self.seconds, self.sync, self.reshard = seconds, sync, reshard

    def layer_cost(self, layer, strategy, setting):
        seconds = self.seconds(layer, strategy) if callable(self.seconds) else self.seconds[layer]
        sync = self.sync(layer) if callable(self.sync) else self.sync
        return _cost(seconds * setting.micro_batch_samples, sync)

    def embedding_cost(self, setting):
        return _cost(0.0, 0.0)

    head_cost = embedding_cost

    def reshard_seconds(self, layer, before, after, setting):
        return 0.0 if before.layout == after.layout else self.reshard * setting.micro_batch_samples

    def send_seconds(self, setting):
        return 0.0

    def overhead_bytes(self, setting, position):
        return 0


def _cost(seconds: float, sync: float) -> LayerCost:
    return LayerCost(
        micro_batch_seconds=seconds, sync_seconds=sync, state_bytes=1, activation_bytes=1, transient_bytes=0
    )


def request_for(kinds: list[int], **changes) -> SearchRequest:
    values = {
        "model": tiny_model(kinds),
        "world_size": 4,
        "devices_per_node": 4,
        "memory_bytes": 10**6,
        "global_batch_size": 8,
        "max_zero": 0,
        "recompute_kinds": (Recompute.NONE,),
        "allow_cp": False,
        "allow_ulysses": False,
        "allow_interleaving": False,
        **changes,
    }
    return SearchRequest(**values)


def test_the_slowest_stage_is_charged_for_every_micro_batch_wherever_it_is():
    # Charging only the first or last stage makes plans with a slow middle look up to 7 % faster than they run.
    kinds = [0, 1, 2, 3]
    request = request_for(
        kinds, constraints=Constraints(pp=4, micro_batch_size=1), model=tiny_model(kinds), layerwise=False
    )
    result = search(request, ListedCosts([1.0, 5.0, 1.0, 1.0]))
    assert result.stage_seconds == pytest.approx([1.0, 5.0, 1.0, 1.0])
    assert result.step_seconds == pytest.approx(8.0 + 7 * 5.0)


def test_the_synchronisation_of_a_middle_stage_is_not_free():
    kinds = [0, 1, 2, 3]
    request = request_for(kinds, constraints=Constraints(pp=4, micro_batch_size=1), layerwise=False)
    result = search(request, ListedCosts([1.0] * 4, sync=lambda layer: 3.0 if layer == 2 else 0.5))
    assert result.step_seconds == pytest.approx(4.0 + 7 * 1.0 + 3.0)


def test_uneven_stages_balance_unequal_layers():
    # Equal stages of two layers would take 6.0 and 2.0.
    request = request_for([0, 1, 2, 2], constraints=Constraints(pp=2, micro_batch_size=1))
    result = search(request, ListedCosts([5.0, 1.0, 1.0, 1.0]))
    assert [len(stage.layers) for stage in result.plan.stages] == [1, 3]
    assert max(result.stage_seconds) == pytest.approx(5.0 * result.plan.base.dp)


def prefers(layer: int, strategy) -> float:
    """Even layers are fast under tp 4, odd ones under dp 4."""
    return 1.0 if strategy.tp == (4 if layer % 2 == 0 else 1) else 3.0


def test_layouts_change_inside_a_stage_where_that_pays_and_only_there():
    # Resharding priced a hundred times too dear leaves one degree to a stage, whatever its layers want.
    kinds = [0, 1, 0, 1]
    request = request_for(
        kinds,
        constraints=Constraints(pp=1),
        allow_sequence_parallel=False,
    )
    cheap = search(request, ListedCosts(prefers, reshard=0.1))
    assert [layer.strategy.tp for layer in cheap.plan.layers] == [4, 1, 4, 1]
    # Three changes between the layers, and one between the base layout and whichever end differs from it.
    assert cheap.step_seconds == pytest.approx(8 * (4 * 1.0 + 4 * 0.1))
    dear = search(request, ListedCosts(prefers, reshard=10.0))
    assert len(dear.plan.strategies) == 1
    assert dear.step_seconds == pytest.approx(8 * (2 * 1.0 + 2 * 3.0))


@pytest.mark.parametrize("seed", range(8))
def test_what_is_reported_is_what_was_optimised(seed):
    # Ranking by one formula and choosing by another ends off the optimum of both.
    request = request_for([0, 1, 0, 1, 1], max_zero=1, allow_interleaving=True, memory_bytes=400)
    costs = RandomCosts(request.model, seed)
    result = search(request, costs)
    answers = [
        (result.plan, result.step_seconds),
        result.best_uniform,
        result.best_layerwise,
        *result.runners_up,
    ]
    for plan, seconds in filter(None, answers):
        assert evaluate(plan, costs).step_seconds == pytest.approx(seconds, rel=1e-12)
        assert evaluate(plan, costs).fits(request.memory_bytes)
    assert result.memory_bytes == list(evaluate(result.plan, costs).stage_bytes)


class CountedCosts:
    """Counts how often every price is asked for."""

    def __init__(self, costs) -> None:
        self._costs, self.asked = costs, Counter()

    def __getattr__(self, name):
        return getattr(self._costs, name)

    def layer_cost(self, layer, strategy, setting):
        kind = self._costs.model.layers[layer]
        self.asked[kind, strategy, setting.pp, setting.micro_batches, setting.micro_batch_samples] += 1
        return self._costs.layer_cost(layer, strategy, setting)


def test_no_layer_is_priced_again_for_every_embedding_strategy():
    # Repeating the work for every strategy of the embedding costs its number of times over.
    request = request_for([0, 1] * 4, memory_bytes=400)
    costs = CountedCosts(RandomCosts(request.model, 3))
    result = search(request, costs)
    # Beside the search itself, the plans that are reported are priced once more, layer by layer.
    reported = len({result.plan, *(plan for plan, _ in result.runners_up)}) + 2
    assert result.outer_points > reported
    assert costs.asked.total() <= len(costs.asked) + reported * len(request.model.layers)


def test_resharding_has_the_unit_of_the_other_prices():
    # A move that costs as much as a layer must count as much as a layer: scale both, and nothing changes.
    request = request_for([0, 1, 0, 1], constraints=Constraints(pp=1), allow_sequence_parallel=False)
    one = search(request, ListedCosts(prefers, reshard=0.1))
    thousand = search(request, ListedCosts(lambda *key: 1000 * prefers(*key), reshard=100.0))
    assert thousand.plan == one.plan
    assert thousand.step_seconds == pytest.approx(1000 * one.step_seconds)


def test_the_gain_over_the_best_uniform_plan_is_reported_honestly():
    request = request_for([0, 1, 0, 1], constraints=Constraints(pp=1), allow_sequence_parallel=False)
    costs = ListedCosts(prefers, reshard=0.1)
    free = search(request, costs)
    alone = search(replace(request, layerwise=False), costs)
    assert free.best_uniform[1] == pytest.approx(alone.step_seconds, rel=1e-12)
