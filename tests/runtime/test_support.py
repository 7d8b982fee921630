"""What cannot be run is refused with the reason and what to change, before a model is built."""

from argparse import Namespace
from dataclasses import replace

import pytest

from galvatron_megatron.errors import UnsupportedPlanError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Offload, SequenceParallel, Strategy
from galvatron_megatron.runtime import support
from galvatron_megatron.runtime.support import check_given, check_stage, check_supported
from galvatron_megatron.runtime.zero import is_left_to_megatron

TWO = Strategy(tp=2, dp=2)
ONE = Strategy(tp=1, dp=4)


def plan(*strategies, kind=LayerKind.BLOCK, base=ONE):
    layers = tuple(LayerPlan(kind=kind, strategy=strategy) for strategy in strategies)
    return Plan(pp=1, micro_batch_size=2, micro_batches=2, base=base, stages=(StagePlan(layers=layers),))


def arguments(**changes):
    values = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "micro_batch_size": 2,
        "global_batch_size": 16,
        "sequence_parallel": False,
        "use_distributed_optimizer": False,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_query_groups": 1,
        "group_query_attention": False,
        "ffn_hidden_size": 64,
        "seq_length": 16,
        "optimizer": "adam",
        "ckpt_format": "torch_dist",
        "cuda_graph_impl": "none",
        "fp16": False,
        "bf16": False,
    }
    return Namespace(**(values | changes))


def test_a_mixed_plan_runs():
    check_supported(plan(ONE, TWO), arguments())


def test_losses_of_narrow_gradients_are_scaled():
    check_supported(plan(ONE, TWO), arguments(loss_scale=8.0, bf16=True))


def test_a_plan_of_stock_megatron_is_not_questioned():
    check_supported(plan(ONE, ONE), arguments(num_experts=8, fp8="e4m3"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context_parallel_size", 2),
        ("eval_micro_batch_size", 1),
        ("distrib_optim_fully_reshardable_mem_efficient", True),
        ("moe_layer_recompute", True),
        ("te_rng_tracker", True),
        ("position_embedding_type", "mrope"),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_load_balancing_type", ["aux_loss", "global_aux_loss"]),
        ("moe_router_enable_expert_bias", True),
        ("moe_expert_capacity_factor", 1.5),
        ("moe_token_dispatcher_type", "flex"),
        ("moe_shared_expert_overlap", True),
        ("expert_model_parallel_size", 2),
        ("mla_down_proj_fusion", True),
        ("mtp_num_layers", 1),
        ("reset_attention_mask", True),
        ("sft", True),
        ("cuda_graph_impl", "local"),
        ("fp8", "e4m3"),
        ("use_megatron_fsdp", True),
        ("optimizer", "muon"),
        ("recompute_granularity", "full"),
        ("log_params_norm", True),
        ("freeze_all_layers", True),
        ("save_params_interval", 2),
        ("optimizer_cuda_graph", True),
        ("overlap_param_gather", True),
        ("use_tp_pp_dp_mapping", True),
        ("ckpt_format", "torch"),
        ("tp_comm_overlap", True),
        ("loss_scale", 8.0),
    ],
)
def test_arguments_in_the_way_are_named(name, value):
    with pytest.raises(UnsupportedPlanError) as error:
        check_supported(plan(ONE, TWO), arguments(**{name: value}))
    text = str(error.value)
    assert f"--{name.replace('_', '-')}" in text
    assert "valid: " in text
    assert "\n" not in text


