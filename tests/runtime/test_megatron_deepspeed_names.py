"""Megatron-DeepSpeed's parameters by Megatron-core's names, whole job and pipeline, rows in the right order."""

import argparse

import pytest
import torch

from galvatron_megatron.errors import PlanError
from galvatron_megatron.runtime.megatron_deepspeed_names import MegatronDeepSpeedNames

PARTS = ("input_layernorm", "self_attention.query_key_value", "self_attention.dense")
PARTS += ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
CORE = {
    "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
    "decoder.layers.1.input_layernorm.weight": "input_layernorm",
    "decoder.layers.1.self_attention.linear_qkv.weight": "self_attention.query_key_value",
    "decoder.layers.1.self_attention.linear_proj.weight": "self_attention.dense",
    "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
    "decoder.layers.1.pre_mlp_layernorm.weight": "post_attention_layernorm",
    "decoder.layers.1.mlp.linear_fc1.weight": "mlp.dense_h_to_4h",
    "decoder.layers.1.mlp.linear_fc2.weight": "mlp.dense_4h_to_h",
}
FLAT = {f"language_model.encoder.layers.{i}.{part}.weight" for i in range(2) for part in PARTS} | {
    "language_model.embedding.word_embeddings.weight",
    "language_model.embedding.position_embeddings.weight",
    "language_model.encoder.final_layernorm.weight",
    "language_model.output_layer.weight",
}
PIPELINE = {f"{i}.{part}.weight" for i in (2, 3) for part in PARTS} | {
    "1.word_embeddings.weight",
    "4.weight",
    "5.lm_head.weight",
}
TIED = {f"{i}.{part}.weight" for i in (2, 3) for part in PARTS} | {
    "tied_modules.embed.word_embeddings.weight",
    "tied_modules.embed.position_embeddings.weight",
    "4.weight",
    "4.bias",
}


def names_of(folders, **arguments):
    return MegatronDeepSpeedNames.of(folders, lambda: argparse.Namespace(**arguments) if arguments else None)


@pytest.mark.parametrize(
    ("folders", "layer", "others"),
    [
        (
            FLAT,
            "language_model.encoder.layers.1.{}.weight",
            {
                "embedding.word_embeddings.weight": "language_model.embedding.word_embeddings.weight",
                "embedding.position_embeddings.weight": "language_model.embedding.position_embeddings.weight",
                "decoder.final_layernorm.weight": "language_model.encoder.final_layernorm.weight",
                "output_layer.weight": "language_model.output_layer.weight",
                "decoder.layers.2.mlp.linear_fc1.weight": None,
            },
        ),
        (
            PIPELINE,
            "3.{}.weight",
            {
                "embedding.word_embeddings.weight": "1.word_embeddings.weight",
                "decoder.final_layernorm.weight": "4.weight",
                "decoder.final_layernorm.bias": None,
                "output_layer.weight": "5.lm_head.weight",
            },
        ),
        (
            TIED,
            "3.{}.weight",
            {
                "embedding.word_embeddings.weight": "tied_modules.embed.word_embeddings.weight",
                "embedding.position_embeddings.weight": "tied_modules.embed.position_embeddings.weight",
                "decoder.final_layernorm.bias": "4.bias",
                "output_layer.weight": None,
            },
        ),
    ],
)
def test_every_parameter_is_found(folders, layer, others):
    names = names_of(folders)
    for core, part in CORE.items():
        assert names.folder_of(core) == layer.format(part)
    for core, folder in others.items():
        assert names.folder_of(core) == folder


def test_other_checkpoints_are_not_taken_for_it():
    assert names_of({"decoder.layers.0.self_attention.linear_proj.weight", "output_layer.weight"}) is None


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
HEADS, WIDTH, HIDDEN = 4, 2, 3


def by_head():
    """Rows as Megatron-core has them: for each head its query, key and value."""
    return torch.arange(HEADS * 3 * WIDTH * HIDDEN, dtype=torch.float).reshape(-1, HIDDEN)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_rows_of_queries_keys_and_values_go_by_head(splits, dimensions):
    whole = by_head() if dimensions == 2 else by_head()[:, 0]
    # What each tensor-parallel rank of the newer code holds: all its queries, all its keys, all its values.
    ranks = whole.reshape(splits, HEADS // splits, 3, WIDTH, *whole.shape[1:])
    saved = torch.cat([torch.cat([rank[:, part].flatten(0, 1) for part in range(3)]) for rank in ranks])
    fields = {"num_attention_heads": HEADS, "tensor_model_parallel_size": splits}
    newer = names_of(FLAT, **fields, num_key_value_heads=HEADS, ds_sequence_parallel_fpdt=False)
    assert torch.equal(newer.in_order(QKV, saved), whole)
    older = names_of(FLAT, **fields, num_key_value_heads=2)
    assert torch.equal(older.in_order(QKV, whole), whole)
    norm = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert torch.equal(newer.in_order(norm, saved), saved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "told by the arguments that its own checkpoints hold"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, "2 key-value heads for 4 heads"),
        ({"num_attention_heads": 5}, "24 rows for 5 heads over 1 ranks"),
    ],
)
def test_an_order_that_nothing_tells_is_refused(arguments, message):
    if arguments:
        arguments = arguments | {"ds_sequence_parallel_fpdt": True, "tensor_model_parallel_size": 1}
    with pytest.raises(PlanError, match=message) as caught:
        names_of(FLAT, **arguments).in_order(QKV, by_head())
    assert "; valid: " in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "warns"),
    [
        ({}, False),
        ({"use_rotary_position_embeddings": True}, False),
        ({"use_rotary_position_embeddings": True, "ds_sequence_parallel_fpdt": False}, True),
        ({"use_rotary_position_embeddings": False, "ds_sequence_parallel_fpdt": False}, False),
        ({"use_rotary_position_embeddings": True, "ds_sequence_parallel_fpdt": True}, False),
        (
            {
                "use_rotary_position_embeddings": True,
                "ds_sequence_parallel_fpdt": False,
                "ds_sequence_parallel_size": 2,
            },
            False,
        ),
    ],
)
def test_other_rotations_are_told(arguments, warns):
    found = names_of(FLAT, **arguments).warning()
    assert (found is not None and "other angles" in found) is warns
