"""Plans whose layers differ train exactly as one rank of stock Megatron does, through Megatron's pretrain."""

import os
from itertools import product

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from runtime_cases import (
    CLIP,
    CONTEXT,
    FEATURES,
    FEWER,
    HALF,
    LATENT_PLANS,
    LAYOUTS,
    MAMBA_PLANS,
    MIXED,
    MIXTURES,
    STEPS,
    case,
    changes,
    pair_cases,
)
from runtime_rank import assert_same_training, expected_of, references, relative, train, weight_difference

from galvatron_megatron.describe.model import Layer, Mamba
from galvatron_megatron.plan.layer_kind import LayerKind

pytestmark = pytest.mark.distributed
RANDOM_PLANS = int(os.environ.get("GALVATRON_RANDOM_PLANS", "25"))


def test_the_reference_learns(ranks):
    for model, seen in references(ranks).items():
        assert min(seen["losses"][:STEPS]) < 0.95 * seen["losses"][0] or model == "fp16", model
        assert not seen["planned"]
        if model != "fp16":
            assert min(seen["norms"]) > CLIP, "clipping must be active"


def test_mamba_has_the_parameters_of_its_description(ranks):
    weights = references(ranks)["mamba"]["weights"]
    built = sum(weight.size for name, weight in weights.items() if name.startswith("decoder.layers.0."))
    described = Layer(kind=LayerKind.MAMBA, mamba=Mamba(state_dim=4, head_dim=8, groups=4))
    assert built == described.parameter_count(32, "RMSNorm")


def test_the_plans_change_between_all_pairs_of_layouts():
    assert changes(pair_cases()) >= {(a, b) for a, b in product(LAYOUTS, LAYOUTS) if a != b}


@pytest.mark.parametrize(
    "made",
    [*pair_cases(), *FEATURES, *MIXTURES, *CONTEXT, *LATENT_PLANS, *MAMBA_PLANS],
    ids=lambda made: made["name"],
)
def test_same_training(ranks, made):
    expected = expected_of(ranks, made)
    seen = ranks(4).run(train, made)[0]
    assert seen["planned"]
    assert_same_training(seen, expected)


@pytest.mark.parametrize("made", HALF, ids=lambda made: made["name"])
def test_half_precision_within_its_noise(ranks, made):
    expected = expected_of(ranks, made)
    exact = expected_of(ranks, {**made, "model": "modern"})
    seen = ranks(4).run(train, made)[0]
    assert seen["skipped"] == expected["skipped"]
    assert seen["copies_differ"] == 0.0
    kept = [step for step, skipped in enumerate(seen["skipped"]) if not skipped]
    norms = [seen["norms"][step] for step in kept]
    # One rank in this precision is itself this far from fp32; a plan may be as far from that rank.
    noise = 3e-3 if made["model"] == "bf16" else 1e-3
    if made["model"] == "bf16":
        assert relative(expected["losses"], exact["losses"]) < noise
    assert relative(seen["losses"], expected["losses"]) < noise
    assert relative(norms, [expected["norms"][step] for step in kept]) < 10 * noise
    assert weight_difference(seen["weights"], expected["weights"]) < 3 * noise


def test_fp16_skips_the_steps_that_overflow(ranks):
    skipped = references(ranks)["fp16"]["skipped"]
    assert 0 < sum(skipped) < len(skipped)


WORDS = st.tuples(
    st.sampled_from((*LAYOUTS, "tp2+ulysses", "tp4+ulysses")),
    st.sampled_from(("", " zero1")),
    st.sampled_from(("", "", " recompute-full", " recompute-selective")),
).map("".join)
BASES = st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(("", " zero1"))).map("".join)


@settings(
    max_examples=RANDOM_PLANS,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    base=BASES,
    layers=st.lists(WORDS, min_size=4, max_size=4),
    model=st.sampled_from(("modern", "classic", "grouped")),
    split=st.sampled_from((0, 0, 1, 2, 3)),
)
def test_random_plans(ranks, base, layers, model, split):
    stages = [layers]
    options = {}
    if split:  # two pipeline stages of two ranks each
        base, layers = base.replace("tp4", "tp2"), [words.replace("tp4", "tp2") for words in layers]
        stages, options = [layers[:split], layers[split:]], {"pp": 2}
    made = case("random", model, base, *stages, **options, arguments={"train-iters": FEWER})
    seen = ranks(4).run(train, made)[0]
    assert_same_training(seen, expected_of(ranks, made))


