"""Searches priced by profiles of the store: a job's plan, and nothing unmeasured without a word."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from profiles import curve, small_model, small_profile, ulysses_problem

from galvatron_megatron.cli import main
from galvatron_megatron.commands import search_prices
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.galvatron_store import import_directories, write_import
from galvatron_megatron.describe.profile import StepPoint
from galvatron_megatron.describe.profile_cluster import cluster_from_ranks
from galvatron_megatron.describe.profile_key import layer_digest, measured_model
from galvatron_megatron.describe.profile_store import to_json, write_profile
from galvatron_megatron.plan.serialization import plan_from_dict
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.request import SearchRequest

DATA = Path(__file__).parent.parent / "data" / "galvatron_a100_8gpu"
# Attention of ranks without a GPU is not fused, which a model's file does not say.
MODEL = replace(small_model(), fused_attention=False)
PROFILE = small_profile(MODEL, sizes=(1, 2, 4, 8), tps=(1, 2, 4))
PROFILE = replace(
    PROFILE,
    collectives=(*PROFILE.collectives, *(curve("all_to_all", *shape) for shape in ((2, 1), (2, 2), (4, 1)))),
)
NAME = PROFILE.fingerprint()


@pytest.fixture
def model_file(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    layer = {"kind": "block", "count": 4, "attention": {"heads": 4, "query_groups": 4, "head_dim": 32}}
    layer["mlp"] = {"ffn_hidden_size": 512}
    sizes = {"hidden_size": 128, "seq_length": 64, "vocab_size": 1000, "precision": "fp32"}
    content = {"name": "small", **sizes, "tied_embeddings": True, "layers": [layer]}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def store(tmp_path) -> Path:
    directory = tmp_path / "store"
    directory.mkdir()
    write_profile(directory, PROFILE)
    return directory


def run(capsys, model: Path | str, store: Path, *words: object) -> tuple[int, str, str]:
    lines = ["--model", model, "--profile-dir", store, "--global-batch-size", "8"]
    code = main(["search", *map(str, [*lines, *words])])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_stored_profile_prices_the_search_of_its_model_without_being_asked(
    capsys, model_file, store, tmp_path
):
    code, out, err = run(capsys, model_file, store, "--json")
    assert code == 0, err
    found = json.loads(out)
    plan = plan_from_dict(found["plan"])
    assert plan.fingerprints.profile == NAME and plan.fingerprints.model == MODEL.fingerprint()
    assert plan.world_size == 4
    assert found["prices"][0].startswith(
        f"measured: profile {NAME}: 1 x 4 ranks on a processor (gloo), measured "
    )
    assert "every part of this plan's predicted time is measured" in found["prices"]
    assert found["simulated"]
    # The question and the prices of --galvatron-auto.
    cluster = cluster_from_ranks(PROFILE)
    request = SearchRequest(
        model=MODEL,
        world_size=4,
        devices_per_node=4,
        memory_bytes=cluster.memory_bytes,
        global_batch_size=8,
        allow_ulysses=False,
        allow_cp=False,
        allow_expert_parallel=False,
    )
    wanted = search(request, MeasuredCostModel(MODEL, cluster, PROFILE, RunOptions()))
    assert replace(plan, fingerprints=wanted.plan.fingerprints) == wanted.plan
    assert found["predicted"]["step_seconds"] == wanted.step_seconds
    exported = tmp_path / "exported.json"
    exported.write_text(to_json(PROFILE))
    for asked in (NAME[:5], exported):
        again = json.loads(run(capsys, model_file, store, "--json", "--profile", asked)[1])
        assert again["plan"] == found["plan"]


def test_the_report_says_where_prices_come_from(capsys, model_file, store):
    write_profile(
        store, replace(PROFILE, provenance=replace(PROFILE.provenance, device="another", updated="2025"))
    )
    code, out, _ = run(capsys, model_file, store, "--explain")
    assert code == 0
    assert f"prices: measured: profile {NAME}" in out and "1 other profile(s) of this model are stored" in out
    assert "left out, as not measured: context and expert parallelism, Ulysses, offloading (galv" in out
    assert "twice as fast" not in out and "one more node" not in out
    code, out, _ = run(
        capsys, "gpt3-125m", store, "--cluster", "a100-80g", "--uniform", "--pp", "1", "--tp", "1"
    )
    assert code == 0 and "prices: modelled from the description of cluster a100-80g" in out


def test_measured_offloading_is_searched_within_device_and_host(capsys, model_file, store):
    """CPU ranks have one memory: what devices leave of the node is the hosts'."""
    steps = (StepPoint(tensors=1, parameters=10**6, updated=10**6, zero=1, seconds=0.02),)
    speeds = [(name, 1e10) for name in ("to_host", "from_host", "host_memory")]
    node = 4 * 41e6 + 75e6
    speeds += [(name, value) for name, value in PROFILE.speeds if name != "memory"]
    speeds += [("memory", node / 4), ("node_memory", node)]
    write_profile(store, replace(PROFILE, host_steps=steps, speeds=tuple(speeds)))
    fixed = ["--json", "--pp", "1", "--tp", "1", "--zero", "1", "--micro-batch-size", "1", "--no-recompute"]
    found = {}
    for gib, words in (
        (41e6 / 2**30, []),
        (41e6 / 2**30, ["--offload", "optimizer"]),
        (1, ["--offload", "optimizer"]),
    ):
        code, out, err = run(capsys, model_file, store, *fixed, "--memory-gb", gib, *words)
        found[gib, len(words)] = (code, out, err)
    code, _, err = found[41e6 / 2**30, 0]
    assert code == 2 and "nothing fits" in err
    code, out, err = found[41e6 / 2**30, 2]
    assert code == 0, err
    document = json.loads(out)
    plan = plan_from_dict(document["plan"])
    assert "optimizer" in {layer.strategy.offload.value for layer in plan.layers}
    assert not [line for line in document["prices"] if "offloading" in line]
    code, out, err = found[1, 2]
    plan = plan_from_dict(json.loads(out)["plan"])
    assert {strategy.offload.value for strategy in (plan.base, *plan.strategies)} == {"none"}
    assert "a node has none beside that of its devices" in err


