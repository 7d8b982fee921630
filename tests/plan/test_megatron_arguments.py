from dataclasses import replace

import pytest
from hypothesis import given
from plans import layers, plans, uniform_plan

from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.megatron_arguments import (
    command_line,
    megatron_arguments,
    runs_on_stock_megatron,
    shell_line,
    stage_layout,
)
from galvatron_megatron.plan.plan import Plan, StagePlan
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

STRATEGY = Strategy(tp=2, dp=4, sequence_parallel=SequenceParallel.MEGATRON, zero=1)
FULL = Strategy(tp=2, dp=4, sequence_parallel=SequenceParallel.MEGATRON, zero=1, recompute=Recompute.FULL)
SELECTIVE = Strategy(
    tp=2, dp=4, sequence_parallel=SequenceParallel.MEGATRON, zero=1, recompute=Recompute.SELECTIVE
)


def given_arguments(plan: Plan) -> dict[str, object]:
    return {dest: value for dest, value in megatron_arguments(plan).items() if value not in (None, False)}


def test_uniform_plan() -> None:
    plan = uniform_plan(STRATEGY, (6, 6), micro_batch_size=2, micro_batches=3)
    assert given_arguments(plan) == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "context_parallel_size": 1,
        "micro_batch_size": 2,
        "global_batch_size": 24,
        "use_distributed_optimizer": True,
    }
    assert runs_on_stock_megatron(plan)


def test_interleaved_and_uneven_stages() -> None:
    even = uniform_plan(STRATEGY, (2,) * 4, pp=2, virtual_stages=2)
    assert given_arguments(even)["num_layers_per_virtual_pipeline_stage"] == 2
    uneven = uniform_plan(STRATEGY, (1, 3, 2, 2), pp=2, virtual_stages=2)
    arguments = given_arguments(uneven)
    assert arguments["pipeline_model_parallel_layout"] == "Et|t*3|t*2|t*2L" == stage_layout(uneven)
    assert "num_layers_per_virtual_pipeline_stage" not in arguments
    assert runs_on_stock_megatron(uneven)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([[FULL, FULL]], {"granularity": "full", "method": "uniform", "num_layers": 1}),
        ([[SELECTIVE, SELECTIVE]], {"granularity": "selective", "modules": ["core_attn"]}),
        ([[FULL, STRATEGY], [FULL]], {"granularity": "full", "method": "block", "num_layers": 1}),
        ([[FULL, FULL, STRATEGY], [FULL]], {"granularity": "full", "method": "block", "num_layers": 2}),
        ([[FULL, FULL, STRATEGY], [FULL, STRATEGY]], {}),
        ([[STRATEGY, FULL]], {}),
        ([[SELECTIVE, FULL]], {}),
        ([[STRATEGY, STRATEGY]], {}),
    ],
)
def test_recompute(stages: list[list[Strategy]], expected: dict) -> None:
    plan = Plan(
        pp=len(stages),
        micro_batch_size=1,
        micro_batches=2,
        base=STRATEGY,
        stages=tuple(layers(*stage) for stage in stages),
    )
    found = {key: value for key, value in given_arguments(plan).items() if key.startswith("recompute_")}
    assert found == {f"recompute_{key}": value for key, value in expected.items()}
    is_plain = all(layer.strategy.recompute is Recompute.NONE for layer in plan.layers)
    assert runs_on_stock_megatron(plan) == bool(expected or is_plain)


def test_hybrid_pattern_with_stages() -> None:
    kinds = [LayerKind.MAMBA, LayerKind.ATTENTION, LayerKind.MLP, LayerKind.MOE]
    stage = StagePlan(layers=tuple(layers(SELECTIVE, kind=kind).layers[0] for kind in kinds))
    plan = Plan(pp=2, micro_batch_size=1, micro_batches=2, base=STRATEGY, stages=(stage, stage))
    arguments = given_arguments(plan)
    assert arguments["hybrid_layer_pattern"] == "M*-E|M*-E"
    assert arguments["recompute_granularity"] == "selective"
    assert "--hybrid-layer-pattern 'M*-E|M*-E'" in shell_line(command_line(plan))


def test_a_pattern_that_starts_with_a_dash_is_one_word() -> None:
    stage = layers(STRATEGY, kind=LayerKind.MLP)
    plan = Plan(pp=1, micro_batch_size=1, micro_batches=2, base=STRATEGY, stages=(stage,))
    assert "--hybrid-layer-pattern=-" in command_line(plan)


