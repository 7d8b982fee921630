"""A model from a Hugging Face ``config.json``: llama, mistral, mixtral, qwen2 and gpt2 kinds.

A sliding window is read as full attention, which is what Megatron computes without ``--window-size``; the
scaling of a rotary embedding changes no cost and is not read. Field names and defaults are those of the
``transformers`` library (version 4.4x, ``configuration_*.py`` of each kind), Apache-2.0.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from galvatron_megatron.describe.model import Attention, Experts, Layer, Mlp, Model
from galvatron_megatron.errors import DescriptionError, did_you_mean
from galvatron_megatron.plan.checks import MOST_LAYERS, require_count, shown
from galvatron_megatron.plan.document import read_document
from galvatron_megatron.plan.layer_kind import LayerKind

_Config = Mapping[str, object]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
}
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "fp16": "fp16", "float32": "fp32"}
_GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
"""Fields of gpt2 and the names of other kinds that ``transformers`` takes for them (``attribute_map``)."""


def model_from_hf_config(
    config: Path | str | Mapping[str, object],
    *,
    seq_length: int | None = None,
    precision: str | None = None,
    name: str = "",
) -> Model:
    """Describes a model for training from its Hugging Face configuration.

    Args:
        config: a ``config.json``, the directory it lies in, or its content.
        seq_length: tokens of one training sample; the longest the model takes by default.
        precision: ``bf16``, ``fp16`` or ``fp32``; as in the configuration by default, but bf16 for fp32, which
            is how weights are stored and not how models are trained.
        name: what to call the model; by default the directory or kind.

    Raises:
        DescriptionError: the file cannot be read, the kind is not known, or a field is missing or wrong.
    """
    if isinstance(config, Mapping):
        content, where = config, "config.json"
    else:
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        content, where = read_document(path, DescriptionError), str(path)
        stem = path.parent.name if path.stem == "config" else path.stem
        name = name or stem
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise DescriptionError(f"{where}: model_type {shown(kind)} is unknown; {did_you_mean(kind, _KINDS)}")
    dtype = content.get("torch_dtype") or content.get("dtype")
    # Weights in 8 or 4 bits, or of no said type, are trained in bf16 as well.
    found = _PRECISIONS.get(dtype.removeprefix("torch."), "bf16") if isinstance(dtype, str) else "bf16"
    try:
        return _KINDS[kind](
            content,
            name=name or str(kind),
            seq_length=seq_length,
            precision=precision or ("bf16" if found == "fp32" else found),
        )
    except DescriptionError as error:
        raise DescriptionError(f"{where}: {error}") from None


def _integer(config: _Config, field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    return require_count(value, field, error=DescriptionError)


def _layer_count(config: _Config, field: str, default: int | None = None) -> int:
    count = _integer(config, field, default)
    if count > MOST_LAYERS:
        raise DescriptionError(f"{field}: {count}; valid: an integer from 1 to {MOST_LAYERS}")
    return count


def _flag(config: _Config, field: str, default: bool) -> bool:
    value = config.get(field, default)
    if value is None:
        return False
    if type(value) is not bool:
        raise DescriptionError(f"{field}: {shown(value)}; valid: true or false")
    return value


def _probability(config: _Config, field: str, default: float) -> float:
    value = config.get(field, default)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise DescriptionError(f"{field}: {shown(value)}; valid: a number from 0 to 1")
    return float(value)


def _activation(config: _Config, field: str, default: str) -> str:
    value = config.get(field, default)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise DescriptionError(f"{field}: {shown(value)} is unknown; {did_you_mean(value, _ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _head_dim(config: _Config, heads: int, hidden_size: int) -> int:
    if config.get("head_dim") is not None:
        return _integer(config, "head_dim")
    if hidden_size % heads:
        raise DescriptionError(
            f"num_attention_heads: {heads} does not divide hidden_size {hidden_size}; valid: "
            f"a divisor of {hidden_size}, or head_dim beside it"
        )
    return hidden_size // heads


def _llama_like(
    config: _Config,
    *,
    name: str,
    seq_length: int | None,
    precision: str,
    longest: int = 2048,
    vocabulary: int = 32000,
    groups: int | None = None,
    qkv_bias: bool | None = None,
    activation: str = "silu",
) -> Model:
    hidden_size, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    # llama has one flag for all four projections; qwen2 always has a bias in the first three.
    attention_bias = _flag(config, "attention_bias", False)
    attention = Attention(
        heads=heads,
        # Null means one for every head, in each kind; a field that is left out has the kind's default.
        query_groups=_integer(
            config, "num_key_value_heads", heads if "num_key_value_heads" in config else groups or heads
        ),
        head_dim=_head_dim(config, heads, hidden_size),
        qkv_bias=attention_bias if qkv_bias is None else qkv_bias,
        output_bias=attention_bias,
    )
    width = _integer(config, "intermediate_size")
    activation = _activation(config, "hidden_act", activation)
    if config.get("num_local_experts") is not None:
        experts = Experts(
            count=_integer(config, "num_local_experts"),
            top_k=_integer(config, "num_experts_per_tok", 2),
            ffn_hidden_size=width,
            activation=activation,
        )
        layer = Layer(kind=LayerKind.MOE_BLOCK, attention=attention, experts=experts)
    else:
        bias = _flag(config, "mlp_bias", False)
        mlp = Mlp(ffn_hidden_size=width, gated=True, bias=bias, activation=activation)
        layer = Layer(kind=LayerKind.BLOCK, attention=attention, mlp=mlp)
    longest = _integer(config, "max_position_embeddings", longest)
    return Model(
        name=name,
        hidden_size=hidden_size,
        seq_length=longest if seq_length is None else seq_length,
        vocab_size=_integer(config, "vocab_size", vocabulary),
        layers=(layer,) * _layer_count(config, "num_hidden_layers"),
        normalization="RMSNorm",
        position_embedding="rope",
        max_position_embeddings=max(longest, seq_length or 0),
        tied_embeddings=_flag(config, "tie_word_embeddings", False),
        precision=precision,
        attention_dropout=_probability(config, "attention_dropout", 0.0),
    )


def _mistral(config: _Config, **settings: object) -> Model:
    return _llama_like(config, longest=131072, groups=8, **settings)


def _mixtral(config: _Config, **settings: object) -> Model:
    experts = _integer(config, "num_local_experts", 8)
    return _llama_like({**config, "num_local_experts": experts}, longest=131072, groups=8, **settings)


def _qwen2(config: _Config, **settings: object) -> Model:
    return _llama_like(config, longest=32768, vocabulary=151936, groups=32, qkv_bias=True, **settings)


def _gpt2(config: _Config, *, name: str, seq_length: int | None, precision: str) -> Model:
    if config.get("add_cross_attention"):
        raise DescriptionError("add_cross_attention: true is not planned for; valid: false, or leave it out")
    config = {**config, **{own: config[other] for own, other in _GPT2_NAMES.items() if other in config}}
    hidden_size, heads = _integer(config, "n_embd", 768), _integer(config, "n_head", 12)
    positions = _integer(config, "n_positions", 1024)
    if seq_length is not None and seq_length > positions:
        raise DescriptionError(
            f"n_positions: {positions} learned positions are fewer than the sequence length {seq_length}; "
            f"valid: a sequence length up to {positions}"
        )
    attention = Attention(
        heads=heads,
        query_groups=heads,
        head_dim=_head_dim({}, heads, hidden_size),
        qkv_bias=True,
        output_bias=True,
    )
    mlp = Mlp(
        ffn_hidden_size=_integer(config, "n_inner", 4 * hidden_size),
        bias=True,
        activation=_activation(config, "activation_function", "gelu_new"),
    )
    return Model(
        name=name,
        hidden_size=hidden_size,
        seq_length=positions if seq_length is None else seq_length,
        vocab_size=_integer(config, "vocab_size", 50257),
        layers=(Layer(kind=LayerKind.BLOCK, attention=attention, mlp=mlp),)
        * _layer_count(config, "n_layer", 12),
        normalization="LayerNorm",
        position_embedding="learned_absolute",
        max_position_embeddings=positions,
        tied_embeddings=_flag(config, "tie_word_embeddings", True),
        precision=precision,
        hidden_dropout=_probability(config, "resid_pdrop", 0.1),
        attention_dropout=_probability(config, "attn_pdrop", 0.1),
    )


_KINDS: dict[str, Callable[..., Model]] = {
    "llama": _llama_like,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
}
