"""A model from Megatron's own arguments: the parsed namespace, or a command line read without Megatron.

The rules for values that are not given are those of Megatron-LM core_v0.19 (``validate_args`` in
``megatron/training/arguments.py`` and ``core_transformer_config_from_args``); after Megatron's own validation
the values are there already and the same rules change nothing.
"""

from collections.abc import Callable, Mapping

from galvatron_megatron.describe.command_line import parse_command_line, plan_constraints, read_command_line
from galvatron_megatron.describe.layer_pattern import hybrid_pattern, moe_layers
from galvatron_megatron.describe.megatron_flags import FLAG_OF, option
from galvatron_megatron.describe.model import Attention, Experts, Layer, Mamba, Mlp, Model
from galvatron_megatron.describe.vocabulary import vocabulary
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.checks import MOST_LAYERS, require_count
from galvatron_megatron.plan.layer_kind import LayerKind

__all__ = ["model_from_arguments", "parse_command_line", "plan_constraints", "read_command_line"]

_UNPLANNED = {
    "yaml_cfg": "the same settings as flags",
    "heterogeneous_layers_config_path": "layers that the other flags describe",
    "heterogeneous_layers_config_encoded_json": "layers that the other flags describe",
    "experimental_attention_variant": "leave it out",
    "attention_output_gate": "leave it out",
    "decoder_num_layers": "--num-layers; models of an encoder and a decoder are not planned for",
    "mtp_num_layers": "leave it out; multi-token prediction is not planned for",
    "moe_latent_size": "leave it out",
    "fp8": "--bf16 without it",
    "fp4": "--bf16 without it",
}


def model_from_arguments(
    arguments: Mapping[str, object], *, name: str = "", vocab_size: int | None = None
) -> Model:
    """Describes the model that Megatron would build.

    Args:
        arguments: Megatron's destinations and values, before or after its validation: ``vars(args)`` of its
            namespace, or what ``parse_command_line`` returns. A destination that is missing has Megatron's
            default.
        name: what to call the model; made from its sizes by default.
        vocab_size: size of the tokenizer's vocabulary where the caller knows it; else taken from
            ``--vocab-size``, ``--padded-vocab-size`` or the tokenizer's files.

    Raises:
        DescriptionError: a size is missing or wrong, or the model has a feature that is not planned for.
    """

    def get(dest: str) -> object:
        return arguments[dest] if dest in arguments else FLAG_OF[dest].resting_value

    for dest, valid in _UNPLANNED.items():
        if get(dest):
            raise DescriptionError(f"{option(dest)}: {get(dest)!r} is not planned for; valid: {valid}")
    pattern = get("hybrid_layer_pattern") or get("hybrid_override_pattern")
    layers = _hybrid_layers(get, str(pattern)) if pattern is not None else _gpt_layers(get)
    seq_length = _first(get, "seq_length", "encoder_seq_length")
    size, divisor = vocabulary(get, vocab_size)
    precision = "bf16" if get("bf16") else "fp16" if get("fp16") else "fp32"
    hidden_size = _required(get, "hidden_size")
    return Model(
        name=name or f"{'hybrid' if pattern is not None else 'gpt'}-{len(layers)}x{hidden_size}",
        hidden_size=hidden_size,
        seq_length=seq_length,
        vocab_size=size,
        layers=layers,
        normalization=str(get("normalization")),
        position_embedding=_position_embedding(get),
        max_position_embeddings=get("max_position_embeddings") or seq_length,
        tied_embeddings=not get("untie_embeddings_and_output_weights"),
        vocab_divisor=divisor,
        precision=precision,
        hidden_dropout=float(get("hidden_dropout")),
        attention_dropout=float(get("attention_dropout")),
        fused_attention=_has_fused_attention(get, precision),
    )


_Get = Callable[[str], object]


def _required(get: _Get, dest: str) -> int:
    value = get(dest)
    if value is None:
        raise DescriptionError(f"{option(dest)}: missing; valid: an integer >= 1")
    return value


def _first(get: _Get, *dests: str) -> int:
    for dest in dests:
        if get(dest) is not None:
            return get(dest)
    return _required(get, dests[0])


def _layer_count(get: _Get) -> int:
    count = _first(get, "num_layers", "encoder_num_layers")
    if not 1 <= count <= MOST_LAYERS:
        raise DescriptionError(f"{option('num_layers')}: {count}; valid: an integer from 1 to {MOST_LAYERS}")
    return count


def _gpt_layers(get: _Get) -> tuple[Layer, ...]:
    count = _layer_count(get)
    attention = _attention(get, latent=bool(get("multi_latent_attention")))
    # Megatron makes a dense model of --num-experts 0.
    with_experts = (False,) * count
    if get("num_experts"):
        with_experts = moe_layers(get("moe_layer_freq"), count)
    dense = None if all(with_experts) else Layer(kind=LayerKind.BLOCK, attention=attention, mlp=_mlp(get))
    sparse = None
    if any(with_experts):
        sparse = Layer(kind=LayerKind.MOE_BLOCK, attention=attention, experts=_experts(get))
    return tuple(sparse if has_experts else dense for has_experts in with_experts)


