"""Megatron's command line for a model description: the flags that decide what a layer costs."""

from galvatron_megatron.describe.model import Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.layer_kind import LayerKind


def flags_of(model: Model) -> list[str]:
    """Megatron's arguments that build the model of a description.

    Args:
        model: equal GPT blocks, dense or with experts, without latent attention.

    Returns:
        Words of a command line. ``model_from_arguments`` of them gives the model back.

    Raises:
        DescriptionError: the model has layers that no such command line describes.
    """
    kinds = {layer.kind for layer in model.layers}
    layer = model.layers[0]
    attention, mlp = layer.attention, layer.mlp
    if kinds != {LayerKind.BLOCK} or len(set(model.layers)) > 1 or attention is None or mlp is None:
        raise DescriptionError(
            f"model {model.name}: its layers are not equal dense blocks; valid: give Megatron's own arguments "
            "after --"
        )
    if attention.is_latent:
        raise DescriptionError(
            f"model {model.name}: multi-latent attention; valid: give Megatron's own arguments after --"
        )
    words = {
        "--num-layers": len(model.layers),
        "--hidden-size": model.hidden_size,
        "--num-attention-heads": attention.heads,
        "--kv-channels": attention.head_dim,
        "--ffn-hidden-size": mlp.ffn_hidden_size,
        "--seq-length": model.seq_length,
        "--max-position-embeddings": model.max_position_embeddings or model.seq_length,
        "--vocab-size": model.vocab_size,
        "--make-vocab-size-divisible-by": model.vocab_divisor,
        "--normalization": model.normalization,
        "--position-embedding-type": model.position_embedding,
        "--hidden-dropout": model.hidden_dropout,
        "--attention-dropout": model.attention_dropout,
        "--tokenizer-type": "NullTokenizer",
    }
    switches = ["--mock-data"]
    if attention.query_groups != attention.heads:
        switches.append("--group-query-attention")
        words["--num-query-groups"] = attention.query_groups
    switches += [
        flag
        for flag, wanted in (
            ("--swiglu", mlp.gated),
            ("--untie-embeddings-and-output-weights", not model.tied_embeddings),
            ("--disable-bias-linear", not mlp.bias),
            ("--add-qkv-bias", attention.qkv_bias and not mlp.bias),
            ("--qk-layernorm", attention.qk_layernorm),
            (f"--{model.precision}", model.precision != "fp32"),
        )
        if wanted
    ]
    return [text for pair in words.items() for text in (pair[0], str(pair[1]))] + switches