def test_selective_recompute_matters_for_layers_with_attention_only() -> None:
    stage = StagePlan(
        layers=(
            *layers(SELECTIVE, kind=LayerKind.ATTENTION).layers,
            *layers(STRATEGY, kind=LayerKind.MLP).layers,
        )
    )
    plan = Plan(pp=1, micro_batch_size=1, micro_batches=2, base=STRATEGY, stages=(stage,))
    assert runs_on_stock_megatron(plan)
    assert given_arguments(plan)["recompute_granularity"] == "selective"


def test_ulysses_is_context_parallelism_by_all_to_all() -> None:
    strategy = Strategy(tp=4, dp=2, sequence_parallel=SequenceParallel.ULYSSES)
    arguments = given_arguments(uniform_plan(strategy, (2,)))
    assert arguments["tensor_model_parallel_size"] == 1
    assert arguments["context_parallel_size"] == 4
    assert arguments["cp_comm_type"] == ["a2a"]
    assert "sequence_parallel" not in arguments
    mixed = Strategy(tp=2, cp=2, dp=2, sequence_parallel=SequenceParallel.ULYSSES)
    with pytest.raises(PlanError, match=r"cp: 2 .*valid: cp 1"):
        megatron_arguments(uniform_plan(mixed, (2,)))


def test_zero_2_and_3_have_no_argument() -> None:
    strategy = Strategy(dp=8, zero=3)
    plan = uniform_plan(strategy, (2,))
    with pytest.raises(PlanError, match=r"zero 3 .*valid: zero 0 or 1.*--galvatron-plan"):
        megatron_arguments(plan)
    assert not megatron_arguments(plan, sharding_by_runtime=True)["use_distributed_optimizer"]
    assert not runs_on_stock_megatron(plan)


def test_layers_that_differ_need_the_runtime() -> None:
    plan = Plan(
        pp=1,
        micro_batch_size=4,
        micro_batches=2,
        base=STRATEGY,
        stages=(layers(FULL, Strategy(tp=1, dp=8, zero=1, recompute=Recompute.FULL)),),
    )
    assert not runs_on_stock_megatron(plan)
    arguments = given_arguments(plan)
    assert arguments["tensor_model_parallel_size"] == 2
    assert "recompute_granularity" not in arguments


def test_layers_of_no_one_model_are_refused() -> None:
    stage = StagePlan(layers=(*layers(STRATEGY).layers, *layers(STRATEGY, kind=LayerKind.MLP).layers))
    plan = Plan(pp=1, micro_batch_size=1, micro_batches=2, base=STRATEGY, stages=(stage,))
    with pytest.raises(PlanError, match="block, mlp are of no one Megatron model"):
        megatron_arguments(plan)


def test_interleaving_needs_whole_groups_of_micro_batches() -> None:
    with pytest.raises(PlanError, match=r"micro_batches: 3 .*multiple of pp 2"):
        megatron_arguments(uniform_plan(STRATEGY, (2,) * 4, pp=2, virtual_stages=2, micro_batches=3))


@given(plan=plans())
def test_any_plan_has_arguments_or_an_error(plan: Plan) -> None:
    try:
        words = command_line(plan, sharding_by_runtime=True)
    except PlanError as error:
        assert "\n" not in str(error)
    else:
        assert str(plan.global_batch_size) in words


def test_megatron_has_one_pair_of_expert_degrees() -> None:
    experts = Strategy(tp=2, dp=4, sequence_parallel=SequenceParallel.MEGATRON, zero=1, expert_parallel=4)
    settings = {"pp": 1, "micro_batch_size": 1, "micro_batches": 2, "base": STRATEGY}
    moe = layers(experts, kind=LayerKind.MOE_BLOCK).layers
    plan = Plan(stages=(StagePlan(layers=(*layers(STRATEGY).layers, *moe)),), **settings)
    assert runs_on_stock_megatron(plan)
    assert given_arguments(plan)["expert_model_parallel_size"] == 4
    assert megatron_arguments(plan)["expert_tensor_parallel_size"] is None
    whole = layers(replace(experts, expert_tensor_parallel=1), kind=LayerKind.MOE_BLOCK).layers
    assert "--expert-tensor-parallel-size 1" in shell_line(
        command_line(Plan(stages=(StagePlan(layers=whole),), **settings))
    )
    two = Plan(stages=(StagePlan(layers=(*moe, *whole)),), **settings)
    assert not runs_on_stock_megatron(two)
    # The runtime gives every layer its own; Megatron's own groups must only exist.
    assert megatron_arguments(two)["expert_model_parallel_size"] == 1
    assert megatron_arguments(two)["expert_tensor_parallel_size"] is None
