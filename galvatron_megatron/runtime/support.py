"""What the runtime can execute; everything else is refused before the model is built."""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from galvatron_megatron.errors import UnsupportedPlanError
from galvatron_megatron.host_adam import missing_to_step_on_host
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.runnable import execution_problem
from galvatron_megatron.plan.strategy import Offload, SequenceParallel, Strategy
from galvatron_megatron.runtime.zero import is_left_to_megatron, uses_deepspeed, zero_backend

SUPPORTED_MEGATRON = ("0.19",)
"""Release series of megatron-core whose seams the hooks were tested with."""

_REFUSED: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("context_parallel_size", lambda v: v > 1, "context parallelism", "--context-parallel-size 1"),
    (
        "moe_router_load_balancing_type",
        lambda v: not set([v] if isinstance(v, str) else v) <= {"aux_loss", "seq_aux_loss", "none"},
        "balancing over tokens of other layouts",
        "aux_loss, seq_aux_loss, none",
    ),
    ("moe_router_enable_expert_bias", bool, "a bias by counted tokens", "no --moe-router-enable-expert-bias"),
    ("moe_expert_capacity_factor", bool, "dropping by the tokens of a rank", "no --moe-expert-capacity-factor"),
    ("moe_expert_rank_capacity_factor", bool, "dropping by the tokens of a rank", "leave it out"),
    ("moe_token_dispatcher_type", lambda v: v == "flex", "this dispatcher", "allgather, alltoall"),
    ("moe_shared_expert_overlap", bool, "shared experts on their own stream", "no --moe-shared-expert-overlap"),
    ("moe_enable_routing_replay", bool, "replayed routing", "leave it out"),
    ("overlap_moe_expert_parallel_comm", bool, "overlap across micro-batches", "leave it out"),
    (
        "expert_model_parallel_size",
        lambda v: v > 1,
        "one degree for all experts",
        "expert_parallel in the plan's strategies",
    ),
    ("mtp_num_layers", bool, "multi-token prediction", "no --mtp-num-layers"),
    ("mla_down_proj_fusion", bool, "fused projections to latents", "no --mla-down-proj-fusion"),
    ("reset_attention_mask", bool, "a mask per sample", "no --reset-attention-mask"),
    ("sft", bool, "packed sequences", "no --sft"),
    ("dataloader_inter_document_masking", bool, "packed sequences", "no inter-document masking"),
    ("cuda_graph_impl", lambda v: v not in (None, "none"), "CUDA graphs", "--cuda-graph-impl none"),
    ("enable_cuda_graph", bool, "CUDA graphs", "no --enable-cuda-graph"),
    ("fp8", bool, "FP8", "--bf16"),
    ("fp4", bool, "FP4", "--bf16"),
    ("use_torch_fsdp2", bool, "torch FSDP", "no --use-torch-fsdp2"),
    ("use_megatron_fsdp", bool, "Megatron-FSDP", "no --use-megatron-fsdp"),
    ("use_layer_wise_distributed_optimizer", bool, "layer-wise optimizers", "--optimizer adam"),
    ("optimizer", lambda v: v != "adam", "this optimizer", "--optimizer adam"),
    ("optimizer_cpu_offload", bool, "optimizer offloading", "no --optimizer-cpu-offload"),
    ("use_precision_aware_optimizer", bool, "the precision-aware optimizer", "leave it out"),
    ("cpu_offloading_num_layers", bool, "activation offloading", "--cpu-offloading-num-layers 0"),
    ("fine_grained_activation_offloading", bool, "activation offloading", "leave it out"),
    ("tp_comm_overlap", bool, "tensor-parallel overlap by user buffers", "no --tp-comm-overlap"),
    ("overlap_param_gather_with_optimizer_step", bool, "overlap with the optimizer step", "leave it out"),
    ("num_distributed_optimizer_instances", lambda v: v > 1, "several optimizer instances", "1 instance"),
    ("ddp_average_in_collective", bool, "averaging in collectives", "no --ddp-average-in-collective"),
    ("use_tp_pp_dp_mapping", bool, "ranks in tp-pp-dp order", "no --use-tp-pp-dp-mapping"),
    ("gtp_weight_remat_size", lambda v: v > 1, "weight rematerialisation groups", "1"),
    ("log_params_norm", bool, "logging the parameter norm", "no --log-params-norm"),
    ("check_weight_hash_across_dp_replicas_interval", bool, "checking weight hashes", "leave it out"),
    ("dump_param_to_param_group_map", bool, "dumping parameter groups", "leave it out"),
    ("freeze_all_layers", bool, "weights that do not train", "leave it out"),
    ("optimizer_cuda_graph", bool, "a CUDA graph of the optimizer", "no --optimizer-cuda-graph"),
    ("init_model_with_meta_device", bool, "initialisation on the meta device", "leave it out"),
    ("recompute_granularity", bool, "recomputation for all layers", "recompute in the plan's strategies"),
    ("moe_layer_recompute", bool, "recomputation for all layers", "recompute in the plan's strategies"),
    ("te_rng_tracker", bool, "Transformer Engine's random streams", "no --te-rng-tracker"),
    ("use_transformer_engine_op_fuser", bool, "fused Transformer Engine operators", "leave it out"),
    ("inprocess_restart", bool, "restarting in the process", "no --inprocess-restart"),
    ("position_embedding_type", lambda v: v == "mrope", "positions per sample", "rope, learned_absolute, none"),
    ("heterogeneous_layers_config_path", bool, "heterogeneous layer configs", "leave it out"),
    ("experimental_attention_variant", bool, "experimental attention", "leave it out"),
    ("window_size", bool, "sliding-window attention", "leave it out"),
    ("ckpt_format", lambda v: v != "torch_dist", "this checkpoint format", "--ckpt-format torch_dist"),
    (
        "distrib_optim_fully_reshardable_mem_efficient",
        bool,
        "gathering states piece by piece",
        "no --distrib-optim-fully-reshardable-mem-efficient",
    ),
    ("non_persistent_ckpt_type", lambda v: v == "local", "local checkpoints", "global"),
    ("delay_wgrad_compute", bool, "delayed weight gradients", "no --delay-wgrad-compute"),
    ("nccl_ub", bool, "NCCL user buffers", "no --use-nccl-ub"),
    ("create_all_gather_group", bool, "a separate all-gather group", "no --create-all-gather-group"),
    ("kitchen_config_file", bool, "kitchen quantization", "no --kitchen-config-file"),
    ("kitchen_recipe_number", bool, "kitchen quantization", "no --kitchen-recipe-number"),
    ("use_mup", bool, "maximal update parametrization", "no --use-mup"),
    ("softmax_type", lambda v: v != "vanilla", "a softmax with offsets", "--softmax-type vanilla"),
    ("log_max_attention_logit", bool, "logging attention logits", "leave it out"),
    ("perform_rl_step", bool, "reinforcement learning", "leave it out"),
    ("moe_use_upcycling", bool, "upcycling", "leave it out"),
    ("qk_clip", bool, "query-key clipping", "leave it out"),
    ("save_wgrads_interval", bool, "saving gradients", "leave it out"),
    ("save_dgrads_interval", bool, "saving gradients", "leave it out"),
    ("save_activations_interval", bool, "saving activations", "leave it out"),
    ("save_params_interval", bool, "saving one rank's weights", "--save-interval, whose checkpoints are whole"),
)
"""Argument, when it is in the way, what it stands for, and what to give instead."""