@pytest.mark.parametrize(
    "mistake",
    ["gradient_scale", "skipped_layernorm_sum", "stale_resharding", "dropped_gradient", "replicas_counted"],
)
def test_a_mistake_is_noticed(ranks, mistake):
    made = case("mistaken", "modern", "tp1", MIXED, arguments={"train-iters": FEWER}, mutation=mistake)
    expected = expected_of(ranks, made)
    seen = ranks(4).run(train, made)[0]
    with pytest.raises(AssertionError):
        assert_same_training(seen, expected)


def test_communicators_beside_megatrons_are_noticed(ranks):
    """In stages of two ranks Megatron has every set that a plan can need."""
    stages = (["tp2+ulysses", "tp2"], ["tp2", "tp2+megatron"])
    made = case("own-groups", "modern", "tp2", *stages, pp=2, arguments={"train-iters": FEWER})
    seen = ranks(4).run(train, made)[0]
    assert_same_training(seen, expected_of(ranks, made))
    assert seen["created"] == 0
    made["arguments"]["train-iters"] = 1
    mistaken = ranks(4).run(train, {**made, "mutation": "unknown_groups"})[0]
    assert (0, 1) in mistaken["created_again"] and (0,) in mistaken["created_again"]


def test_losses_of_routers_that_are_not_scaled_are_noticed(ranks):
    layers = ["tp2", "tp2+megatron", "tp4+megatron", "tp1"]
    made = case(
        "unbalanced", "experts", "tp1", layers, arguments={"train-iters": FEWER}, mutation="unscaled_balance"
    )
    expected = expected_of(ranks, made)
    seen = ranks(4).run(train, made)[0]
    with pytest.raises(AssertionError):
        assert_same_training(seen, expected)


DROPOUT = {"hidden-dropout": 0.1, "attention-dropout": 0.1, "train-iters": FEWER}


@pytest.mark.parametrize("base", ["tp1", "tp2", "tp4+megatron"])
def test_dropout_is_megatrons_where_the_layouts_are(ranks, base):
    """Layers that differ in sharding and recomputation alone draw the same numbers as stock Megatron's."""
    layers = [f"{base} zero1", base, f"{base} recompute-full", f"{base} recompute-selective"]
    stock, mixed = (
        ranks(4).run(train, case("dropped", "classic", base, words, arguments=DROPOUT, **options))[0]
        for words, options in (([base] * 4, {"detached": True}), (layers, {}))
    )
    assert mixed["planned"]
    assert not stock["planned"]
    assert relative(mixed["losses"], stock["losses"]) < 1e-5
    assert relative(mixed["norms"], stock["norms"]) < 1e-5
    assert weight_difference(mixed["weights"], stock["weights"]) < 1e-5
    assert relative(stock["losses"], references(ranks)["classic"]["losses"][:FEWER]) > 1e-4


def test_a_uniform_plan_changes_no_bit(ranks):
    stock, attached = (
        ranks(4).run(
            train,
            case(
                "uniform",
                "modern",
                "tp2 zero1",
                ["tp2 zero1"] * 4,
                arguments={"train-iters": FEWER},
                detached=detached,
            ),
        )[0]
        for detached in (True, False)
    )
    assert attached["losses"] == stock["losses"]
    assert attached["norms"] == stock["norms"]
    assert all((attached["weights"][name] == value).all() for name, value in stock["weights"].items())


@pytest.mark.parametrize("words", ["tp2+megatron", "tp4", "tp2+ulysses"])
def test_dropout_is_repeated_by_recomputation(ranks, words):
    arguments = {"hidden-dropout": 0.1, "attention-dropout": 0.1, "train-iters": FEWER}
    runs = [
        ranks(4).run(
            train, case("dropout", "modern", "tp2", [words + recompute, "tp1"] * 2, arguments=arguments)
        )[0]
        for recompute in ("", " recompute-full", " recompute-selective")
    ]
    for run in runs[1:]:
        assert relative(run["losses"], runs[0]["losses"]) < 1e-6
        assert relative(run["norms"], runs[0]["norms"]) < 1e-6
    assert all(run["copies_differ"] == 0.0 for run in runs)
    assert relative(runs[0]["losses"], references(ranks)["modern"]["losses"][:FEWER]) > 1e-4
