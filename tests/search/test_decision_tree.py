"""Every rule of the decision tree by itself."""

from dataclasses import replace

import pytest
from random_costs import tiny_model

from galvatron_megatron.describe.model import Attention, Experts, Layer, Mamba
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel
from galvatron_megatron.search.decision_tree import RULES, Space, divisors, tp_rule
from galvatron_megatron.search.request import SearchRequest


def request(**changes) -> SearchRequest:
    values = {
        "model": tiny_model([0] * 8),
        "world_size": 12,
        "devices_per_node": 6,
        "memory_bytes": 1000,
        "global_batch_size": 24,
        **changes,
    }
    return SearchRequest(**values)


def strategies(case: SearchRequest, pp: int = 1):
    space = Space(request=case)
    outer = next(outer for outer in space.outers() if outer.pp == pp)
    return space, space.strategies(case.model.layers[0], outer)


def test_degrees_are_divisors_not_powers_of_two():
    assert divisors(12) == (1, 2, 3, 4, 6, 12)
    space, found = strategies(request())
    assert {s.tp for s in found} == {1, 2, 3, 6}
    assert {outer.pp for outer in space.outers()} == {1, 2, 3, 4, 6}
    assert all(s.ranks == 12 for s in found)


def test_tp_stays_in_a_node_unless_asked():
    space, found = strategies(request())
    assert max(s.tp for s in found) == 6 and space.cuts["tp_node"] > 0
    assert max(s.tp for s in strategies(request(tp_across_nodes=True))[1]) == 12


def test_a_scan_is_not_split_by_context_parallelism():
    model = tiny_model([0] * 8)
    scan = Layer(kind=LayerKind.MAMBA, mamba=Mamba(heads=12, groups=12))
    case = request(model=replace(model, layers=(scan, *model.layers[1:])))
    space, found = strategies(case)
    outer = next(outer for outer in space.outers() if outer.pp == 1)
    assert {s.cp for s in found} == {base.cp for base in space.bases(outer)} == {1}
    assert space.cuts["cp_kind"] > 0
    assert max(s.cp for s in space.strategies(case.model.layers[1], outer)) > 1


def test_offloading_only_where_asked_and_only_of_what_zero_shards():
    space, found = strategies(request())
    assert {s.offload for s in found} == {Offload.NONE} and space.cuts["offload_allowed"] > 0
    asked, more = strategies(request(offloads=tuple(Offload)))
    assert {s for s in more if s.offload is Offload.NONE} == set(found) and len(set(more)) == len(more)
    assert {(s.zero, s.offload.value) for s in more if s.state_replicas > 1} == {
        *((zero, "none") for zero in range(4)),
        *((zero, "optimizer") for zero in (1, 2, 3)),
        (3, "parameters"),
    }
    assert asked.cuts["offload_zero"] > 0
    # One rank that holds all of its weights has nobody to shard with, but may offload.
    alone = request(offloads=tuple(Offload), world_size=6, constraints=Constraints(tp=6))
    assert {(s.zero, s.offload.value) for s in strategies(alone)[1] if s.state_replicas == 1} == {
        (0, "none"),
        (1, "optimizer"),
        (3, "parameters"),
    }
    bases = {base for outer in asked.outers() for base in asked.bases(outer)}
    assert {base.offload for base in bases} == set(Offload)
    with pytest.raises(SearchError, match=r"offloads: \(\)"):
        request(offloads=())


def test_micro_batches_and_samples_divide_exactly():
    space = Space(request=request(global_batch_size=10))
    for outer in space.outers():
        assert outer.samples * outer.micro_batches == 10
        for base in space.bases(outer):
            assert outer.samples % base.dp == 0
        for strategy in space.strategies(space.request.model.layers[0], outer):
            assert outer.samples % strategy.dp == 0
    assert space.cuts["batch"] > 0 and space.cuts["dp_samples"] > 0


def test_switches_limit_the_space():
    _, found = strategies(
        request(max_zero=0, allow_cp=False, allow_ulysses=False, recompute_kinds=(Recompute.NONE,))
    )
    assert {(s.zero, s.cp, s.recompute) for s in found} == {(0, 1, Recompute.NONE)}
    assert SequenceParallel.ULYSSES not in {s.sequence_parallel for s in found}


def test_ulysses_is_asked_for_with_the_degrees_of_the_space_where_layers_may_differ():
    # Of 1,024 tokens a rank keeps 256 at least; groups stay inside nodes of 6 ranks.
    model = tiny_model([0] * 8, seq_length=1024)
    case = request(model=model, world_size=24, global_batch_size=24)
    degrees = Space(request=case).ulysses_degrees()
    found = {
        strategy.tp
        for outer in Space(request=case).outers()
        for strategy in Space(request=case).strategies(model.layers[0], outer)
        if strategy.sequence_parallel is SequenceParallel.ULYSSES
    }
    assert degrees == tuple(sorted(found)) == (2,)
    assert Space(request=replace(case, devices_per_node=8)).ulysses_degrees() == (2, 4)
    for changes in (
        {"layerwise": False},
        {"allow_ulysses": False},
        {"constraints": Constraints(tp=1)},
        {"constraints": Constraints(sequence_parallel=SequenceParallel.MEGATRON)},
        {"min_tokens_per_rank": 1024},
    ):
        assert Space(request=replace(case, **changes)).ulysses_degrees() == ()


def test_zero_needs_replicas():
    space, found = strategies(request(world_size=6, allow_cp=False, allow_ulysses=False))
    assert {s.zero for s in found if s.tp == 6} == {0} and space.cuts["zero_replicas"] > 0