_REFUSED_BY_DEEPSPEED: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("check_for_large_grads", bool, "looking for large gradients", "leave it out"),
    (
        "ddp_reduce_scatter_with_fp32_accumulation",
        bool,
        "reductions of 16 bits that add in 32",
        "leave it out (--accumulate-allreduce-grads-in-fp32 reduces in 32)",
    ),
    ("defer_embedding_wgrad_compute", bool, "late gradients of the embedding", "leave it out"),
)
"""The same for plans with layers that DeepSpeed shards."""

CHANGING_BATCH = ("rampup_batch_size", "step_batch_size_schedule", "decrease_batch_size_if_needed")
"""Arguments by which the number of micro-batches changes during a run, or differs from what the others say."""


def check_supported(plan: Plan, args: Any) -> None:
    """Refuses what the runtime cannot execute exactly.

    Args:
        plan: the plan to run.
        args: Megatron's arguments.

    Raises:
        UnsupportedPlanError: with what is in the way, why, and what to change.
    """
    check_given(plan, args)
    if is_left_to_megatron(plan, args):
        return
    release = version("megatron-core")
    if not any(release.startswith(f"{series}.") for series in SUPPORTED_MEGATRON):
        raise UnsupportedPlanError(
            f"megatron-core {release}: layers that differ run on {', '.join(SUPPORTED_MEGATRON)} only; "
            "valid: such a release, or a plan in which all layers run alike"
        )
    if getattr(args, "loss_scale", None) and not (args.fp16 or args.bf16):
        raise UnsupportedPlanError(
            f"--loss-scale {args.loss_scale}: losses in fp32 are not scaled; valid: --bf16, --fp16 or none"
        )
    evaluated = getattr(args, "eval_micro_batch_size", None)
    if evaluated is not None and evaluated != args.micro_batch_size:
        raise UnsupportedPlanError(
            f"--eval-micro-batch-size {evaluated}: layers that differ share micro-batches of one size; "
            f"valid: {args.micro_batch_size}, or leave it out"
        )
    if uses_deepspeed(plan, args):
        _check_deepspeed(plan, args)
    _check_base(plan, args)
    for index in range(len(plan.layers)):
        _check_layer(index, plan, args)


