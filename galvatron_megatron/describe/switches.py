"""Megatron's switches that decide which code computes a layer, and those of a profile."""

from collections.abc import Mapping

from galvatron_megatron.describe.megatron_flags import FLAG_OF
from galvatron_megatron.describe.profile import Profile

USUAL_VALUES: dict[str, object] = {
    "attention_backend": "auto",
    "attention_softmax_in_fp32": False,
    "apply_rope_fusion": True,
    "batch_invariant_mode": False,
    "bias_dropout_fusion": True,
    "bias_gelu_fusion": True,
    "bias_swiglu_fusion": True,
    "cross_entropy_fusion_impl": "native",
    "cross_entropy_loss_fusion": False,
    "cuda_graph_impl": "none",
    "deterministic_mode": False,
    "disable_bf16_reduced_precision_matmul": False,
    "exp_avg_dtype": "fp32",
    "exp_avg_sq_dtype": "fp32",
    "experimental_attention_variant": None,
    "fine_grained_activation_offloading": False,
    "first_last_layers_bf16": False,
    "flash_attention_version": None,
    "fp32_residual_connection": False,
    "fp4": None,
    "fp4_recipe": "nvfp4",
    "fp8": None,
    "fp8_recipe": "delayed",
    "fp8_wgrad": True,
    "fused_residual_rmsnorm": False,
    "grad_reduce_in_bf16": False,
    "gradient_accumulation_fusion": True,
    "kitchen_attention_backend": "sdpa",
    "main_grads_dtype": "fp32",
    "main_params_dtype": "fp32",
    "masked_softmax_fusion": True,
    "mla_down_proj_fusion": False,
    "moe_enable_deepep": False,
    "moe_expert_capacity_factor": None,
    "moe_flex_dispatcher_backend": "deepep",
    "moe_grouped_gemm": False,
    "moe_pad_expert_input_to_capacity": False,
    "moe_permute_fusion": False,
    "moe_router_dtype": None,
    "moe_router_force_load_balancing": False,
    "moe_router_fusion": False,
    "moe_shared_expert_overlap": False,
    "moe_token_dispatcher_type": "allgather",
    "openai_gelu": False,
    "optimizer": "adam",
    "qk_l2_norm": False,
    "quick_geglu": False,
    "softmax_type": "vanilla",
    "spec": None,
    "squared_relu": False,
    "te_rng_tracker": False,
    "transformer_impl": "transformer_engine",
    "use_flash_attn": False,
    "use_fused_weighted_squared_relu": False,
    "use_kitchen_attention": False,
    "use_mamba_mem_eff_path": True,
    "use_precision_aware_optimizer": False,
    "use_te_activation_func": False,
    "use_transformer_engine_op_fuser": False,
    "window_size": None,
}
"""Megatron's defaults (megatron-core 0.19). Arguments that its ``validate_args`` rewrites are left out, but for
those that it rewrites for rare combinations alone: what a job measures before and after it must agree."""


def differing_switches(profile: Profile, arguments: Mapping[str, object]) -> list[str]:
    """The switches of a command line that a profile was not measured under.

    Args:
        profile: the profile.
        arguments: Megatron's destinations and values, as ``read_command_line`` finds them.

    Returns:
        ``name=value`` of the command line, of those switches that can be told from it without Megatron.
    """
    measured = switches_of_profile(profile)
    found = []
    for name in sorted(USUAL_VALUES.keys() & FLAG_OF.keys() & arguments.keys()):
        value = str(arguments[name])
        if value != measured.get(name, str(USUAL_VALUES[name])):
            found.append(f"{name}={value}")
    return found


def switches_of_profile(profile: Profile) -> dict[str, str]:
    """Name -> value of the switches that a profile was measured under, where not Megatron's defaults."""
    return dict(word.split("=", 1) for word in profile.provenance.switches.split() if "=" in word)
