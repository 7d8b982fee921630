"""The engine equals an independent mixed-integer program on instances of 12 to 32 layers."""

import math
import random

import pytest
from milp import milp_plan
from random_costs import RandomCosts, tiny_model

from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.search.decision_tree import Space, setting_of
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.evaluation import evaluate
from galvatron_megatron.search.request import SearchRequest

_SLOW = (8, 30)
"""Seeds that the solver, not the search, takes half of the whole test's time for."""
SIZES = {seed: ((1, 1, 2, 3)[seed % 4], None) for seed in range(34) if seed not in _SLOW}
"""Pipeline degree and number of layers by seed; None: drawn."""
SIZES |= dict(enumerate(((2, 24), (2, 28), (2, 32), (3, 18), (3, 24), (4, 16), (4, 20), (4, 24)), 100))


def instance(seed: int):
    generator = random.Random(seed)
    pp, layers = SIZES[seed]
    if layers is None:
        layers = generator.randint(12, {1: 32, 2: 14, 3: 12}[pp])
    kinds = [generator.randint(0, 1 + seed % 2) for _ in range(3)]
    pattern = (
        [kinds[i * 3 // layers] for i in range(layers)] if seed % 3 else [kinds[i % 2] for i in range(layers)]
    )
    model = tiny_model(pattern)
    request = SearchRequest(
        model=model,
        world_size=2 * pp,
        devices_per_node=2 * pp,
        memory_bytes=generator.randint(25, 45) * layers // pp + 120,
        global_batch_size=2 * generator.choice([1, 2, 4]),
        constraints=Constraints(pp=pp, micro_batch_size=1, virtual_stages=1, zero=0),
        recompute_kinds=(Recompute.NONE, Recompute.FULL),
        allow_sequence_parallel=False,
        allow_ulysses=False,
        allow_cp=False,
    )
    costs = RandomCosts(
        model, seed, reshard=generator.choice([0.05, 0.3, 1.0]), sync=generator.choice([0.1, 1.0]), trade=True
    )
    return request, costs


@pytest.mark.parametrize("seed", SIZES)
def test_equals_mixed_integer_program(seed):
    request, costs = instance(seed)
    space = Space(request=request)
    answers = [
        milp_plan(request, costs, space, outer, setting_of(outer, 1, base))
        for outer in space.outers()
        for base in space.bases(outer)
        if base.sequence_parallel is SequenceParallel.NONE
    ]
    wanted, best = min(answers, key=lambda answer: answer[0])
    if math.isinf(wanted):
        with pytest.raises(SearchError):
            search(request, costs)
        return
    result = search(request, costs)
    # The solver holds its constraints to 1e-6 only: its plan may seem a little faster than any is.
    assert result.step_seconds == pytest.approx(wanted, rel=3e-7)
    assert max(result.memory_bytes) <= request.memory_bytes
    # Priced exactly, no plan of the solver's is faster.
    assert evaluate(best, costs).fits(request.memory_bytes)
    for plan in (plan for _, plan in answers if plan is not None):
        assert result.step_seconds <= evaluate(plan, costs).step_seconds * (1 + 1e-9)