def check_given(plan: Plan, args: Any) -> None:
    """Refuses what the command line alone tells, which Megatron's own validation may end with a traceback for.

    Args:
        plan: the plan to run.
        args: Megatron's arguments, set to the plan; before or after its validation.

    Raises:
        UnsupportedPlanError: with what is in the way, why, and what to change.
    """
    _check_fixed_batch(plan, args)
    by_muon = "muon" in (getattr(args, "optimizer", None) or "")  # gathers what its own optimizer shards
    if getattr(args, "overlap_param_gather", False) and plan.base.zero != 1 and not by_muon:
        raise UnsupportedPlanError(
            f"--overlap-param-gather: the plan's base has zero {plan.base.zero}, and Megatron gathers ahead "
            "for its distributed optimizer alone; valid: leave it out (ZeRO 3 gathers ahead anyway), or zero 1 "
            "in the base (--use-distributed-optimizer)"
        )
    if is_left_to_megatron(plan, args):
        return
    if problem := execution_problem(plan):
        raise UnsupportedPlanError(problem)
    if getattr(args, "galvatron_zero_backend", None) == "megatron" and uses_deepspeed(plan, args):
        raise UnsupportedPlanError(
            "--galvatron-zero-backend: megatron, and the plan has zero 2, 3 or states in host memory, which "
            "DeepSpeed alone keeps; valid: deepspeed, leave it out, or a plan of zero 0 and 1 on the device"
        )
    _check_arguments(plan, args)


def _check_fixed_batch(plan: Plan, args: Any) -> None:
    """Every step has the plan's micro-batches, whoever runs it."""
    for name in CHANGING_BATCH:
        value = getattr(args, name, None)
        if value:
            shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            raise UnsupportedPlanError(
                f"--{name.replace('_', '-')} ({shown}): a plan has one number of micro-batches, "
                f"{plan.micro_batches} here, for all steps; valid: leave it out, "
                f"with --global-batch-size {plan.global_batch_size}"
            )


def _check_arguments(plan: Plan, args: Any) -> None:
    refused, what, other = _REFUSED, "layers that differ", ""
    if uses_deepspeed(plan, args):
        refused = (*_REFUSED, *_REFUSED_BY_DEEPSPEED)
        if all(strategy == plan.base for strategy in plan.strategies):
            what, other = (
                f"DeepSpeed's zero {plan.base.zero}",
                ", or zero 0 or 1 by Megatron, without offloading",
            )
    for name, in_the_way, meaning, instead in refused:
        value = getattr(args, name, None)
        if value is not None and in_the_way(value):
            raise UnsupportedPlanError(
                f"--{name.replace('_', '-')} ({value}): {meaning} cannot be combined with {what}; "
                f"valid: {instead}{other}"
            )


