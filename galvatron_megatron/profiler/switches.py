"""Megatron's switches that decide which code computes a layer, apart from the layer's shape and the plan."""

from argparse import Namespace
from enum import Enum

import torch

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

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "fp8"}


def switches_of(arguments: Namespace) -> str:
    """The switches that differ from Megatron's defaults, as ``name=value`` in alphabetical order.

    Measurements made under other switches are of other code: they are filed apart.

    Args:
        arguments: Megatron's, parsed; validated or not.
    """
    found = []
    for name, usual in USUAL_VALUES.items():
        value = getattr(arguments, name, usual)
        if isinstance(value, torch.dtype):
            value = _DTYPES[value]
        elif isinstance(value, Enum):
            value = value.name
        elif isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        if value != usual:
            found.append(f"{name}={value}")
    return " ".join(sorted(found))
