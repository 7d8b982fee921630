"""The flags of Megatron's command line that the planner reads: a table, so that Megatron is not needed.

Names, destinations, defaults and choices are those of ``megatron/training/arguments.py`` of core_v0.19;
a test holds every row against Megatron's own parser.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from galvatron_megatron.describe.layer_pattern import layer_frequency
from galvatron_megatron.plan.checks import GREATEST, shown


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) > GREATEST:
        raise ValueError("does not fit in 32 bits")
    return value


_READERS: dict[str, tuple[Callable[[str], object], str]] = {
    "int": (_integer, f"an integer up to {GREATEST}"),
    "float": (float, "a number"),
    "str": (str, "text"),
    "frequency": (layer_frequency, "an integer N, or a list of 0 and 1 such as ([0]+[1]*23)"),
}
"""Kind of value -> function that reads it, and what is valid."""


def _reader(kind: str) -> Callable[[str], object]:
    read, valid = _READERS[kind]

    def checked(text: str) -> object:
        try:
            return read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)}; valid: {valid}") from None

    return checked


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of Megatron's command line."""

    names: tuple[str, ...]
    dest: str
    kind: str
    """``on`` and ``off`` take no value and store True or False; else the type of the value."""
    default: object = None
    nargs: str | int | None = None
    choices: tuple[str, ...] | None = None

    @property
    def resting_value(self) -> object:
        """The value where the flag is not given."""
        return {"on": False, "off": True}.get(self.kind, self.default)

    def add_to(self, parser: argparse._ActionsContainer, explanation: str | None = None) -> None:
        """Adds the flag to a parser or one of its groups, without its default."""
        if self.kind in ("on", "off"):
            action = "store_true" if self.kind == "on" else "store_false"
            parser.add_argument(
                *self.names, dest=self.dest, action=action, default=argparse.SUPPRESS, help=explanation
            )
            return
        parser.add_argument(
            *self.names,
            dest=self.dest,
            type=_reader(self.kind),
            default=argparse.SUPPRESS,
            nargs=self.nargs,
            choices=self.choices,
            help=explanation,
        )


_ATTENTION_BACKENDS = ("flash", "fused", "unfused", "local", "auto")
_POSITION_EMBEDDINGS = ("learned_absolute", "rope", "yarn", "mrope", "relative", "none")
_STATE_TYPES = ("fp32", "fp16", "bf16", "fp8")