@pytest.mark.parametrize("layers", [(ONE, TWO), (ONE, ONE)], ids=["differing", "alike"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rampup_batch_size", [8, 8, 100]),
        ("step_batch_size_schedule", "0:16 1K:32"),
        ("decrease_batch_size_if_needed", True),
    ],
)
def test_a_number_of_micro_batches_that_changes_is_refused(name, value, layers):
    """Also where Megatron's own code runs all layers: the plan has one number."""
    with pytest.raises(UnsupportedPlanError) as error:
        check_supported(plan(*layers), arguments(**{name: value}))
    text = str(error.value)
    assert text.startswith(f"--{name.replace('_', '-')} (") and "2 here, for all steps" in text
    assert "valid: leave it out, with --global-batch-size 16" in text and "\n" not in text
    check_supported(plan(*layers), arguments(**{name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("tensor_model_parallel_size", 2), ("global_batch_size", 32), ("use_distributed_optimizer", True)],
)
def test_arguments_that_contradict_the_plan_are_named(name, value):
    with pytest.raises(UnsupportedPlanError, match=name.replace("_", "-")):
        check_supported(plan(ONE, TWO), arguments(**{name: value}))


@pytest.mark.parametrize(
    ("strategy", "changes", "words"),
    [
        (Strategy(tp=4, dp=1), {"num_attention_heads": 6}, "attention heads"),
        (Strategy(tp=4, dp=1), {"ffn_hidden_size": 66}, "ffn-hidden-size"),
        (
            Strategy(tp=4, dp=1, sequence_parallel=SequenceParallel.MEGATRON),
            {"seq_length": 18},
            "seq-length",
        ),
        (
            Strategy(tp=2, dp=2),
            {"group_query_attention": True, "num_query_groups": 3, "num_attention_heads": 6},
            "query groups",
        ),
        (Strategy(tp=1, cp=2, dp=2), {"seq_length": 18}, "cp 2 needs"),
    ],
)
def test_layers_that_cannot_run_are_named(strategy, changes, words):
    with pytest.raises(UnsupportedPlanError, match=words) as error:
        check_supported(plan(ONE, strategy), arguments(**changes))
    assert "layer 1" in str(error.value)


@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_and_parameters_are_sharded(zero):
    sharded = replace(ONE, zero=zero)
    check_supported(plan(sharded, sharded, base=sharded), arguments())
    with pytest.raises(UnsupportedPlanError, match="use-distributed-optimizer"):
        check_supported(plan(sharded, TWO, base=sharded), arguments(use_distributed_optimizer=True))


@pytest.mark.parametrize(
    "name",
    ["check_for_large_grads", "ddp_reduce_scatter_with_fp32_accumulation", "defer_embedding_wgrad_compute"],
)
def test_what_deepspeed_alone_does_not_do_is_named(name):
    sharded, asked = replace(ONE, zero=3), arguments(**{name: True})
    check_supported(plan(ONE, TWO), asked)
    with pytest.raises(
        UnsupportedPlanError, match=f"--{name.replace('_', '-')} .* layers that differ; valid: "
    ):
        check_supported(plan(sharded, TWO), asked)
    with pytest.raises(UnsupportedPlanError, match=r"DeepSpeed's zero 3; valid: .* or zero 0 or 1 by Megatron"):
        check_supported(plan(sharded, sharded, base=sharded), asked)


def test_what_the_command_line_tells_is_refused_before_megatron_looks_at_it():
    """Megatron would end the job with an assertion."""
    check_given(plan(ONE, TWO), arguments(loss_scale=8.0))
    for refused in (
        {"use_torch_fsdp2": True},
        {"overlap_param_gather": True},
        {"rampup_batch_size": [1, 1, 1]},
    ):
        with pytest.raises(UnsupportedPlanError, match="valid: "):
            check_given(plan(ONE, TWO), arguments(**refused))
    alike, sharded = plan(ONE, ONE), replace(ONE, zero=1)
    check_given(alike, arguments(use_torch_fsdp2=True))
    with pytest.raises(UnsupportedPlanError, match=r"base has zero 0.* or zero 1 in the base \(--use"):
        check_given(alike, arguments(overlap_param_gather=True))
    check_given(alike, arguments(overlap_param_gather=True, optimizer="dist_muon"))
    check_given(plan(sharded, TWO, base=sharded), arguments(overlap_param_gather=True))


def test_what_a_plan_cannot_be_is_said_of_the_plan():
    split = Strategy(cp=2, dp=2, zero=3)
    with pytest.raises(UnsupportedPlanError, match=r"plan\.base\.cp: 2; valid"):
        check_supported(plan(split, split, base=split), arguments(context_parallel_size=2))


def test_sharding_needs_deepspeed(monkeypatch):
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedPlanError, match="pip install deepspeed, or zero 0 or 1"):
        check_supported(plan(ONE, replace(TWO, zero=2)), arguments())
    check_supported(plan(ONE, replace(TWO, zero=1)), arguments())


def test_who_runs_stage_1_can_be_chosen():
    sharded = replace(ONE, zero=1)
    chosen = {"galvatron_zero_backend": "deepspeed", "use_distributed_optimizer": True}
    uniform = plan(sharded, sharded, base=sharded)
    assert is_left_to_megatron(uniform, arguments())
    assert not is_left_to_megatron(uniform, arguments(**chosen))
    check_supported(uniform, arguments(**chosen))
    with pytest.raises(UnsupportedPlanError, match="valid: megatron, deepspeed"):
        check_supported(uniform, arguments(galvatron_zero_backend="apex"))


