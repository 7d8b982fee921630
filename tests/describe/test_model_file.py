import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.cost.counts import embedding_counts, head_counts, layer_counts
from galvatron_megatron.describe.model import Attention, Experts, Layer, Mamba, Mlp, Model
from galvatron_megatron.describe.model_file import (
    model_from_dict,
    model_to_dict,
    read_model,
    with_seq_length,
    write_model,
)
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Strategy

SHIPPED = Path(__file__).parents[2] / "configs" / "models"

# What the papers print, and for Llama what `transformers` counts in the published checkpoints.
PARAMETERS = {
    "gpt3-125m": 125_000_000,
    "gpt3-350m": 350_000_000,
    "gpt3-760m": 760_000_000,
    "gpt3-1.3b": 1_300_000_000,
    "gpt3-2.7b": 2_700_000_000,
    "gpt3-6.7b": 6_700_000_000,
    "gpt3-13b": 13_000_000_000,
    "gpt3-175b": 175_000_000_000,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
}


def test_every_shipped_model_is_listed() -> None:
    assert {path.stem for path in SHIPPED.iterdir()} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_models(name: str) -> None:
    path = SHIPPED / f"{name}.yaml"
    model = read_model(path)
    assert model.name == name
    assert "arXiv" in yaml.safe_load(path.read_text())["source"]
    if name.startswith(("llama", "mixtral")):
        assert model.parameter_count() == PARAMETERS[name]
        return
    assert model.parameter_count() == pytest.approx(PARAMETERS[name], rel=0.02)
    hidden, layers = model.hidden_size, len(model.layers)
    attention = model.layers[0].attention
    assert attention.heads * attention.head_dim == hidden
    # 12 h^2 weights and 13 h biases and norms a block, 2 h for the last norm: arXiv 2104.04473, equation 2.
    assert model.parameter_count() == layers * (12 * hidden**2 + 13 * hidden) + (50257 + 2048 + 2) * hidden


@pytest.mark.parametrize("name", PARAMETERS)
def test_two_counts_of_parameters_agree(name: str) -> None:
    model, alone = read_model(SHIPPED / f"{name}.yaml"), Strategy()
    counts = [(layer_counts(model, layer, alone, 1), times) for layer, times in model.layer_runs()]
    counts += [(embedding_counts(model, alone, 1), 1), (head_counts(model, alone, 1), 1)]
    shared = model.padded_vocab_size(1) * model.hidden_size if model.tied_embeddings else 0
    total = sum(count.parameters * times for count, times in counts) - shared
    assert total == model.parameter_count(tp=1)


positive = st.integers(1, 64)


@st.composite
def any_layer(draw: st.DrawFn) -> Layer:
    groups, flag = draw(positive), st.booleans()
    attention = Attention(
        heads=groups * draw(positive), query_groups=groups, head_dim=draw(positive), qkv_bias=draw(flag)
    )
    mlp = Mlp(ffn_hidden_size=draw(positive), gated=draw(flag), activation=draw(st.text(max_size=4)))
    count = draw(positive)
    experts = Experts(count=count, top_k=draw(st.integers(1, count)), ffn_hidden_size=draw(positive))
    return draw(
        st.sampled_from(
            [
                Layer(kind=LayerKind.BLOCK, attention=attention, mlp=mlp),
                Layer(kind=LayerKind.MOE_BLOCK, attention=attention, experts=experts),
                Layer(kind=LayerKind.ATTENTION, attention=attention),
                Layer(kind=LayerKind.MLP, mlp=mlp),
                Layer(kind=LayerKind.MOE, experts=experts),
                Layer(kind=LayerKind.MAMBA, mamba=Mamba(state_dim=draw(positive), heads=draw(positive))),
            ]
        )
    )


@given(
    layers=st.lists(any_layer(), min_size=1, max_size=4),
    sizes=st.tuples(positive, positive, positive),
    dropout=st.floats(0, 1),
    tied=st.booleans(),
)
def test_round_trip_is_exact(layers: list[Layer], sizes: tuple, dropout: float, tied: bool) -> None:
    hidden_size, seq_length, vocab_size = sizes
    model = Model(
        name="any",
        hidden_size=hidden_size,
        seq_length=seq_length,
        vocab_size=vocab_size,
        layers=tuple(layers),
        hidden_dropout=dropout,
        tied_embeddings=tied,
    )
    document = yaml.safe_load(yaml.safe_dump(model_to_dict(model)))
    assert model_from_dict(document) == model
    assert model_from_dict(json.loads(json.dumps(document))).fingerprint() == model.fingerprint()


