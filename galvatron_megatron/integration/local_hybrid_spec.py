"""Hybrid layers (attention, dense MLP, mixture of experts) from Megatron's local modules.

Megatron's own hybrid spec has Transformer Engine modules, which need a GPU; this one goes into ``--spec`` in
its place. Mamba layers need CUDA kernels in any case. A layer without a spec would be built as one that does
nothing, so those that are not here say so.
"""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from galvatron_megatron.errors import GalvatronError

attention_layer = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=DotProductAttention,
                linear_proj=RowParallelLinear,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    ),
)
mlp_layer = ModuleSpec(
    module=MLPLayer,
    submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        mlp_bda=get_bias_dropout_add,
    ),
)
moe_layer = ModuleSpec(
    module=MoETransformerLayer,
    submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        # Any positive count: the layer reads the real one from its config.
        mlp=get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False),
        mlp_bda=get_bias_dropout_add,
    ),
)


def _missing(name: str) -> type:
    """What raises in place of building a layer."""

    def refuse(layer: object, *args: object, **options: object) -> None:
        raise GalvatronError(
            f"device cpu: --hybrid-layer-pattern has {name}; valid on CPU ranks: * (attention), - (MLP), "
            "E (mixture of experts)"
        )

    return type("MissingLayer", (), {"__init__": refuse})


hybrid_stack_spec = ModuleSpec(
    module=HybridStack,
    submodules=HybridStackSubmodules(
        attention_layer=attention_layer,
        mlp_layer=mlp_layer,
        moe_layer=moe_layer,
        mamba_layer=_missing("M (Mamba)"),
        gdn_layer=_missing("G (gated delta net)"),
        dsa_layer=_missing("D (sparse attention)"),
        mla_layer=_missing("+ (multi-latent attention)"),
    ),
)
