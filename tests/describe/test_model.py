from dataclasses import replace

import pytest

from galvatron_megatron.describe.model import Attention, Experts, Layer, Mamba, Mlp, Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.layer_kind import LayerKind

ATTENTION = Attention(heads=8, query_groups=4, head_dim=16)
BLOCK = Layer(kind=LayerKind.BLOCK, attention=ATTENTION, mlp=Mlp(ffn_hidden_size=512))
MODEL = Model(name="small", hidden_size=128, seq_length=64, vocab_size=1000, layers=(BLOCK,) * 4)


def test_runs_of_equal_layers() -> None:
    other = replace(BLOCK, mlp=Mlp(ffn_hidden_size=256))
    model = replace(MODEL, layers=(BLOCK, replace(BLOCK), other, BLOCK))
    assert model.layer_runs() == ((BLOCK, 2), (other, 1), (BLOCK, 1))


def test_fingerprint_changes_with_everything_but_the_name() -> None:
    assert replace(MODEL, name="renamed").fingerprint() == MODEL.fingerprint()
    changes = {"hidden_size": 256, "seq_length": 65, "precision": "fp32", "tied_embeddings": False}
    others = [replace(MODEL, **{name: value}).fingerprint() for name, value in changes.items()]
    assert len({MODEL.fingerprint(), *others}) == 1 + len(changes)


def test_vocabulary_is_padded_for_the_tensor_parallel_degree() -> None:
    assert [MODEL.padded_vocab_size(tp) for tp in (1, 2, 8)] == [1024, 1024, 1024]
    assert MODEL.padded_vocab_size(16) == 2048
    padding = MODEL.parameter_count(tp=16) - MODEL.parameter_count()
    assert padding == (2048 - 1000) * 128
    untied = replace(MODEL, tied_embeddings=False)
    assert untied.parameter_count(tp=16) - MODEL.parameter_count(tp=16) == 2048 * 128


def test_parameters_of_mamba_are_those_of_a_published_model() -> None:
    # state-spaces/mamba2-130m: 24 layers of width 768, vocabulary padded to 50288, tied embeddings.
    mixer = Mamba(state_dim=128, head_dim=64, groups=1)
    model = Model(
        name="mamba2-130m",
        hidden_size=768,
        seq_length=2048,
        vocab_size=50288,
        layers=(Layer(kind=LayerKind.MAMBA, mamba=mixer),) * 24,
        normalization="RMSNorm",
        position_embedding="none",
    )
    assert model.parameter_count() == 128_989_632


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(MODEL, hidden_size=0), "hidden_size: 0"),
        (lambda: replace(MODEL, layers=()), "layers: none"),
        (lambda: replace(MODEL, precision="int8"), "precision: 'int8' is unknown"),
        (lambda: replace(MODEL, normalization="RmsNorm"), "did you mean 'RMSNorm'"),
        (lambda: replace(MODEL, position_embedding="alibi"), "position_embedding: 'alibi'"),
        (lambda: replace(ATTENTION, query_groups=3), "query_groups: 3 does not divide the 8"),
        (lambda: Mlp(ffn_hidden_size=True), "ffn_hidden_size: True"),
        (lambda: Experts(count=2, top_k=3, ffn_hidden_size=4), "top_k: 3 is more than the 2"),
        (lambda: Mamba(state_dim=0), "state_dim: 0"),
        (lambda: Layer(kind=LayerKind.MLP, attention=ATTENTION), "valid: exactly ['mlp']"),
        (lambda: Layer(kind=LayerKind.BLOCK, attention=ATTENTION), "valid: exactly ['attention', 'mlp']"),
    ],
)
def test_bad_values_are_named(make, message: str) -> None:
    with pytest.raises(DescriptionError) as caught:
        make()
    assert message in str(caught.value)