def test_written_files_are_read_back(tmp_path: Path) -> None:
    model = read_model(SHIPPED / "llama3-70b.yaml")
    write_model(model, tmp_path / "copy.yaml")
    assert read_model(tmp_path / "copy.yaml") == model


def test_kinds_of_file_are_told_apart(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        assert read_model(path).parameter_count() == 124_439_808
        assert read_model(path, seq_length=512).seq_length == 512
    own = model_to_dict(read_model(SHIPPED / "llama2-7b.yaml"))
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert read_model(tmp_path / "own.json") == read_model(SHIPPED / "llama2-7b.yaml")


def test_sequence_length_can_be_changed() -> None:
    longer = read_model(SHIPPED / "llama2-7b.yaml", seq_length=16384)
    assert (longer.seq_length, longer.max_position_embeddings) == (16384, 16384)
    assert with_seq_length(longer, 4096).seq_length == 4096
    with pytest.raises(DescriptionError, match=r"4096 tokens a sample, but 2048 learned positions"):
        read_model(SHIPPED / "gpt3-125m.yaml", seq_length=4096)
    with pytest.raises(DescriptionError, match="seq_length: 0"):
        read_model(SHIPPED / "llama2-7b.yaml", seq_length=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ({"hidden_size": 128.0}, "m.yaml.hidden_size: 128.0; valid: of type int"),
        ({"tied_embeddings": "no"}, "m.yaml.tied_embeddings: 'no'; valid: of type bool"),
        ({"layers": 3}, "m.yaml.layers: 3; valid: a list"),
        ({"layers": []}, "layers: none"),
        ({"layers": [{"kind": "blok"}]}, "did you mean 'block'?"),
        ({"layers": [{"kind": "mlp", "count": 0, "mlp": {}}]}, "m.yaml.layers[0].count: 0"),
        ({"layers": [{"kind": "mlp", "count": 10**9, "mlp": {}}]}, "valid: an integer from 1 to 100000"),
        ({"layers": [{"kind": "mlp", "mlp": {}}]}, "m.yaml.layers[0].mlp.ffn_hidden_size: missing"),
        (
            {"layers": [{"kind": "mlp", "mlp": {"ffn_hidden_size": 0}}]},
            "[0].mlp: model ffn_hidden_size: 0",
        ),
        ({"layers": [{"kind": "block", "mlp": {"ffn_hidden_size": 8}}]}, "valid: exactly ['attention', 'mlp']"),
        ({"precision": "fp8"}, "precision: 'fp8'"),
        ({"layers": [{"kind": ["mlp"]}]}, "kind: ['mlp'] is unknown; valid: attention"),
        (
            {"layers": [{"kind": "mlp", "mlp": {"ffn_hidden_size": 8, "gated": 1}}]},
            ".mlp.gated: 1; valid: of type",
        ),
        ({"hidden_size": 16**6000}, "hidden_size: an integer of 24001 bits; valid: an integer from 1 to"),
        ({"max_position_embeddings": -1}, "max_position_embeddings: -1; valid: an integer >= 0"),
        ({"hidden_dropout": float("nan")}, "hidden_dropout: nan; valid: a number from 0 to 1"),
        ({"attention_dropout": 1.5}, "attention_dropout: 1.5; valid: a number from 0 to 1"),
    ],
)
def test_bad_documents_are_refused_in_one_line(change: dict, message: str) -> None:
    document = model_to_dict(read_model(SHIPPED / "llama2-7b.yaml")) | change
    with pytest.raises(DescriptionError) as caught:
        model_from_dict(document, "m.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("m.yaml")
    assert str(caught.value).count("m.yaml") == 1
    assert "valid: " in str(caught.value)


def test_missing_field_is_named() -> None:
    document = model_to_dict(read_model(SHIPPED / "llama2-7b.yaml"))
    del document["hidden_size"]
    with pytest.raises(DescriptionError, match=r"m.yaml.hidden_size: missing"):
        model_from_dict(document, "m.yaml")
