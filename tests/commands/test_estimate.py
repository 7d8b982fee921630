"""``galvatron estimate``."""

import json
import shlex
from pathlib import Path

import pytest

from galvatron_megatron.cli import main
from galvatron_megatron.cost.records.values import uniform_plan
from galvatron_megatron.describe.model_file import read_model, write_model
from galvatron_megatron.describe.profile_store import write_profile
from galvatron_megatron.plan.serialization import write_plan
from galvatron_megatron.plan.strategy import Offload, SequenceParallel, Strategy
from tests.profiles import small_model, small_profile

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = CONFIGS / "models" / "llama2-7b.yaml"
CLUSTER = CONFIGS / "clusters" / "a100-80g.yaml"
FILES = ["--model", str(MODEL), "--cluster", str(CLUSTER), "--nodes", "2"]
LINE = (
    "pretrain_gpt.py --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 4096 "
    "--max-position-embeddings 4096 --micro-batch-size 1 --global-batch-size 64 --bf16 --swiglu "
    "--ffn-hidden-size 11008 --untie-embeddings-and-output-weights --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear --vocab-size 32000 "
    "--attention-dropout 0 --hidden-dropout 0 --use-distributed-optimizer"
)


def written_plan(path: Path, *, tp: int = 2, pp: int = 2) -> Path:
    model = read_model(MODEL)
    strategy = Strategy(
        tp=tp,
        dp=16 // tp // pp,
        zero=1,
        sequence_parallel=SequenceParallel.MEGATRON if tp > 1 else SequenceParallel.NONE,
    )
    plan = uniform_plan(model, strategy, pp=pp, micro_batch_size=1, micro_batches=64 // strategy.dp)
    write_plan(plan, path)
    return path


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(written_plan(tmp_path / "p.yaml")), *FILES, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    # 64 samples of 4,096 tokens of a 7B model on 16 A100: between 30 % and 70 % of the peak.
    assert 0.3 < document["model_flops_utilization"] < 0.7
    assert len(document["memory_gb"]) == 2
    assert 5 < document["memory_gb"][0] < 79
    assert document["fits"] and document["calibrated"]
    low, high = document["step_seconds_band"]
    assert low < document["step_seconds"] < high
    assert document["simulated_step_seconds"] == pytest.approx(document["step_seconds"], rel=0.05)
    for stage in document["stages"]:
        assert sum(term["value"] for term in stage["memory_terms"]) == pytest.approx(stage["peak_bytes"])
        assert {term["source"] for term in stage["micro_batch_terms"]} == {"modelled"}


def test_offloaded_states_are_held_against_the_memory_of_a_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = read_model(MODEL)
    plan = uniform_plan(
        model,
        Strategy(dp=8, zero=3, offload=Offload.PARAMETERS),
        pp=2,
        micro_batch_size=1,
        micro_batches=8,
    )
    write_plan(plan, tmp_path / "p.yaml")
    layer = model.layers[0].parameter_count(model.hidden_size, model.normalization)
    text = CLUSTER.read_text()
    found = {}
    for gib in (1000, 40, 0):
        cluster = tmp_path / f"{gib}.yaml"
        host = f"host: {{gb_per_second: 25.0, memory_gb_per_second: 20.0, memory_gib: {gib}}}"
        cluster.write_text(_without_host(text) + host + "\n")
        words = ["estimate", str(tmp_path / "p.yaml"), "--model", str(MODEL), "--cluster", str(cluster)]
        assert main([*words, "--nodes", "2", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        # One stage a node: 18 bytes of half of the layers and of an embedding or a head.
        least = 18 * 16 * layer / 2**30
        assert least < document["host_memory_gb"] < least + 18 * 2 * 32000 * 4096 / 2**30
        assert main([*words, "--nodes", "2"]) == 0
        found[gib] = (document["fits"], document["host_memory_fits"], capsys.readouterr().out)
    assert [found[gib][:2] for gib in (1000, 40, 0)] == [(True, True), (False, False), (True, None)]
    assert "DOES NOT FIT in 40.0 GB" in found[40][2] and "fits in 1000.0 GB" in found[1000][2]
    assert "what a node has is not known" in found[0][2]


def _without_host(text: str) -> str:
    """A cluster file without its hosts, to which others are added."""
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        inside = line.startswith("host:") or (inside and line.startswith(" "))
        if not inside:
            kept.append(line)
    return "".join(kept)


def test_command_line_equals_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = written_plan(tmp_path / "p.yaml", tp=1, pp=2)
    flags = f"{LINE} --pipeline-model-parallel-size 2".split()
    assert main(["estimate", "--cluster", str(CLUSTER), "--nodes", "2", "--json", "--", *flags]) == 0
    by_line = json.loads(capsys.readouterr().out)
    assert main(["estimate", str(plan), *FILES, "--json"]) == 0
    assert by_line == json.loads(capsys.readouterr().out)


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = written_plan(tmp_path / "p.yaml")
    assert main(["estimate", str(plan), *FILES, "--memory-gb", "4"]) == 0
    text = capsys.readouterr().out
    for words in ("step time", "calibrated on 20 runs", "DOES NOT FIT", "forward GEMM", "optimizer states"):
        assert words in text


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = written_plan(tmp_path / "a.yaml"), written_plan(tmp_path / "b.yaml", tp=8, pp=1)
    assert main(["estimate", str(first), *FILES, "--compare", str(second), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    for side, total in enumerate(document["step_seconds"]):
        assert sum(row["values"][side] for row in document["time"]) == pytest.approx(total)
    for side, total in enumerate(document["peak_bytes"]):
        assert sum(row["values"][side] for row in document["memory"]) == pytest.approx(total)
    gaps = [abs(row["values"][1] - row["values"][0]) for row in document["time"]]
    assert gaps == sorted(gaps, reverse=True)
    assert main(["estimate", str(first), *FILES, "--compare", str(second)]) == 0
    assert "difference" in capsys.readouterr().out


def test_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert main(["estimate", str(written_plan(tmp_path / "p.yaml")), *FILES, "--trace", str(path)]) == 0
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * 2 * 16
    assert {event["cat"] for event in events} == {"forward", "backward"}


def test_overlap_flags_reach_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(written_plan(tmp_path / "p.yaml", tp=1, pp=1))
    times = []
    for flags in ([], ["--overlap-grad-reduce", "--overlap-param-gather"]):
        assert main(["estimate", plan, *FILES, *flags, "--json"]) == 0
        times.append(json.loads(capsys.readouterr().out)["sync_seconds"])
    assert times[1] < times[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster", str(CLUSTER)], "nothing to estimate"),
        (["PLAN", *FILES, "--traced"], "--traced: needs a Megatron command line"),
        (["none.yaml", *FILES], "none.yaml"),
        (
            ["PLAN", "--model", str(MODEL), "--cluster", str(CLUSTER)],
            "a cluster of 2 nodes (--nodes beside",
        ),
        (["PLAN", "--model", str(CONFIGS / "models" / "llama2-13b.yaml"), *FILES[2:]], "layers"),
        (["--cluster", str(CLUSTER), "--", *f"{LINE} --tensor-model-parallel-size 3".split()], "tp 3"),
        (["PLAN", *FILES, "--trace", "/none/trace.json"], "--trace /none/trace.json: directory /none does not"),
        (["PLAN", *FILES, "--memory-gb", "nan"], "--memory-gb: nan; valid: a number of GB above 0"),
        (["PLAN", *FILES, "--memory-gb", "inf"], "--memory-gb: inf"),
        (["PLAN", *FILES, "--memory-gb", "-5"], "--memory-gb: -5.0"),
        (["PLAN", "PLAN", *FILES], "valid: --compare for a second plan"),
        (["PLAN", *FILES, "--compare", "PLAN", "--trace", "t.json"], "--trace: unused beside --compare"),
        (["PLAN", *FILES, "--compare", "PLAN", "--schedule", "1f1b"], "--schedule: unused beside --compare"),
        (["PLAN", *FILES, "--vocab-size", "7"], "--vocab-size: unused beside a model file"),
        ([*FILES, "--", *LINE.split()], "--model: unused beside a Megatron command line"),
        ([*FILES[2:], "--seq-length", "7", "--", *LINE.split()], "--seq-length: unused beside"),
        (
            ["--traced", "--profile-dir", "/", "--", *LINE.split()],
            "--traced: unused beside measured prices",
        ),
        ([*FILES[2:], "--ddp-bucket-size", "7", "--", *LINE.split()], "--ddp-bucket-size: unused beside a"),
        (["PLAN", *FILES, "--profile", "x"], "--profile: unused beside --cluster, whose prices are modelled"),
        (["PLAN", *FILES, "--profile-dir", "/"], "--profile-dir: unused beside --cluster"),
        ([*FILES[2:], "--", *LINE.split(), "--galvatron-auto"], "valid: galvatron search -- SCRIPT ARGS"),
        ([*FILES[2:], "--", *LINE.split(), "--galvatron-plam", "x"], "did you mean"),
        ([*FILES[2:], "--", *LINE.split(), "--galvatron-plan"], "expected one argument"),
        ([*FILES[2:], "--", *LINE.split(), "--galvatron-plan", "/none.yaml"], "/none.yaml"),
    ],
)
def test_bad_requests(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(written_plan(tmp_path / "p.yaml"))
    assert main(["estimate", *(plan if word == "PLAN" else word for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_measured_terms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    write_model(model, tmp_path / "m.yaml")
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    write_profile(profiles, small_profile(model))
    plans = []
    for name, strategy in (("a", Strategy(tp=2, dp=2)), ("b", Strategy(tp=4))):
        plans.append(str(tmp_path / f"{name}.yaml"))
        write_plan(uniform_plan(model, strategy, pp=1, micro_batch_size=2, micro_batches=4), plans[-1])
    files = ["--model", str(tmp_path / "m.yaml"), "--profile-dir", str(profiles), "--json"]
    assert main(["estimate", plans[0], *files]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prices"][0].startswith("measured: profile ")
    assert document["prices"][1] == "every part of this plan's predicted time is measured"
    stage = document["stages"][0]
    assert {term["source"] for term in stage["micro_batch_terms"]} == {"measured"}
    # Four layers of 2 samples at 3 ms a sample over tp 2, embedding and head at 0.3 ms a sample each.
    assert stage["micro_batch_seconds"] == pytest.approx(4 * 3e-3 + 2 * 0.6e-3)
    assert main(["estimate", plans[0], *files[:-1]]) == 0
    text = capsys.readouterr().out
    assert "prices: measured: profile " in text and "uncalibrated" not in text and "left out" not in text
    # tp 4 was not measured.
    assert main(["estimate", plans[1], *files]) == 2
    assert capsys.readouterr().err.startswith("galvatron estimate: profile: ")
    other = [*files[:3], str(tmp_path), "--json"]
    assert main(["estimate", plans[0], *other]) == 2
    assert "holds no profile of model" in capsys.readouterr().err


def test_traced_counts_agree_with_closed_forms(capsys: pytest.CaptureFixture[str]) -> None:
    """GEMMs and collectives of the real layers are those of the closed forms."""
    line = shlex.split(
        "pretrain_gpt.py --num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 128 "
        "--max-position-embeddings 128 --micro-batch-size 2 --bf16 --tensor-model-parallel-size 2 "
        "--sequence-parallel --vocab-size 1000"
    )
    terms = []
    for flags in ([], ["--traced"]):
        assert main(["estimate", "--cluster", str(CLUSTER), "--nodes", "1", "--json", *flags, "--", *line]) == 0
        stage = json.loads(capsys.readouterr().out)["stages"][0]
        terms.append({term["name"]: term for term in stage["micro_batch_terms"]})
    for name in ("forward GEMM", "backward GEMM", "forward tensor and context parallel"):
        assert terms[0][name]["source"] == "modelled"
        assert terms[1][name]["source"] == "traced"
        assert terms[1][name]["value"] == pytest.approx(terms[0][name]["value"])