def _hybrid_layers(get: _Get, pattern: str) -> tuple[Layer, ...]:
    parsed = hybrid_pattern(pattern)
    made: dict[str, Layer] = {}
    for symbol in set(parsed.symbols):
        match symbol:
            case "*" | "+":
                latent = symbol == "+" or bool(get("multi_latent_attention"))
                made[symbol] = Layer(kind=LayerKind.ATTENTION, attention=_attention(get, latent=latent))
            case "-":
                made[symbol] = Layer(kind=LayerKind.MLP, mlp=_mlp(get))
            case "E":
                if not get("num_experts"):
                    raise DescriptionError(
                        f"--hybrid-layer-pattern has E layers; valid: {option('num_experts')} N, or no E"
                    )
                made[symbol] = Layer(kind=LayerKind.MOE, experts=_experts(get))
            case "M":
                made[symbol] = Layer(kind=LayerKind.MAMBA, mamba=_mamba(get))
    return tuple(made[symbol] for symbol in parsed.symbols)


def _attention(get: _Get, *, latent: bool) -> Attention:
    hidden_size, heads = _required(get, "hidden_size"), _required(get, "num_attention_heads")
    bias = bool(get("add_bias_linear"))
    if latent:
        rope_dim = get("qk_pos_emb_head_dim")
        return Attention(
            heads=heads,
            query_groups=heads,
            head_dim=get("qk_head_dim") + rope_dim,
            # Megatron builds the projections of multi-latent attention without bias, but for the last.
            qkv_bias=False,
            output_bias=bias,
            qk_layernorm=bool(get("qk_layernorm")),
            q_lora_rank=get("q_lora_rank") or 0,
            kv_lora_rank=require_count(get("kv_lora_rank"), option("kv_lora_rank"), error=DescriptionError),
            qk_head_dim=get("qk_head_dim"),
            qk_rope_head_dim=rope_dim,
            v_head_dim=get("v_head_dim"),
        )
    head_dim = get("kv_channels")
    if head_dim is None:
        if heads < 1 or hidden_size % heads:
            raise DescriptionError(
                f"{option('num_attention_heads')}: {heads} does not divide the hidden size {hidden_size}; "
                f"valid: a divisor of {hidden_size}, or give {option('kv_channels')}"
            )
        head_dim = hidden_size // heads
    return Attention(
        heads=heads,
        query_groups=get("num_query_groups") if get("group_query_attention") else heads,
        head_dim=head_dim,
        qkv_bias=bias or bool(get("add_qkv_bias")),
        output_bias=bias,
        qk_layernorm=bool(get("qk_layernorm")),
    )


def _ffn_hidden_size(get: _Get) -> int:
    given = get("ffn_hidden_size")
    if given is not None:
        return given
    hidden_size = _required(get, "hidden_size")
    if get("swiglu"):
        return int((4 * hidden_size * 2 / 3) / 64) * 64
    return 4 * hidden_size


def _activation(get: _Get) -> tuple[str, bool]:
    """Name of the activation function, and whether it is gated."""
    if get("swiglu"):
        return "silu", True
    if get("squared_relu"):
        return "squared_relu", False
    if get("quick_geglu"):
        return "quick_gelu", True
    return "gelu", False


def _mlp(get: _Get) -> Mlp:
    activation, gated = _activation(get)
    return Mlp(
        ffn_hidden_size=_ffn_hidden_size(get),
        gated=gated,
        bias=bool(get("add_bias_linear")),
        activation=activation,
    )


def _experts(get: _Get) -> Experts:
    activation, gated = _activation(get)
    return Experts(
        count=get("num_experts"),
        top_k=get("moe_router_topk"),
        ffn_hidden_size=get("moe_ffn_hidden_size") or _ffn_hidden_size(get),
        shared_ffn_hidden_size=get("moe_shared_expert_intermediate_size") or 0,
        shared_gate=bool(get("moe_shared_expert_gate")),
        gated=gated,
        bias=bool(get("add_bias_linear")),
        activation=activation,
        dispatcher=str(get("moe_token_dispatcher_type")),
    )


def _mamba(get: _Get) -> Mamba:
    return Mamba(
        state_dim=get("mamba_state_dim"),
        head_dim=get("mamba_head_dim"),
        groups=get("mamba_num_groups"),
        heads=get("mamba_num_heads") or 0,
    )


def _position_embedding(get: _Get) -> str:
    kind = "rope" if get("use_rotary_position_embeddings") else str(get("position_embedding_type"))
    if kind == "relative":
        raise DescriptionError(
            f"{option('position_embedding_type')}: 'relative' is not planned for; "
            "valid: learned_absolute, rope, yarn, mrope, none"
        )
    # The kinds of rotary embedding differ in their frequencies only.
    return "rope" if kind in ("yarn", "mrope") else kind


def _has_fused_attention(get: _Get, precision: str) -> bool:
    """Whether no seq x seq matrix of attention scores is kept.

    Megatron's local layers always compute them; Transformer Engine's flash and fused kernels need 16 bits.
    """
    backend = get("attention_backend")
    backend = getattr(backend, "name", backend)
    return get("transformer_impl") != "local" and backend not in ("unfused", "local") and precision != "fp32"