def test_selective_recomputation_is_useless_with_fused_attention():
    assert Recompute.SELECTIVE not in {s.recompute for s in strategies(request())[1]}
    unfused = request(model=tiny_model([0] * 8, fused_attention=False))
    assert Recompute.SELECTIVE in {s.recompute for s in strategies(unfused)[1]}


def test_interleaving_needs_groups_of_micro_batches_and_layers():
    space = Space(request=request())
    for outer in space.outers():
        for virtual in space.virtual_stages(outer):
            assert virtual == 1 or (
                outer.pp > 1 and outer.micro_batches % outer.pp == 0 and virtual * outer.pp <= 8
            )
    assert not any(
        v > 1
        for o in space.outers()
        for v in Space(request=request(allow_interleaving=False)).virtual_stages(o)
    )


def test_sequence_is_split_evenly_and_not_too_thin():
    _, found = strategies(request(model=tiny_model([0] * 8, seq_length=1024), min_tokens_per_rank=300))
    for strategy in found:
        parts = strategy.cp * (strategy.tp if strategy.sequence_parallel is not SequenceParallel.NONE else 1)
        assert parts == 1 or 1024 // parts >= 300


def test_tp_rules_know_heads_groups_and_experts():
    model = tiny_model([0])
    grouped = Layer(
        kind=LayerKind.MOE_BLOCK,
        attention=Attention(heads=12, query_groups=4, head_dim=4),
        experts=Experts(count=4, top_k=1, ffn_hidden_size=24),
    )
    megatron, ulysses, none = SequenceParallel.MEGATRON, SequenceParallel.ULYSSES, SequenceParallel.NONE
    assert tp_rule(grouped, model, 3, megatron) == "tp_heads"
    assert tp_rule(grouped, model, 12, megatron) is None
    assert tp_rule(grouped, model, 12, ulysses) == "ulysses_heads"
    assert tp_rule(grouped, model, 4, none) == "sp_experts"
    narrow = replace(grouped, experts=Experts(count=4, top_k=1, ffn_hidden_size=25))
    assert tp_rule(narrow, model, 4, megatron) is None  # its experts may stay whole
    shared = replace(grouped, experts=replace(grouped.experts, shared_ffn_hidden_size=25))
    assert tp_rule(shared, model, 4, megatron) == "tp_width"


def test_fixed_decisions_hold_for_every_strategy():
    space, found = strategies(request(constraints=Constraints(tp=2, zero=1, recompute=Recompute.FULL)))
    assert {(s.tp, s.zero, s.recompute) for s in found} == {(2, 1, Recompute.FULL)}
    assert all(space.cuts[name] for name in ("tp_fixed", "zero_allowed"))


def test_an_empty_space_says_which_rule_emptied_it():
    with pytest.raises(SearchError, match=r"pipeline degree is fixed|fixed by hand"):
        Space(request=request(constraints=Constraints(pp=5))).outers()


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (Constraints(pp=5), r"valid: pp 1, .* instead of 5$"),
        (Constraints(pp=1, tp=5), r"valid: tp 1, .* instead of 5$"),
        (Constraints(tp=1, micro_batch_size=10**6), r"micro_batch_size 1, .* instead of 1000000$"),
    ],
)
def test_an_empty_space_names_the_decision_to_leave_free(fixed, message):
    with pytest.raises(SearchError, match=message) as caught:
        Space(request=request(constraints=fixed)).outers()
    assert "\n" not in str(caught.value)


def test_every_cut_has_a_reason():
    space = Space(request=request())
    for outer in space.outers():
        space.virtual_stages(outer)
        space.strategies(space.request.model.layers[0], outer)
    assert set(space.cuts) <= set(RULES)


def with_experts(count: int, width: int) -> Layer:
    return Layer(
        kind=LayerKind.MOE_BLOCK,
        attention=Attention(heads=12, query_groups=12, head_dim=4),
        experts=Experts(count=count, top_k=1, ffn_hidden_size=width),
    )


def test_experts_are_shared_out_where_they_and_the_ranks_divide():
    model = replace(tiny_model([0] * 8), layers=(with_experts(8, 25),) * 8)
    space, found = strategies(request(model=model))
    # 12 ranks have no group of 8, and a width of 25 is not cut in 2.
    assert {s.expert_parallel for s in found} == {1, 2, 4}
    assert {s.expert_shards for s in found if s.tp == 2} == {1}
    assert space.cuts["ep_ranks"] and space.cuts["ep_width"]
    split = replace(model, layers=(with_experts(4, 24),) * 8)
    assert {s.expert_shards for s in strategies(request(model=split))[1] if s.tp == 2} == {1, 2}
    assert not any(s.expert_parallel > 1 for s in strategies(request(model=tiny_model([0] * 8)))[1])


def test_expert_degrees_by_hand_and_switched_off():
    model = replace(tiny_model([0] * 8), layers=(with_experts(4, 24),) * 8)
    fixed = request(model=model, constraints=Constraints(expert_parallel=2, expert_tensor_parallel=1))
    space, found = strategies(fixed)
    assert {(s.expert_parallel, s.expert_shards) for s in found} == {(2, 1)}
    assert space.cuts["ep_fixed"] and space.cuts["etp_fixed"]
    space, found = strategies(request(model=model, allow_expert_parallel=False))
    assert {(s.expert_parallel, s.expert_tensor_parallel) for s in found} == {(1, None)}
    assert space.cuts["ep_allowed"]
    none, found = strategies(request(model=model, constraints=Constraints(expert_parallel=3)))
    assert not found and none.cuts["ep_experts"]
