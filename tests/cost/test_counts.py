"""Closed-form counts against published formulas and against each other; no torch needed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.cost.counts import LayerCounts, embedding_counts, head_counts, layer_counts
from galvatron_megatron.cost.counts_values import Collective, Operator, gemm
from galvatron_megatron.describe.model import Attention, Experts, Layer, Mamba, Mlp, Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

HIDDEN, SEQ, HEADS = 1024, 512, 16
BLOCK = Layer(
    kind=LayerKind.BLOCK,
    attention=Attention(heads=HEADS, query_groups=HEADS, head_dim=64, qkv_bias=True, output_bias=True),
    mlp=Mlp(ffn_hidden_size=4 * HIDDEN, bias=True),
)
GROUPED = Layer(
    kind=LayerKind.BLOCK,
    attention=Attention(heads=HEADS, query_groups=8, head_dim=64),
    mlp=Mlp(ffn_hidden_size=2816, gated=True),
)
EXPERTS = Layer(
    kind=LayerKind.MOE_BLOCK,
    attention=GROUPED.attention,
    experts=Experts(count=8, top_k=2, ffn_hidden_size=1024, shared_ffn_hidden_size=512),
)
LATENT = Layer(
    kind=LayerKind.BLOCK,
    attention=Attention(
        heads=HEADS,
        query_groups=HEADS,
        head_dim=96,
        qk_layernorm=True,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
    ),
    mlp=GROUPED.mlp,
)
MAMBA = Layer(kind=LayerKind.MAMBA, mamba=Mamba(state_dim=64, groups=8))
LAYERS = {"block": BLOCK, "grouped": GROUPED, "experts": EXPERTS, "latent": LATENT, "mamba": MAMBA}
MEGATRON, ULYSSES = SequenceParallel.MEGATRON, SequenceParallel.ULYSSES


def model(layer: Layer = BLOCK, **changes: object) -> Model:
    values: dict[str, object] = {
        "name": "test",
        "hidden_size": HIDDEN,
        "seq_length": SEQ,
        "vocab_size": 50000,
        "layers": (layer,),
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    }
    return Model(**values | changes)


def split_bytes(counts: LayerCounts) -> int:
    """Kept bytes without the tokens of experts, which every rank of a tp group has whole."""
    return counts.activation_bytes - dict(counts.activation_terms).get("permuted tokens", 0)


def per_token_and_feature(counts: LayerCounts, samples: int) -> float:
    return counts.activation_bytes / (samples * SEQ * HIDDEN)


@pytest.mark.parametrize(
    ("strategy", "published"),
    [
        # arXiv 2205.05198, table 2, in units of s b h bytes; a = heads, s / h = SEQ / HIDDEN.
        (Strategy(), 34 + 5 * HEADS * SEQ / HIDDEN),
        (Strategy(tp=4), 10 + 24 / 4 + 5 * HEADS * SEQ / HIDDEN / 4),
        (Strategy(tp=4, sequence_parallel=MEGATRON), 34 / 4 + 5 * HEADS * SEQ / HIDDEN / 4),
        (Strategy(tp=4, recompute=Recompute.SELECTIVE), 10 + 24 / 4),
        (Strategy(tp=4, sequence_parallel=MEGATRON, recompute=Recompute.SELECTIVE), 34 / 4),
        (Strategy(tp=4, recompute=Recompute.FULL), 2),
    ],
    ids=str,
)
def test_activations_of_a_block_are_the_published_ones(strategy: Strategy, published: float) -> None:
    """The paper leaves out what is small against s b h: the statistics of the norms, 16 bytes a token."""
    counts = layer_counts(model(fused_attention=False), BLOCK, strategy, 3)
    assert per_token_and_feature(counts, 3) == pytest.approx(published, abs=16.1 / HIDDEN)
    assert per_token_and_feature(counts, 3) >= published


def test_flops_of_a_block_are_the_published_ones() -> None:
    """arXiv 2104.04473, appendix: forward 24 b s h^2 + 4 b s^2 h, three times that with the backward pass."""
    counts = layer_counts(model(fused_attention=False), BLOCK, Strategy(), 2)
    forward = 24 * 2 * SEQ * HIDDEN**2 + 4 * 2 * SEQ**2 * HIDDEN
    assert counts.flops("forward") == forward
    assert counts.flops() == 3 * forward
    full = layer_counts(model(fused_attention=False), BLOCK, Strategy(recompute=Recompute.FULL), 2)
    assert full.flops() == 4 * forward
    # A fused kernel computes the scores once more in its backward pass.
    fused = layer_counts(model(), BLOCK, Strategy(), 2)
    assert fused.flops() == 3 * forward + 2 * 2 * SEQ**2 * HIDDEN


def test_softmax_of_scores_that_fill_no_block_runs_as_operators() -> None:
    """``FusedScaleMaskSoftmax.is_kernel_available``: samples x heads of a rank must be a multiple of four."""
    described = model(fused_attention=False)
    filled, unfilled = (layer_counts(described, BLOCK, Strategy(tp=HEADS // 2), samples) for samples in (2, 1))
    added = {operator.name for operator in unfilled.operators} - {
        operator.name for operator in filled.operators
    }
    assert added == {
        "attention scores to fp32",
        "attention scale",
        "attention mask",
        "attention probabilities to 16 bit",
    }
    scores = 2 * SEQ**2
    kept = dict(unfilled.activation_terms)["attention probabilities"]
    assert kept == 4 * scores
    assert dict(filled.activation_terms)["attention probabilities"] == 2 * 2 * scores
    moved = sum(operator.bytes for operator in unfilled.operators if operator.name in added)
    assert moved == 2 * (6 + 8 + 8 + 6) * scores
    full = layer_counts(described, BLOCK, Strategy(tp=HEADS // 2, recompute=Recompute.FULL), 1)
    assert {"attention scale"} <= {
        operator.name for operator in full.operators if operator.phase == "recompute"
    }
    single = layer_counts(replace(described, precision="fp32"), BLOCK, Strategy(tp=HEADS // 2), 1)
    assert not added & {operator.name for operator in single.operators}


def test_parameters_of_a_block_are_the_known_ones() -> None:
    counts = layer_counts(model(), BLOCK, Strategy(), 1)
    assert counts.parameters == 12 * HIDDEN**2 + 13 * HIDDEN
    assert counts.parameter_tensors == 12
    ends = [embedding_counts(model(), Strategy(tp=2), 1), head_counts(model(), Strategy(tp=2), 1)]
    padded = model().padded_vocab_size(2)
    assert [end.parameters_sharded for end in ends] == [padded * HIDDEN // 2] * 2
    assert [end.parameters_replicated for end in ends] == [SEQ * HIDDEN, 2 * HIDDEN]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_parameters_are_those_of_the_description(name: str, normalization: str) -> None:
    layer = LAYERS[name]
    counts = layer_counts(model(layer, normalization=normalization), layer, Strategy(), 1)
    assert counts.parameters == layer.parameter_count(HIDDEN, normalization)


def test_mamba_runs_over_the_whole_sequence() -> None:
    for strategy in (Strategy(cp=2), Strategy(tp=2, sequence_parallel=ULYSSES)):
        with pytest.raises(DescriptionError, match="whole sequence"):
            layer_counts(model(MAMBA), MAMBA, strategy, 1)


def test_flops_of_a_scan_are_the_published_ones() -> None:
    """arXiv 2405.21060, section 6: a chunk of Q tokens takes BMM(Q, Q, N) a group, BMM(Q, P, Q) and two
    BMM(N, P, Q) a head. The backward pass computes them again before their two gradients."""
    samples, chunk, part = 3, 128, MAMBA.mamba
    heads, inner = part.head_count(HIDDEN), part.inner_size(HIDDEN)
    state, width = part.state_dim, part.head_dim
    scan = 2 * samples * SEQ * (chunk * state * part.groups + heads * width * (chunk + 2 * state))
    projected = 2 * inner + 2 * part.groups * state + heads
    linear = 2 * samples * SEQ * HIDDEN * (projected + inner)
    counts = layer_counts(model(MAMBA), MAMBA, Strategy(), samples)
    assert counts.flops("forward") == linear + scan
    assert counts.flops() == 3 * linear + 4 * scan


def test_logits_are_kept_in_fp32() -> None:
    counts = head_counts(model(), Strategy(tp=2), 2)
    assert (
        dict(counts.activation_terms)["softmax of the logits"]
        == 4 * 2 * SEQ * model().padded_vocab_size(2) // 2
    )


@pytest.mark.parametrize("implementation", ["transformer_engine", "local"])
@pytest.mark.parametrize("name", LAYERS)
@given(tp=st.sampled_from((2, 4, 8)), samples=st.integers(1, 3), recompute=st.sampled_from(Recompute))
def test_tensor_parallelism_splits_the_work(
    name: str, implementation: str, tp: int, samples: int, recompute: Recompute
) -> None:
    """tp ranks together do the work of one; sequence parallelism leaves no large tensor whole."""
    layer = LAYERS[name]
    one = layer_counts(model(layer), layer, Strategy(recompute=recompute), samples, implementation)
    sliced = Strategy(tp=tp, sequence_parallel=MEGATRON, recompute=recompute)
    counts = layer_counts(model(layer), layer, sliced, samples, implementation)
    split = counts.parameters_sharded + counts.parameters_expert
    assert split * tp + counts.parameters_replicated == pytest.approx(one.parameters, rel=1e-9)
    assert counts.flops() * tp == pytest.approx(one.flops(), rel=1e-9)
    assert split_bytes(counts) * tp == pytest.approx(split_bytes(one), rel=0.2)
    plain = layer_counts(model(layer), layer, replace(sliced, sequence_parallel=SequenceParallel.NONE), samples)
    assert plain.activation_bytes > counts.activation_bytes or implementation == "local"


@given(tp=st.sampled_from((2, 4, 8)), samples=st.integers(1, 3))
def test_ulysses_splits_activations_like_megatron_and_weights_not_at_all(tp: int, samples: int) -> None:
    ulysses = layer_counts(model(), BLOCK, Strategy(tp=tp, sequence_parallel=ULYSSES), samples)
    megatron = layer_counts(model(), BLOCK, Strategy(tp=tp, sequence_parallel=MEGATRON), samples)
    one = layer_counts(model(), BLOCK, Strategy(), samples)
    assert ulysses.activation_bytes == megatron.activation_bytes
    assert ulysses.parameters == one.parameters
    assert ulysses.flops() * tp == one.flops()
    kinds = {(c.kind, c.phase) for c in ulysses.collectives}
    assert kinds == {("all_to_all", "forward"), ("all_to_all", "backward")}
    moved = sum(c.bytes * c.count for c in ulysses.collectives if c.phase == "forward")
    assert moved == 4 * samples * SEQ * HIDDEN * 2 // tp  # query, key, value and output of this rank's slice


@given(cp=st.sampled_from((2, 4)), name=st.sampled_from(("block", "grouped", "latent")))
def test_context_parallelism_splits_tokens_and_passes_keys_round(cp: int, name: str) -> None:
    layer = LAYERS[name]
    one = layer_counts(model(layer), layer, Strategy(), 2)
    split = layer_counts(model(layer), layer, Strategy(cp=cp), 2)
    assert split.parameters == one.parameters
    assert split.flops() * cp == one.flops()
    assert split.activation_bytes * cp == one.activation_bytes
    assert {c.group for c in split.collectives} == {"cp"}
    assert [c.count for c in split.collectives] == [cp - 1] * 2


@given(
    name=st.sampled_from(sorted(LAYERS)),
    tp=st.sampled_from((1, 2, 4)),
    recompute=st.sampled_from(Recompute),
    fused=st.booleans(),
)
def test_recomputation_trades_bytes_for_flops(name: str, tp: int, recompute: Recompute, fused: bool) -> None:
    layer = LAYERS[name]
    described = model(layer, fused_attention=fused)
    plain = layer_counts(described, layer, Strategy(tp=tp), 2)
    counts = layer_counts(described, layer, Strategy(tp=tp, recompute=recompute), 2)
    assert counts.activation_bytes <= plain.activation_bytes
    assert counts.flops() >= plain.flops()
    assert counts.flops("forward") == plain.flops("forward")
    assert counts.parameters == plain.parameters
    repeats = recompute is Recompute.FULL or (recompute is Recompute.SELECTIVE and layer.attention is not None)
    assert (counts.flops("recompute") > 0) == repeats
    again = [c for c in counts.collectives if c.phase == "recompute"]
    assert len(again) == (
        sum(c.phase == "forward" for c in plain.collectives) if recompute is Recompute.FULL else 0
    )


@pytest.mark.parametrize("name", LAYERS)
def test_counts_survive_json(name: str) -> None:
    counts = layer_counts(model(LAYERS[name]), LAYERS[name], Strategy(tp=2, sequence_parallel=MEGATRON), 1)
    assert LayerCounts.from_json(counts.to_json()) == counts


def test_damaged_json_is_named() -> None:
    content = layer_counts(model(), BLOCK, Strategy(), 1).to_json()
    for damaged in (content | {"extra": 1}, content | {"operators": [[1]]}, {}):
        with pytest.raises(DescriptionError, match="layer counts"):
            LayerCounts.from_json(damaged)


def test_bad_requests_are_named() -> None:
    with pytest.raises(DescriptionError, match="attention heads: 16 is not divisible by the tp degree 3"):
        layer_counts(model(), BLOCK, Strategy(tp=3), 1)
    with pytest.raises(DescriptionError, match="seq_length: 512 is not divisible by 3"):
        layer_counts(model(), BLOCK, Strategy(cp=3), 1)
    with pytest.raises(DescriptionError, match="valid: transformer_engine, local"):
        layer_counts(model(), BLOCK, Strategy(), 1, "eager")
    with pytest.raises(DescriptionError, match="samples: 0"):
        layer_counts(model(), BLOCK, Strategy(), 0)
    with pytest.raises(DescriptionError, match="kind: 'gossip' is unknown; valid: all_reduce"):
        Collective(kind="gossip", group="tp", phase="forward", bytes=1)
    with pytest.raises(DescriptionError, match="shape: \\(1, 2\\); valid: 4 entries"):
        Operator(name="x", kind="gemm", phase="forward", flops=1, bytes=1, shape=(1, 2))
    assert gemm("x", "forward", 2, 3, 4, 5, element_bytes=2).bytes == 2 * 2 * (15 + 20 + 12)


@given(
    ep=st.sampled_from((1, 2, 4, 8)),
    tp=st.sampled_from((1, 2)),
    dispatcher=st.sampled_from(("allgather", "alltoall", "flex")),
)
def test_expert_parallelism_shares_out_experts_and_keeps_the_work(ep: int, tp: int, dispatcher: str) -> None:
    layer = replace(EXPERTS, experts=replace(EXPERTS.experts, dispatcher=dispatcher))
    kind = MEGATRON if tp > 1 else SequenceParallel.NONE
    alone = layer_counts(model(layer), layer, Strategy(tp=tp, dp=8, sequence_parallel=kind), 1)
    shared = Strategy(tp=tp, dp=8, sequence_parallel=kind, expert_parallel=ep)
    counts = layer_counts(model(layer), layer, shared, 1)
    assert counts.parameters_expert * ep == alone.parameters_expert > 0
    assert counts.parameters - counts.parameters_expert == alone.parameters - alone.parameters_expert
    # A rank computes as many tokens: it sends away as many as it gets.
    assert counts.flops() == alone.flops()
    assert dict(counts.activation_terms)["permuted tokens"] == dict(alone.activation_terms)["permuted tokens"]
    moved = {(c.kind, c.group) for c in counts.collectives if c.group in ("ep", "etp", "etp_ep")}
    if dispatcher == "allgather":
        both = {("all_gather", "etp_ep"), ("reduce_scatter", "etp_ep")}
        assert moved == (both if tp * ep > 1 else set())
    else:
        split = {("all_gather", "etp"), ("reduce_scatter", "etp")} if tp > 1 else set()
        assert moved == split | ({("all_to_all", "ep")} if ep > 1 else set())
        tokens = SEQ // tp * EXPERTS.experts.top_k * HIDDEN * 2
        sent = sum(c.bytes * c.count for c in counts.collectives if (c.group, c.phase) == ("ep", "forward"))
        assert sent == (2 * tokens + tokens // HIDDEN if ep > 1 else 0)


def test_experts_are_cut_whole_or_like_the_rest() -> None:
    whole = Strategy(tp=2, dp=4, sequence_parallel=MEGATRON, expert_parallel=8, expert_tensor_parallel=1)
    counts = layer_counts(model(EXPERTS), EXPERTS, whole, 1)
    assert counts.parameters_expert == 3 * EXPERTS.experts.ffn_hidden_size * HIDDEN
    assert {c.group for c in counts.collectives} == {"tp", "ep"}
    with pytest.raises(DescriptionError, match="8 are not divisible by expert_parallel 3"):
        layer_counts(model(EXPERTS), EXPERTS, Strategy(dp=3, expert_parallel=3), 1)
    with pytest.raises(DescriptionError, match="expert ffn_hidden_size: 1024 is not divisible"):
        layer_counts(model(EXPERTS), EXPERTS, Strategy(dp=3, expert_tensor_parallel=3), 1)
