"""Models and constraints from command lines, held against Megatron's own parser and models."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from galvatron_megatron.describe.layer_pattern import (
    hybrid_pattern,
    layer_frequency,
    layout_stage_layers,
    moe_layers,
)
from galvatron_megatron.describe.megatron_args import (
    model_from_arguments,
    parse_command_line,
    plan_constraints,
    read_command_line,
)
from galvatron_megatron.describe.megatron_flags import FLAGS
from galvatron_megatron.errors import DescriptionError, GalvatronError, PlanError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.megatron_arguments import command_line, runs_on_stock_megatron
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

SIZES = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 64 "
    "--vocab-size 300 --micro-batch-size 1 --tokenizer-type NullTokenizer --lr 1e-4 --train-iters 9 --mock-data"
)
CPU = (
    "--transformer-impl local --attention-backend unfused --no-masked-softmax-fusion --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-rope-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion "
    "--no-bias-dropout-fusion"
)
LATENT = (
    "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 24 "
    "--position-embedding-type rope"
)
FEATURES = {
    "plain": "",
    "llama": "--swiglu --disable-bias-linear --group-query-attention --num-query-groups 2 --bf16 "
    "--normalization RMSNorm --untie-embeddings-and-output-weights --position-embedding-type rope",
    "qk norm": "--qk-layernorm --kv-channels 24 --add-qkv-bias --disable-bias-linear",
    "rotary flag": "--use-rotary-position-embeddings --quick-geglu --ffn-hidden-size 96 --fp16",
    "latent": LATENT,
    "latent queries": f"{LATENT} --q-lora-rank 20 --qk-layernorm --disable-bias-linear",
    "experts": "--num-experts 4",
    "mixed experts": "--num-experts 4 --moe-layer-freq ([0]+[1]*3) --moe-router-topk 3 "
    "--moe-ffn-hidden-size 48 --swiglu --moe-shared-expert-intermediate-size 40 --moe-shared-expert-gate "
    "--disable-bias-linear",
    "sparse experts": "--num-experts 2 --moe-layer-freq 2 --squared-relu",
    "no experts": "--num-experts 0",
}
JOBS = {
    "tp": ("--tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 64", 4),
    "pp": ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*3|tL", 2),
    "recompute": ("--recompute-activations --use-distributed-optimizer --global-batch-size 8", 2),
    "hybrid": ("--hybrid-layer-pattern M*-|E-* --num-experts 4 --pipeline-model-parallel-size 2", 2),
    "hybrid latent": (f"--hybrid-layer-pattern +-+- {LATENT}", 1),
}
FREQUENCIES = ["3", "([0]+[1]*23)", "([1]*3+[0]*1)*3", "[1,0,1]", "2*[0,1]"]
LAYOUTS = ["EttL", "Et*3|(tt|)*3,tL", "E,t|t*12|ttL", "Et|(t|t)*2|t*2,L"]
PATTERNS = ["*-*-", "M*-|E-*|MM", "+-+-|+-"]

PLANS = {
    "uniform": (Strategy(tp=2, dp=2, zero=1), (4,), {}),
    "uneven": (Strategy(tp=2, dp=2, sequence_parallel=SequenceParallel.MEGATRON), (3, 1), {}),
    "interleaved": (Strategy(dp=2, recompute=Recompute.FULL), (1, 1, 1, 1), {"pp": 2, "virtual_stages": 2}),
    "uneven interleaved": (Strategy(cp=2), (1, 2, 1, 1), {"pp": 2, "virtual_stages": 2}),
    "selective": (Strategy(dp=2, recompute=Recompute.SELECTIVE), (2, 2), {}),
    "experts": (Strategy(dp=4, expert_parallel=2), (2, 2), {}),
    "whole experts": (
        Strategy(
            tp=2,
            dp=2,
            sequence_parallel=SequenceParallel.MEGATRON,
            expert_parallel=4,
            expert_tensor_parallel=1,
        ),
        (1, 3),
        {},
    ),
}


def plan_named(name: str) -> Plan:
    strategy, counts, settings = PLANS[name]
    kind = LayerKind.MOE_BLOCK if name.endswith("experts") else LayerKind.BLOCK
    stages = tuple(StagePlan(layers=(LayerPlan(kind=kind, strategy=strategy),) * count) for count in counts)
    base = replace(strategy.without_experts, recompute=Recompute.NONE)
    values = {"pp": len(counts), "micro_batch_size": 2, "micro_batches": 4} | settings
    return Plan(base=base, stages=stages, **values)


def words(*parts: str) -> list[str]:
    return " ".join(parts).split()


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What Megatron says to everything these tests ask, from one process."""
    request = {
        "command_lines": [words(SIZES, feature) for feature in FEATURES.values()],
        "jobs": [[words(SIZES, feature), 1] for feature in FEATURES.values()]
        + [[words(SIZES, flags), world_size] for flags, world_size in JOBS.values()],
        "frequencies": FREQUENCIES,
        "layouts": LAYOUTS,
        "patterns": PATTERNS,
        "pipelines": [
            [
                [
                    *words(SIZES, CPU, FEATURES["experts"] if plan.expert_degrees else ""),
                    *("--num-layers", str(len(plan.layers)), *command_line(plan)),
                ],
                plan.world_size,
            ]
            for plan in map(plan_named, PLANS)
        ],
        "models": [words(SIZES, CPU, feature) for feature in FEATURES.values()],
    }
    folder = tmp_path_factory.mktemp("megatron")
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("megatron_reference.py")
    done = subprocess.run(
        [sys.executable, script, folder / "request.json", folder / "answer.json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "answer.json").read_text())


def test_every_row_of_the_table_is_megatrons(megatron: dict) -> None:
    for flag in FLAGS:
        for name in flag.names:
            theirs = megatron["flags"][name]
            assert theirs["dest"] == flag.dest
            assert theirs["default"] == flag.resting_value, name
            assert theirs["nargs"] == (0 if flag.kind in ("on", "off") else flag.nargs), name
            if flag.choices is not None:
                assert tuple(theirs["choices"]) == flag.choices
            special = {"--moe-layer-freq": "moe_freq_type", "--attention-backend": "enum_type_handler"}
            assert theirs["kind"] == special.get(name, flag.kind), name


def test_the_table_has_every_spelling_of_its_flags(megatron: dict) -> None:
    known = {name for flag in FLAGS for name in flag.names}
    dests = {flag.dest for flag in FLAGS}
    assert {name for name, theirs in megatron["flags"].items() if theirs["dest"] in dests} == known


@pytest.mark.parametrize("feature", FEATURES)
def test_parses_as_megatron_does(megatron: dict, feature: str) -> None:
    theirs = megatron["parsed"][list(FEATURES).index(feature)]
    ours = parse_command_line(words(SIZES, FEATURES[feature]))
    assert ours == {dest: theirs[dest] for dest in ours}


@pytest.mark.parametrize("feature", FEATURES)
def test_model_is_the_same_before_and_after_megatrons_validation(megatron: dict, feature: str) -> None:
    validated = megatron["validated"][list(FEATURES).index(feature)]
    before = model_from_arguments(parse_command_line(words(SIZES, FEATURES[feature])))
    assert model_from_arguments(validated) == before


@pytest.mark.parametrize("job", JOBS)
def test_model_does_not_depend_on_parallelism(megatron: dict, job: str) -> None:
    validated = megatron["validated"][len(FEATURES) + list(JOBS).index(job)]
    before = model_from_arguments(parse_command_line(words(SIZES, JOBS[job][0])))
    # Megatron's tokenizer pads the vocabulary for the degree at hand and leaves the size in the namespace.
    multiple = validated["make_vocab_size_divisible_by"] * validated["tensor_model_parallel_size"]
    validated["padded_vocab_size"] = -(-300 // multiple) * multiple
    assert model_from_arguments(validated) == before
    assert len(before.layers) == validated["num_layers"]


@pytest.mark.parametrize("feature", FEATURES)
def test_parameters_are_those_of_megatrons_model(megatron: dict, feature: str) -> None:
    model = model_from_arguments(parse_command_line(words(SIZES, CPU, FEATURES[feature])))
    assert model.parameter_count(tp=1) == megatron["parameters"][list(FEATURES).index(feature)]


def test_notations_are_megatrons(megatron: dict) -> None:
    assert [layer_frequency(text) for text in FREQUENCIES] == megatron["frequencies"]
    counts = [[stage.count("decoder") for stage in layout] for layout in megatron["layouts"]]
    assert [list(layout_stage_layers(layout)) for layout in LAYOUTS] == counts
    parsed = [hybrid_pattern(pattern) for pattern in PATTERNS]
    assert [[len(p.symbols), len(p.segment_layers)] for p in parsed] == megatron["patterns"]


@pytest.mark.parametrize("name", PLANS)
def test_megatron_understands_the_arguments_of_a_plan(megatron: dict, name: str) -> None:
    plan = plan_named(name)
    theirs = megatron["pipelines"][list(PLANS).index(name)]
    assert runs_on_stock_megatron(plan)
    assert (theirs["dp"], theirs["virtual_stages"]) == (plan.base.dp, plan.virtual_stages)
    assert theirs["micro_batches"] == plan.micro_batches
    assert theirs["distributed_optimizer"] == (plan.base.zero == 1)
    assert theirs["sequence_parallel"] == (plan.base.sequence_parallel is SequenceParallel.MEGATRON)
    assert theirs["experts"] == [
        max(layer.strategy.expert_parallel for layer in plan.layers),
        plan.layers[0].strategy.expert_shards,
    ]
    recompute = {Recompute.FULL: "full", Recompute.SELECTIVE: "selective"}
    assert theirs["recompute"][0] == recompute.get(plan.layers[0].strategy.recompute)
    counts = [len(stage.layers) for stage in plan.stages]
    if len(set(counts)) > 1:
        assert theirs["stage_layers"] == [counts[rank :: plan.pp] for rank in range(plan.pp)]
    else:
        assert theirs["stage_layers"] is None


def test_swiglu_width_and_vocabulary_padding() -> None:
    model = model_from_arguments(parse_command_line(words(SIZES, "--swiglu --hidden-size 4096")))
    assert model.layers[0].mlp.ffn_hidden_size == 10880
    assert model.padded_vocab_size(4) == 512
    fixed = model_from_arguments(parse_command_line(words(SIZES, "--padded-vocab-size 320")))
    assert (fixed.vocab_size, fixed.padded_vocab_size(4)) == (320, 320)
    bare = model_from_arguments(parse_command_line(words(SIZES, "--no-pad-vocab-size")))
    assert bare.padded_vocab_size(1) == 300


@pytest.mark.parametrize(
    ("flags", "fused"),
    [
        ("--bf16", True),
        ("--bf16 --attention-backend flash", True),
        ("--bf16 --attention-backend unfused", False),
        ("--bf16 --transformer-impl local", False),
        ("", False),
    ],
)
def test_fused_attention(flags: str, fused: bool) -> None:
    assert model_from_arguments(parse_command_line(words(SIZES, flags))).fused_attention is fused


def test_hybrid_symbols_are_layers_of_their_own() -> None:
    flags = "--hybrid-layer-pattern M*-E|M*-E --num-experts 8 --mamba-num-heads 4 --mamba-head-dim 32"
    model = model_from_arguments(parse_command_line(words(SIZES, flags)))
    kinds = [LayerKind.MAMBA, LayerKind.ATTENTION, LayerKind.MLP, LayerKind.MOE]
    assert [layer.kind for layer in model.layers] == kinds * 2
    assert model.layers[0].mamba.inner_size(64) == 128
    latent = model_from_arguments(parse_command_line(words(SIZES, f"--hybrid-layer-pattern +- {LATENT}")))
    assert latent.layers[0].attention.is_latent


def test_experts_alternate_with_dense_blocks() -> None:
    model = model_from_arguments(parse_command_line(words(SIZES, FEATURES["sparse experts"])))
    kinds = [LayerKind.MOE_BLOCK, LayerKind.BLOCK]
    assert [layer.kind for layer in model.layers] == kinds * 2
    assert model.layers[0].experts.ffn_hidden_size == 256


def vocabulary(*flags: str, known: int | None = None) -> int:
    base = SIZES.replace("--vocab-size 300", "").replace("--tokenizer-type NullTokenizer", "")
    return model_from_arguments(parse_command_line(words(base, *flags)), vocab_size=known).vocab_size


def test_vocabulary_from_the_tokenizers_files(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({f"t{i}": i for i in range(50)}))
    bpe = f"--tokenizer-type GPT2BPETokenizer --vocab-file {tmp_path / 'vocab.json'}"
    assert vocabulary(bpe) == 50
    tokenizer = {
        "model": {"vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"id": 2, "content": "<s>"}, {"id": 1, "content": "b"}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    own = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path}"
    assert vocabulary(own) == 3
    # As in Megatron, such a tokenizer has a vocabulary of its own, whatever the flag says.
    assert vocabulary(own, "--vocab-size 300") == 3
    assert vocabulary(own, known=77) == 77
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(DescriptionError, match="cannot count"):
        vocabulary(own)


def test_vocabulary_where_the_tokenizers_files_are_elsewhere() -> None:
    absent = "--tokenizer-type Llama2Tokenizer --tokenizer-model /absent/tokenizer.model"
    assert vocabulary(absent, "--vocab-size 32000") == 32000
    assert vocabulary(absent, "--padded-vocab-size 32768") == 32768
    assert vocabulary("--tokenizer-type TikTokenizer") == 131072
    for flags in (absent, "--tokenizer-type NullTokenizer", ""):
        with pytest.raises(DescriptionError, match=r"vocab_size.*--vocab-size or --padded-vocab-size"):
            vocabulary(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--fp8-format hybrid", "--fp8-format: 'hybrid'"),
        ("--mtp-num-layers 1", "--mtp-num-layers"),
        ("--decoder-num-layers 4", "--decoder-num-layers: 4 is not planned for; valid"),
        ("--hybrid-layer-pattern M*G", "gated delta net"),
        ("--hybrid-layer-pattern M*/MM", "multi-token"),
        ("--hybrid-layer-pattern M||*", "without layers"),
        ("--hybrid-layer-pattern *+", "mixes"),
        ("--hybrid-layer-pattern E", "--num-experts"),
        ("--num-attention-heads 5", "does not divide"),
        ("--position-embedding-type relative", "relative"),
        ("--num-experts 4 --moe-layer-freq [0,1]", "list of 2 values"),
        ("--num-experts 4 --moe-layer-freq 0", "--moe-layer-freq: 0"),
        ("--hidden-size many", "--hidden-size: 'many'; valid: an integer"),
        ("--hidden-size " + "9" * 5000, "--hidden-size: '9999"),
        ("--num-layers 2000000000", "--num-layers: 2000000000; valid: an integer from 1 to 100000"),
        ("--num-layers 0", "--num-layers: 0; valid"),
        ("--make-vocab-size-divisible-by 0", "--make-vocab-size-divisible-by: 0; valid"),
        ("--padded-vocab-size 512 --tensor-model-parallel-size 0", "--tensor-model-parallel-size: 0; valid"),
        ("--multi-latent-attention --kv-lora-rank -1", "--kv-lora-rank: -1; valid"),
        ("--multi-latent-attention --v-head-dim 0", "v_head_dim: 0; valid"),
        ("--num-experts 4 --moe-shared-expert-intermediate-size -1", "shared_ffn_hidden_size: -1; valid"),
        ("--hybrid-layer-pattern M --mamba-num-heads -1", "heads: -1; valid"),
        ("--hidden-dropout nan", "hidden_dropout: nan; valid: a number from 0 to 1"),
        ("--moe-layer-freq " + "[" * 9000, "valid: an integer N, or a list"),
        ("--moe-layer-freq [__import__('os')]", "--moe-layer-freq"),
        ("--group-query-attention --num-query-groups 3", "query_groups: 3"),
    ],
)
def test_bad_models_are_refused_in_one_line(flags: str, message: str) -> None:
    with pytest.raises(DescriptionError) as caught:
        model_from_arguments(parse_command_line(words(SIZES, flags)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "valid: " in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("dest", re.findall(r"--(?:num|hid|seq)\S+ \d+", SIZES))
def test_missing_size_is_named(dest: str) -> None:
    with pytest.raises(DescriptionError, match=dest.split()[0]):
        model_from_arguments(parse_command_line(words(SIZES.replace(dest, ""))))


def test_unknown_words_are_returned_in_order() -> None:
    tail = ["--data-path", "0.3", "a", "--null-tokenizer-pad-id", "-1"]
    line = read_command_line(["pretrain_gpt.py", *words(SIZES), *tail])
    assert line.unknown[0] == "pretrain_gpt.py"
    assert line.unknown[-5:] == tuple(tail)
    assert "tensor_model_parallel_size" not in line.explicit
    assert "hidden_size" in line.explicit


def test_only_what_is_given_constrains() -> None:
    assert replace(plan_constraints(words(SIZES)), micro_batch_size=None).is_free
    flags = (
        "--tensor-model-parallel-size 1 --pipeline-model-parallel-size=4 --context-parallel-size 2 "
        "--sequence-parallel --use-distributed-optimizer --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 3 --num-layers-per-virtual-pipeline-stage 2 --global-batch-size 64"
    )
    constraints = plan_constraints(words(SIZES, flags))
    assert (constraints.tp, constraints.pp, constraints.cp, constraints.zero) == (1, 4, 2, 1)
    assert constraints.sequence_parallel is SequenceParallel.MEGATRON
    assert (constraints.recompute, constraints.recomputed_layers_per_stage) == (Recompute.FULL, 3)
    assert (constraints.layers_per_virtual_stage, constraints.virtual_stages) == (2, None)
    assert (constraints.micro_batch_size, constraints.global_batch_size) == (1, 64)


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ("--pipeline-model-parallel-layout Et*3|tL", (3, 1)),
        ("--hybrid-layer-pattern M*-|E", (3, 1)),
        ("--hybrid-layer-pattern M*-E", None),
        ("", None),
    ],
)
def test_stages_laid_out_by_hand(flags: str, stages: tuple[int, ...] | None) -> None:
    assert plan_constraints(words(SIZES, flags)).stage_layers == stages


@pytest.mark.parametrize(
    "flags",
    [
        "--use-torch-fsdp2",
        "--use-megatron-fsdp",
        "--use-tp-pp-dp-mapping",
        "--account-for-loss-in-pipeline-split",
        "--expert-model-parallel-size 0",
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --cp-comm-type a2a",
        "--context-parallel-size 2 --cp-comm-type a2a p2p",
        "--pipeline-model-parallel-size 2 --microbatch-group-size-per-virtual-pipeline-stage 4",
        "--moe-layer-recompute",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
        "--recompute-granularity full --recompute-method block",
        "--recompute-granularity selective --recompute-modules mlp core_attn",
        "--pipeline-model-parallel-layout E|ttttL",
        "--pipeline-model-parallel-layout Ettttm|L",
        "--pipeline-model-parallel-size 3 --pipeline-model-parallel-layout Ett|ttL",
        "--tensor-model-parallel-size 0",
        "--pipeline-model-parallel-layout Et*99999999999L",
        "--pipeline-model-parallel-layout E(t*99999)*99999L",
        "--decoder-first-pipeline-num-layers 0",
        "--rampup-batch-size 8 8 1000",
    ],
)
def test_flags_that_no_plan_can_keep_are_refused(flags: str) -> None:
    with pytest.raises((PlanError, DescriptionError), match=r"; valid: ") as caught:
        plan_constraints(words(SIZES, flags))
    assert isinstance(caught.value, GalvatronError)


@pytest.mark.parametrize(
    "text", ["[", "[1]+2", "[1]*[2]", "[True]", "['a']", "f()", "[1]**3", "[0]*9999999999", "1.5", ""]
)
def test_bad_frequencies(text: str) -> None:
    with pytest.raises(ValueError):
        layer_frequency(text)


def test_frequency_counts_from_the_first_layer() -> None:
    assert moe_layers(3, 7) == (True, False, False, True, False, False, True)
