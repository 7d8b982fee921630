import json
from pathlib import Path

import pytest

from galvatron_megatron.describe.hf_config import model_from_hf_config
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.layer_kind import LayerKind

LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LLAMA32_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
MIXTRAL_8X7B = MISTRAL_7B | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257, "n_inner": None}


# Counts of the published checkpoints, as `transformers` reports them.
@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA2_7B, 6_738_415_616),
        (LLAMA32_1B, 1_235_814_400),
        (QWEN2_7B, 7_615_616_512),
        (MISTRAL_7B, 7_241_732_096),
        (MIXTRAL_8X7B, 46_702_792_704),
        (GPT2, 124_439_808),
        (GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48}, 1_557_611_200),
    ],
)
def test_parameters_are_those_of_the_checkpoint(config: dict, parameters: int) -> None:
    assert model_from_hf_config(config).parameter_count() == parameters


def test_fields() -> None:
    model = model_from_hf_config(QWEN2_7B, seq_length=8192, precision="fp16")
    attention = model.layers[0].attention
    assert (attention.heads, attention.query_groups, attention.head_dim) == (28, 4, 128)
    assert (attention.qkv_bias, attention.output_bias) == (True, False)
    assert (model.seq_length, model.max_position_embeddings, model.precision) == (8192, 131072, "fp16")
    assert (model.normalization, model.position_embedding) == ("RMSNorm", "rope")
    assert model_from_hf_config(LLAMA2_7B).precision == "fp16"
    assert model_from_hf_config(GPT2).precision == "bf16"
    assert model_from_hf_config(GPT2).hidden_dropout == 0.1
    mixtral = model_from_hf_config(MIXTRAL_8X7B)
    assert {layer.kind for layer in mixtral.layers} == {LayerKind.MOE_BLOCK}
    assert (mixtral.layers[0].experts.count, mixtral.layers[0].experts.top_k) == (8, 2)
    assert mixtral.layers[0].experts.gated


def test_files_and_directories(tmp_path: Path) -> None:
    folder = tmp_path / "Llama-2-7b-hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA2_7B))
    from_file, from_folder = model_from_hf_config(folder / "config.json"), model_from_hf_config(folder)
    assert from_file == from_folder
    assert from_file.name == "Llama-2-7b-hf"
    with pytest.raises(DescriptionError, match=r"config.json: cannot be read"):
        model_from_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA2_7B | {"model_type": "lama"}, "model_type 'lama' is unknown; did you mean 'llama'?"),
        ({}, "model_type None is unknown"),
        (LLAMA2_7B | {"hidden_size": "4096"}, "hidden_size: '4096'; valid: an integer >= 1"),
        (LLAMA2_7B | {"num_attention_heads": 33}, "num_attention_heads: 33 does not divide"),
        (LLAMA2_7B | {"num_key_value_heads": 7}, "query_groups: 7"),
        (LLAMA2_7B | {"hidden_act": "relu6"}, "hidden_act: 'relu6' is unknown"),
        (LLAMA2_7B | {"tie_word_embeddings": 1}, "tie_word_embeddings: 1"),
        (MIXTRAL_8X7B | {"num_experts_per_tok": 9}, "top_k: 9"),
        (GPT2 | {"resid_pdrop": "0.1"}, "resid_pdrop: '0.1'; valid: a number"),
        (GPT2 | {"resid_pdrop": float("nan")}, "resid_pdrop: nan; valid: a number from 0 to 1"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention: true is not planned for; valid: false"),
        (LLAMA2_7B | {"model_type": ["llama"]}, "model_type ['llama'] is unknown; valid: gpt2"),
        (LLAMA2_7B | {"hidden_act": ["silu"]}, "hidden_act: ['silu'] is unknown; valid: gelu"),
        (
            LLAMA2_7B | {"num_hidden_layers": 10**9},
            "num_hidden_layers: 1000000000; valid: an integer from 1 to",
        ),
        (
            LLAMA2_7B | {"hidden_size": 10**400},
            "hidden_size: an integer of 1329 bits; valid: an integer from 1",
        ),
    ],
)
def test_bad_configurations_are_refused_in_one_line(config: dict, message: str) -> None:
    with pytest.raises(DescriptionError) as caught:
        model_from_hf_config(config)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "valid: " in str(caught.value)


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (LLAMA2_7B | {"num_key_value_heads": None}, 32),
        ({key: LLAMA2_7B[key] for key in LLAMA2_7B if key != "num_key_value_heads"}, 32),
        (MIXTRAL_8X7B | {"num_key_value_heads": None}, 32),
        ({key: MIXTRAL_8X7B[key] for key in MIXTRAL_8X7B if key != "num_key_value_heads"}, 8),
    ],
)
def test_key_value_heads_that_are_not_said(config: dict, groups: int) -> None:
    assert model_from_hf_config(config).layers[0].attention.query_groups == groups


def test_fields_that_are_null() -> None:
    experts = model_from_hf_config(MIXTRAL_8X7B | {"num_local_experts": None}).layers[0].experts
    assert experts == model_from_hf_config(MIXTRAL_8X7B).layers[0].experts
    nulls = dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "head_dim", "rope_scaling"))
    assert model_from_hf_config(LLAMA2_7B | nulls) == model_from_hf_config(LLAMA2_7B)


@pytest.mark.parametrize(
    ("fields", "precision"),
    [
        ({"torch_dtype": None, "dtype": "float16"}, "fp16"),
        ({"torch_dtype": "torch.float16"}, "fp16"),
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "float32"}, "bf16"),
        ({"torch_dtype": ["float16"]}, "bf16"),
        ({"torch_dtype": None}, "bf16"),
    ],
)
def test_precision(fields: dict, precision: str) -> None:
    assert model_from_hf_config(LLAMA2_7B | fields).precision == precision


def test_gpt2_takes_the_names_of_other_kinds() -> None:
    sizes = {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
    }
    model = model_from_hf_config({"model_type": "gpt2", **sizes})
    assert (model.hidden_size, model.layers[0].attention.heads, len(model.layers)) == (1024, 16, 3)
    assert (model.seq_length, model.max_position_embeddings) == (64, 64)


def test_learned_positions_limit_the_sequence() -> None:
    with pytest.raises(DescriptionError, match=r"1024 learned positions are fewer than .* length 2048"):
        model_from_hf_config(GPT2, seq_length=2048)
    assert model_from_hf_config(LLAMA2_7B, seq_length=8192).max_position_embeddings == 8192


@pytest.mark.parametrize("seq_length", [0, -1])
def test_sequence_length_is_checked(seq_length: int) -> None:
    with pytest.raises(DescriptionError, match="seq_length"):
        model_from_hf_config(LLAMA2_7B, seq_length=seq_length)