def _check_deepspeed(plan: Plan, args: Any) -> None:
    """DeepSpeed is there, and can do what the arguments ask of it."""
    if find_spec("deepspeed") is None:
        raise UnsupportedPlanError(
            "plan: has layers that DeepSpeed shards, and deepspeed is not installed; "
            "valid: pip install deepspeed, or zero 0 or 1 by Megatron"
        )
    if zero_backend(args) == "deepspeed" and any(layer.kind.has_experts for layer in plan.layers):
        raise UnsupportedPlanError(
            "--galvatron-zero-backend: deepspeed, and layers with experts; valid with experts: megatron"
        )
    strategies = (plan.base, *plan.strategies)
    if any(s.offload is not Offload.NONE for s in strategies) and (missing := missing_to_step_on_host()):
        raise UnsupportedPlanError(
            f"plan offload: no {missing} here, with which DeepSpeed compiles the optimizer for hosts; "
            f"valid: install {missing}, or offload none"
        )


def _check_base(plan: Plan, args: Any) -> None:
    """The base layout and the schedule are what Megatron's arguments say."""
    expected = {
        "tensor_model_parallel_size": plan.base.tp,
        "pipeline_model_parallel_size": plan.pp,
        "micro_batch_size": plan.micro_batch_size,
        "global_batch_size": plan.global_batch_size,
        "sequence_parallel": plan.base.sequence_parallel is SequenceParallel.MEGATRON,
        "use_distributed_optimizer": plan.base.zero == 1,
    }
    for name, value in expected.items():
        actual = getattr(args, name)
        if actual != value:
            raise UnsupportedPlanError(
                f"--{name.replace('_', '-')}: {actual}, but the plan says {value}; valid: the plan's value"
            )
    layers = getattr(args, "num_layers", None)
    if layers is not None and layers != len(plan.layers):
        raise UnsupportedPlanError(f"plan: {len(plan.layers)} layers; valid: {layers}, as --num-layers says")
    _check_kinds(plan, args)