FLAGS: tuple[Flag, ...] = (
    # Sizes and kinds of the layers.
    Flag(("--num-layers",), "num_layers", "int"),
    Flag(("--encoder-num-layers",), "encoder_num_layers", "int"),
    Flag(("--decoder-num-layers",), "decoder_num_layers", "int"),
    Flag(("--hidden-size",), "hidden_size", "int"),
    Flag(("--ffn-hidden-size",), "ffn_hidden_size", "int"),
    Flag(("--num-attention-heads",), "num_attention_heads", "int"),
    Flag(("--kv-channels",), "kv_channels", "int"),
    Flag(("--group-query-attention",), "group_query_attention", "on"),
    Flag(("--num-query-groups",), "num_query_groups", "int", 1),
    Flag(("--seq-length",), "seq_length", "int"),
    Flag(("--encoder-seq-length",), "encoder_seq_length", "int"),
    Flag(("--max-position-embeddings",), "max_position_embeddings", "int"),
    Flag(
        ("--position-embedding-type",),
        "position_embedding_type",
        "str",
        "learned_absolute",
        choices=_POSITION_EMBEDDINGS,
    ),
    Flag(("--use-rotary-position-embeddings",), "use_rotary_position_embeddings", "on"),
    Flag(("--normalization",), "normalization", "str", "LayerNorm", choices=("LayerNorm", "RMSNorm")),
    Flag(("--disable-bias-linear",), "add_bias_linear", "off"),
    Flag(("--add-qkv-bias",), "add_qkv_bias", "on"),
    Flag(("--qk-layernorm",), "qk_layernorm", "on"),
    Flag(("--swiglu",), "swiglu", "on"),
    Flag(("--quick-geglu",), "quick_geglu", "on"),
    Flag(("--squared-relu",), "squared_relu", "on"),
    Flag(("--untie-embeddings-and-output-weights",), "untie_embeddings_and_output_weights", "on"),
    Flag(("--attention-output-gate",), "attention_output_gate", "on"),
    Flag(("--hybrid-layer-pattern",), "hybrid_layer_pattern", "str"),
    Flag(("--hybrid-override-pattern",), "hybrid_override_pattern", "str"),
    Flag(("--mtp-num-layers",), "mtp_num_layers", "int"),
    Flag(("--yaml-cfg",), "yaml_cfg", "str"),
    # Mixture of experts.
    Flag(("--num-experts",), "num_experts", "int"),
    Flag(("--moe-layer-freq",), "moe_layer_freq", "frequency", 1),
    Flag(("--moe-router-topk",), "moe_router_topk", "int", 2),
    Flag(("--moe-ffn-hidden-size",), "moe_ffn_hidden_size", "int"),
    Flag(("--moe-shared-expert-intermediate-size",), "moe_shared_expert_intermediate_size", "int"),
    Flag(("--moe-shared-expert-gate",), "moe_shared_expert_gate", "on"),
    Flag(("--moe-latent-size",), "moe_latent_size", "int"),
    Flag(
        ("--moe-token-dispatcher-type",),
        "moe_token_dispatcher_type",
        "str",
        "allgather",
        choices=("allgather", "alltoall", "flex"),
    ),
    # Multi-latent and other attention.
    Flag(("--multi-latent-attention",), "multi_latent_attention", "on"),
    Flag(("--q-lora-rank",), "q_lora_rank", "int"),
    Flag(("--kv-lora-rank",), "kv_lora_rank", "int", 32),
    Flag(("--qk-head-dim",), "qk_head_dim", "int", 128),
    Flag(("--qk-pos-emb-head-dim",), "qk_pos_emb_head_dim", "int", 64),
    Flag(("--v-head-dim",), "v_head_dim", "int", 128),
    Flag(("--experimental-attention-variant",), "experimental_attention_variant", "str"),
    Flag(("--heterogeneous-layers-config-path",), "heterogeneous_layers_config_path", "str"),
    Flag(("--heterogeneous-layers-config-encoded-json",), "heterogeneous_layers_config_encoded_json", "str"),
    # Mamba.
    Flag(("--mamba-state-dim",), "mamba_state_dim", "int", 128),
    Flag(("--mamba-head-dim",), "mamba_head_dim", "int", 64),
    Flag(("--mamba-num-groups",), "mamba_num_groups", "int", 8),
    Flag(("--mamba-num-heads",), "mamba_num_heads", "int"),
    # Vocabulary.
    Flag(("--vocab-size",), "vocab_size", "int"),
    Flag(("--padded-vocab-size",), "padded_vocab_size", "int"),
    Flag(("--no-pad-vocab-size", "--disable-pad-vocab-size"), "pad_vocab_size", "off"),
    Flag(("--make-vocab-size-divisible-by",), "make_vocab_size_divisible_by", "int", 128),
    Flag(("--tokenizer-type",), "tokenizer_type", "str"),
    Flag(("--tokenizer-model",), "tokenizer_model", "str"),
    Flag(("--vocab-file",), "vocab_file", "str"),
    # Numbers and kernels.
    Flag(("--bf16",), "bf16", "on"),
    Flag(("--fp16",), "fp16", "on"),
    Flag(("--fp8-format",), "fp8", "str", choices=("e4m3", "hybrid")),
    Flag(("--fp4-format",), "fp4", "str", choices=("e2m1",)),
    Flag(("--hidden-dropout",), "hidden_dropout", "float", 0.1),
    Flag(("--attention-dropout",), "attention_dropout", "float", 0.1),
    Flag(("--attention-backend",), "attention_backend", "str", "auto", choices=_ATTENTION_BACKENDS),
    Flag(
        ("--transformer-impl",),
        "transformer_impl",
        "str",
        "transformer_engine",
        choices=("local", "transformer_engine", "inference_optimized"),
    ),
    Flag(("--accumulate-allreduce-grads-in-fp32",), "accumulate_allreduce_grads_in_fp32", "on"),
    Flag(("--grad-reduce-in-bf16",), "grad_reduce_in_bf16", "on"),
    Flag(("--fp32-residual-connection",), "fp32_residual_connection", "on"),
    # Optimizer.
    Flag(("--optimizer",), "optimizer", "str", "adam"),
    Flag(("--use-precision-aware-optimizer",), "use_precision_aware_optimizer", "on"),
    Flag(("--main-grads-dtype",), "main_grads_dtype", "str", "fp32", choices=("fp32", "bf16")),
    Flag(("--main-params-dtype",), "main_params_dtype", "str", "fp32", choices=("fp32", "fp16")),
    Flag(("--exp-avg-dtype",), "exp_avg_dtype", "str", "fp32", choices=_STATE_TYPES),
    Flag(("--exp-avg-sq-dtype",), "exp_avg_sq_dtype", "str", "fp32", choices=_STATE_TYPES),
    Flag(("--optimizer-cpu-offload",), "optimizer_cpu_offload", "on"),
    # Parallelism and batch.
    Flag(("--tensor-model-parallel-size",), "tensor_model_parallel_size", "int", 1),
    Flag(("--pipeline-model-parallel-size",), "pipeline_model_parallel_size", "int", 1),
    Flag(("--sequence-parallel",), "sequence_parallel", "on"),
    Flag(("--context-parallel-size",), "context_parallel_size", "int", 1),
    Flag(("--cp-comm-type",), "cp_comm_type", "str", ["p2p"], nargs="+"),
    Flag(("--expert-model-parallel-size",), "expert_model_parallel_size", "int", 1),
    Flag(("--expert-tensor-parallel-size",), "expert_tensor_parallel_size", "int"),
    Flag(("--tensor-parallel-num-weight-shards",), "tensor_parallel_num_weight_shards", "int"),
    Flag(("--use-tp-pp-dp-mapping",), "use_tp_pp_dp_mapping", "on"),
    Flag(("--micro-batch-size",), "micro_batch_size", "int"),
    Flag(("--global-batch-size",), "global_batch_size", "int"),
    Flag(("--rampup-batch-size",), "rampup_batch_size", "int", nargs=3),
    Flag(("--step-batch-size-schedule",), "step_batch_size_schedule", "str"),
    Flag(("--num-layers-per-virtual-pipeline-stage",), "num_layers_per_virtual_pipeline_stage", "int"),
    Flag(("--num-virtual-stages-per-pipeline-rank",), "num_virtual_stages_per_pipeline_rank", "int"),
    Flag(
        ("--microbatch-group-size-per-virtual-pipeline-stage",),
        "microbatch_group_size_per_vp_stage",
        "int",
    ),
    Flag(("--pipeline-model-parallel-layout",), "pipeline_model_parallel_layout", "str"),
    Flag(("--decoder-first-pipeline-num-layers",), "decoder_first_pipeline_num_layers", "int"),
    Flag(("--decoder-last-pipeline-num-layers",), "decoder_last_pipeline_num_layers", "int"),
    Flag(("--account-for-embedding-in-pipeline-split",), "account_for_embedding_in_pipeline_split", "on"),
    Flag(("--account-for-loss-in-pipeline-split",), "account_for_loss_in_pipeline_split", "on"),
    Flag(("--no-overlap-p2p-communication",), "overlap_p2p_comm", "off"),
    # Data parallelism.
    Flag(("--use-distributed-optimizer",), "use_distributed_optimizer", "on"),
    Flag(("--num-distributed-optimizer-instances",), "num_distributed_optimizer_instances", "int", 1),
    Flag(("--ddp-bucket-size",), "ddp_bucket_size", "int"),
    Flag(("--ddp-num-buckets",), "ddp_num_buckets", "int"),
    Flag(("--overlap-grad-reduce",), "overlap_grad_reduce", "on"),
    Flag(("--overlap-param-gather",), "overlap_param_gather", "on"),
    Flag(("--tp-comm-overlap",), "tp_comm_overlap", "on"),
    Flag(("--use-torch-fsdp2",), "use_torch_fsdp2", "on"),
    Flag(("--use-megatron-fsdp",), "use_megatron_fsdp", "on"),
    Flag(("--distributed-backend",), "distributed_backend", "str", "nccl", choices=("nccl", "gloo")),
    # Recomputation.
    Flag(("--recompute-activations",), "recompute_activations", "on"),
    Flag(("--recompute-granularity",), "recompute_granularity", "str", choices=("full", "selective")),
    Flag(("--recompute-method",), "recompute_method", "str", choices=("uniform", "block")),
    Flag(("--recompute-num-layers",), "recompute_num_layers", "int"),
    Flag(("--moe-layer-recompute",), "moe_layer_recompute", "on"),
    Flag(("--recompute-modules",), "recompute_modules", "str", nargs="+"),
    Flag(("--distribute-saved-activations",), "distribute_saved_activations", "on"),
)

FLAG_OF: dict[str, Flag] = {flag.dest: flag for flag in FLAGS}
"""Destination -> flag."""


def option(dest: str) -> str:
    """The option string of a destination, for messages: ``hidden_size`` -> ``--hidden-size``."""
    return FLAG_OF[dest].names[0]