def test_what_megatron_is_asked_to_run_and_deepspeed_alone_does_is_refused():
    sharded, offloaded = replace(ONE, zero=2), replace(TWO, zero=1, offload=Offload.OPTIMIZER)
    for strategy in (sharded, offloaded):
        check_given(plan(ONE, strategy), arguments(galvatron_zero_backend=None))
        check_given(plan(ONE, strategy), arguments(galvatron_zero_backend="deepspeed"))
        with pytest.raises(
            UnsupportedPlanError, match="backend: megatron, and the plan has zero 2, 3 or states"
        ):
            check_given(plan(ONE, strategy), arguments(galvatron_zero_backend="megatron"))
    check_given(plan(ONE, replace(TWO, zero=1)), arguments(galvatron_zero_backend="megatron"))


def test_scans_are_shared_out_by_heads_and_groups():
    hybrid = {"hybrid_layer_pattern": "MM", "mamba_num_heads": None, "mamba_head_dim": 8, "hidden_size": 32}
    mixed = plan(ONE, TWO, kind=LayerKind.MAMBA)
    check_supported(mixed, arguments(**hybrid, mamba_num_groups=4, num_attention_heads=3))
    with pytest.raises(UnsupportedPlanError, match="layer 1: 2 ranks do not divide --mamba-num-groups 3"):
        check_supported(mixed, arguments(**hybrid, mamba_num_groups=3))
    with pytest.raises(UnsupportedPlanError, match="layer 1: 2 ranks do not divide --mamba-num-heads 9"):
        check_supported(mixed, arguments(**hybrid | {"mamba_head_dim": 7}, mamba_num_groups=4))


def test_latents_are_shared_out_by_local_layers_only():
    latent = {
        "multi_latent_attention": True,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_pos_emb_head_dim": 7,
    }
    mixed = plan(ONE, TWO)
    check_supported(mixed, arguments(**latent, transformer_impl="transformer_engine"))
    with pytest.raises(UnsupportedPlanError, match="--kv-lora-rank and --qk-pos-emb-head-dim, together 23"):
        check_supported(mixed, arguments(**latent, transformer_impl="local"))
    with pytest.raises(UnsupportedPlanError, match="--q-lora-rank 5"):
        check_supported(mixed, arguments(**latent | {"q_lora_rank": 5}, transformer_impl="local"))


def test_experts_must_be_where_the_model_has_them():
    split = replace(TWO, sequence_parallel=SequenceParallel.MEGATRON)
    mixed = plan(ONE, split, kind=LayerKind.MOE_BLOCK)
    check_supported(mixed, arguments(num_experts=4, moe_layer_freq=1, moe_ffn_hidden_size=64))
    with pytest.raises(UnsupportedPlanError, match="plan layer 0: moe_block; valid: block"):
        check_supported(mixed, arguments())
    with pytest.raises(UnsupportedPlanError, match="plan layer 1: moe_block; valid: block"):
        check_supported(mixed, arguments(num_experts=4, moe_layer_freq=[1, 0]))
    with pytest.raises(UnsupportedPlanError, match="moe-ffn-hidden-size 33"):
        check_supported(mixed, arguments(num_experts=4, moe_layer_freq=1, moe_ffn_hidden_size=33))


def test_another_megatron_is_refused(monkeypatch):
    monkeypatch.setattr(support, "version", lambda name: "0.21.0")
    with pytest.raises(UnsupportedPlanError, match=r"0\.21\.0"):
        check_supported(plan(ONE, TWO), arguments())
    check_supported(plan(ONE, ONE), arguments())


def test_the_number_of_layers_must_fit():
    with pytest.raises(UnsupportedPlanError, match="num-layers"):
        check_supported(plan(ONE, TWO, ONE), arguments())


def test_a_plan_for_another_kind_of_model_is_refused():
    hybrid = plan(ONE, TWO, kind=LayerKind.ATTENTION)
    with pytest.raises(UnsupportedPlanError, match="hybrid"):
        check_supported(hybrid, arguments())
    with pytest.raises(UnsupportedPlanError, match="hybrid-layer-pattern"):
        check_supported(hybrid, arguments(hybrid_layer_pattern="*-"))
    check_supported(hybrid, arguments(hybrid_layer_pattern="**"))
    check_supported(hybrid, arguments(hybrid_layer_pattern="++"))


def test_stages_that_megatron_builds_otherwise_are_refused():
    made = plan(ONE, TWO, ONE)
    check_stage(made, 0, 3, 0, 0)
    with pytest.raises(UnsupportedPlanError, match="pipeline-model-parallel-layout"):
        check_stage(made, 0, 2, 0, 0)
    with pytest.raises(UnsupportedPlanError, match="layers 1 to 3"):
        check_stage(made, 1, 3, 0, 0)