def _check_kinds(plan: Plan, args: Any) -> None:
    """The plan is for this model: the same kinds of layers, in the same stages."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if not pattern:
        kinds = {layer.kind for layer in plan.layers} - {LayerKind.BLOCK, LayerKind.MOE_BLOCK}
        if kinds:
            raise UnsupportedPlanError(
                f"plan: layers of kind {', '.join(sorted(kinds))}, which only hybrid models have; "
                "valid: block, moe_block"
            )
        _check_experts(plan, args)
        return
    symbols = {
        LayerKind.ATTENTION: "+" if "+" in pattern else "*",  # Megatron has one kind of attention in a model
        LayerKind.MLP: "-",
        LayerKind.MOE: "E",
        LayerKind.MAMBA: "M",
    }
    planned = "|".join("".join(symbols.get(layer.kind, "?") for layer in stage.layers) for stage in plan.stages)
    if planned != pattern:
        raise UnsupportedPlanError(
            f"plan: its layers are {planned!r}; valid: {pattern!r}, as --hybrid-layer-pattern says"
        )


def _check_experts(plan: Plan, args: Any) -> None:
    """The layers of a GPT model have experts where the plan says so."""
    frequency = getattr(args, "moe_layer_freq", 1) if getattr(args, "num_experts", None) else [0]
    for index, layer in enumerate(plan.layers):
        if isinstance(frequency, int):
            expected = index % frequency == 0
        else:
            expected = bool(frequency[index % len(frequency)])
        kind = LayerKind.MOE_BLOCK if expected else LayerKind.BLOCK
        if layer.kind is not kind:
            raise UnsupportedPlanError(
                f"plan layer {index}: {layer.kind.value}; valid: {kind.value}, as --num-experts and "
                "--moe-layer-freq say"
            )


def check_stage(plan: Plan, first: int, count: int, position: int, chunk: int) -> None:
    """The layers that Megatron builds here are those of the plan's stage.

    Args:
        plan: the plan.
        first: index in the model of the first layer Megatron builds.
        count: how many it builds.
        position: rank of the pipeline.
        chunk: model chunk of that rank.

    Raises:
        UnsupportedPlanError: Megatron's pipeline arguments say otherwise than the plan.
    """
    index = chunk * plan.pp + position
    expected_first = sum(len(stage.layers) for stage in plan.stages[:index])
    expected = len(plan.stages[index].layers)
    if (first, count) != (expected_first, expected):
        raise UnsupportedPlanError(
            f"pipeline rank {position}, chunk {chunk}: Megatron builds layers {first} to {first + count - 1}, "
            f"the plan {expected_first} to {expected_first + expected - 1}; "
            "valid: --pipeline-model-parallel-layout with the plan's stages"
        )


def _check_attention(where: str, strategy: Strategy, args: Any) -> None:
    """Every rank has whole heads."""
    heads = args.num_attention_heads
    groups = args.num_query_groups if getattr(args, "group_query_attention", False) else heads
    if heads % strategy.tp:
        raise UnsupportedPlanError(f"{where}: tp {strategy.tp} does not divide the {heads} attention heads")
    if groups % strategy.tp and strategy.tp % groups:
        raise UnsupportedPlanError(
            f"{where}: tp {strategy.tp} and the {groups} query groups; valid: one divides the other"
        )


def _divided(kind: LayerKind, strategy: Strategy, args: Any) -> Iterator[tuple[str, int | None, int]]:
    """What the ranks of a layer share out: (name, size or None where the model has none, ranks)."""
    shards = strategy.weight_shards
    latent = kind.has_attention and getattr(args, "multi_latent_attention", False)
    if latent and args.transformer_impl == "local":  # Transformer Engine's projections to latents are whole
        yield "--q-lora-rank", args.q_lora_rank, shards
        keys = args.kv_lora_rank + args.qk_pos_emb_head_dim
        yield "--kv-lora-rank and --qk-pos-emb-head-dim, together", keys, shards
    if kind is LayerKind.MAMBA:
        # Megatron's mixer is twice as wide as the model where the number of heads is not given.
        heads = args.mamba_num_heads or 2 * args.hidden_size // args.mamba_head_dim
        yield "--mamba-num-heads", heads, shards
        yield "--mamba-num-groups", args.mamba_num_groups, shards
    elif kind.has_experts:
        yield "--moe-ffn-hidden-size", getattr(args, "moe_ffn_hidden_size", None), strategy.expert_shards
        shared = getattr(args, "moe_shared_expert_intermediate_size", None)
        yield "--moe-shared-expert-intermediate-size", shared, shards
        yield "--num-experts", getattr(args, "num_experts", None), strategy.expert_parallel
    elif kind is not LayerKind.ATTENTION:
        yield "--ffn-hidden-size", args.ffn_hidden_size, shards


def _check_layer(index: int, plan: Plan, args: Any) -> None:
    strategy, kind = plan.layers[index].strategy, plan.layers[index].kind
    where = f"plan layer {index}"
    if kind.has_attention:
        _check_attention(where, strategy, args)
    for name, size, shards in _divided(kind, strategy, args):
        if size is not None and size % shards:
            raise UnsupportedPlanError(f"{where}: {shards} ranks do not divide {name} {size}")
    parts = 2 * strategy.cp * (1 if strategy.sequence_parallel is SequenceParallel.NONE else strategy.tp)
    if strategy.cp > 1 and args.seq_length % parts:
        raise UnsupportedPlanError(
            f"{where}: cp {strategy.cp} needs a --seq-length divisible by {parts}, not {args.seq_length}"
        )
    if strategy.sequence_parallel is not SequenceParallel.NONE and args.seq_length % strategy.tp:
        raise UnsupportedPlanError(f"{where}: tp {strategy.tp} does not divide --seq-length {args.seq_length}")