def test_ulysses_is_chosen_where_it_was_measured_and_is_best(capsys, model_file, store, tmp_path):
    _, profile, exchanged = ulysses_problem()
    file = tmp_path / "long.yaml"
    file.write_text(model_file.read_text().replace("seq_length: 64", "seq_length: 1024"))
    words = ["--global-batch-size", "1", "--json"]
    write_profile(store, profile)
    code, out, err = run(capsys, file, store, *words)
    assert code == 0, err
    without = json.loads(out)
    write_profile(store, replace(profile, parts=exchanged))
    code, out, err = run(capsys, file, store, *words)
    assert code == 0, err
    found = json.loads(out)
    kinds = [
        {layer.strategy.sequence_parallel.value for layer in plan_from_dict(entry["plan"]).layers}
        for entry in (without, found)
    ]
    assert "ulysses" not in kinds[0] and kinds[1] == {"ulysses"}
    assert found["predicted"]["step_seconds"] < 0.9 * without["predicted"]["step_seconds"]
    assert any("Ulysses" in line for line in without["prices"])
    assert not any("Ulysses" in line for line in found["prices"])
    none = json.loads(run(capsys, file, store, *words, "--no-ulysses")[1])
    assert none["plan"] == without["plan"]


def test_what_lies_beyond_the_measured_sizes_is_named(capsys, model_file, store):
    code, out, err = run(
        capsys, model_file, store, "--micro-batch-size", "16", "--global-batch-size", "16", "--json"
    )
    assert code == 0, err
    (line,) = [line for line in json.loads(out)["prices"] if "modelled" in line]
    assert re.search(r"is measured; modelled: .*layer forward \d+\.\d%", line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tp", "3"], f"--tp 3: not measured in profile {NAME}; valid: 1, 2, 4"),
        (["--cp", "2"], "--cp 2: not measured"),
        (["--sequence-parallel", "ulysses"], "valid: megatron, none"),
        (["--offload", "optimizer"], "--offload optimizer: not measured .* valid: leave it out"),
        (["--nodes", "2"], "--nodes 2: profile .* was measured on 1; valid: 1, or --cluster"),
        (["--profile", "zzz"], "--profile zzz is no file, and not stored in .*valid: "),
        (["--profile", NAME, "--cluster", "a100-80g"], "valid: one of the two"),
        (["--galvatron-profile", str(DATA)], "--galvatron-profile: needs the memory"),
        (
            ["--seq-length", "128"],
            "holds no profile of model small at sequence length 128; valid: --cluster FILE",
        ),
        (["--seq-length", "128", "--profile", NAME], "was measured for another model than small at"),
        (["--profile-dir", "/nonexistent"], "/nonexistent: does not exist"),
    ],
)
def test_what_is_not_measured_is_refused_in_one_line(capsys, model_file, store, words, message):
    code, out, err = run(capsys, model_file, store, *words)
    assert code == 2 and not out
    assert re.search(message, err) and err.count("\n") == 1, err


def test_incomplete_profiles_are_passed_over_or_named(capsys, model_file, store):
    newer = replace(PROFILE.provenance, device="another", updated="2027-01-01T00:00:00+00:00")
    for lacking in ("speeds", "steps"):
        write_profile(store, replace(PROFILE, provenance=replace(newer, backend=lacking), **{lacking: ()}))
    code, out, _ = run(capsys, model_file, store, "--json")
    assert code == 0 and NAME in json.loads(out)["prices"][0]
    for lacking, message in (("speeds", "lacks the speed of its devices"), ("steps", "no optimizer step")):
        name = replace(newer, backend=lacking).fingerprint()
        code, _, err = run(capsys, model_file, store, "--profile", name)
        assert code == 2 and message in err and err.count("\n") == 1


def test_without_any_store_the_way_out_is_named(capsys, model_file, store, monkeypatch):
    monkeypatch.setattr(search_prices, "default_directory", lambda: store / "none")
    assert main(["search", "--model", str(model_file), "--global-batch-size", "8"]) == 2
    assert "holds no profile of model small" in capsys.readouterr().err


def test_the_model_of_a_file_is_taken_as_it_was_measured():
    other = replace(MODEL, name="other", fused_attention=True)
    assert measured_model(other, PROFILE) == replace(other, fused_attention=False)
    assert layer_digest(other.layers[0]) == layer_digest(MODEL.layers[0])
    assert measured_model(replace(MODEL, seq_length=128), PROFILE) is None


def test_imported_profiles_price_a_search_by_fingerprint(capsys, store, tmp_path):
    machine, model = tmp_path / "machine", tmp_path / "model"
    for directory, pattern in ((machine, "*gpu*.json"), (machine, "overlap*"), (model, "*_profiling_*")):
        directory.mkdir(exist_ok=True)
        for path in DATA.glob(pattern):
            (directory / path.name).write_bytes(path.read_bytes())
    names = []
    for directories in ([DATA], [machine], [model]):
        (entry,) = import_directories(directories)
        write_import(store, entry)
        names.append(entry.fingerprint())
    words = ["--cluster", "a100-80g", "--seq-length", "2048", "--uniform", "--pp", "1", "--json"]
    plans = []
    for given in ([DATA], [names[0][:6]], names[1:]):
        flags = [word for name in given for word in ("--galvatron-profile", name)]
        code, out, err = run(capsys, "llama2-7b", store, *words, *flags)
        assert code == 0, err
        plans.append(json.loads(out)["plan"])
        assert "Hetu-Galvatron's profile computation_profiling_bf16_llama2-7b_all" in out
    assert plans[0] == plans[1] == plans[2]
    code, _, err = run(capsys, "llama2-7b", store, *words, "--galvatron-profile", names[1])
    assert code == 2 and "no computation_profiling_*.json" in err and err.count("\n") == 1
    code, _, err = run(capsys, "gpt3-350m", store, *words, "--galvatron-profile", names[0])
    assert code == 2 and "layers of 204.0M parameters, model gpt3-350m has 12.6M" in err
