import json
from pathlib import Path

import pytest

from galvatron_megatron.cli import main
from galvatron_megatron.commands.search import _batch_sizes
from galvatron_megatron.plan.serialization import plan_from_dict, read_plan

PROFILE = Path(__file__).parent.parent / "data" / "galvatron_a100_8gpu"
SMALL = [
    "search",
    "--model",
    "gpt3-350m",
    "--cluster",
    "a100-80g",
    "--nodes",
    "1",
    "--global-batch-size",
    "16",
    "--no-context-parallel",
    "--max-zero",
    "1",
]


def test_json_has_the_plan_and_what_is_predicted(capsys, tmp_path):
    assert main([*SMALL, "--json", "--output", str(tmp_path / "plan.yaml")]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = plan_from_dict(found["plan"])
    assert plan == read_plan(tmp_path / "plan.yaml")
    assert plan.world_size == 8 and plan.global_batch_size == 16
    assert len(found["predicted"]["memory_gb"]) == plan.pp
    assert found["predicted"]["step_seconds"] > 0 and found["search_seconds"] > 0 and found["gap"] == 0
    # What the search proves is what its formula says; the simulated schedules of the best may then decide.
    proven = found["runners_up"][0] if found["searched"] else found["predicted"]
    assert found["best_uniform"]["step_seconds"] >= proven["step_seconds"] * (1 - 1e-12)
    assert len(found["simulated"]) >= len(found["runners_up"]) >= 5
    assert min(plan["step_seconds"] for plan in found["simulated"]) > 0
    assert isinstance(found["runners_up"], list)


def test_prints_a_table_and_an_explanation(capsys):
    assert main([*SMALL, "--explain", "--no-interleaving"]) == 0
    shown = capsys.readouterr().out
    for words in ("proven fastest", "best uniform", "binding:", "one more node", "1 GB more memory"):
        assert words in shown


def test_shows_the_space(capsys):
    assert main([*SMALL, "--show-space"]) == 0
    shown = capsys.readouterr().out
    assert "decision tree" in shown and "tp_heads" in shown


def test_uniform_plans_are_those_of_stock_megatron(capsys):
    words = [*SMALL[:-2], "--memory-gb", "5", "--tp", "1", "--pp", "1", "--json"]
    assert main([*words, "--uniform"]) == 0
    plan = plan_from_dict(json.loads(capsys.readouterr().out)["plan"])
    assert plan.base.zero <= 1 and {s.zero for s in plan.strategies} == {plan.base.zero}
    assert main(words) == 0
    assert max(s.zero for s in plan_from_dict(json.loads(capsys.readouterr().out)["plan"]).strategies) > 1


def test_hand_made_decisions_are_kept(capsys):
    assert main([*SMALL, "--json", "--tp", "2", "--pp", "2", "--recompute", "full"]) == 0
    plan = plan_from_dict(json.loads(capsys.readouterr().out)["plan"])
    assert plan.pp == 2 and {s.tp for s in plan.strategies} == {2}


def test_galvatron_profiles_and_strategy_files(capsys, tmp_path):
    out = tmp_path / "galvatron_config.json"
    words = [
        "search",
        "--model",
        "llama2-7b",
        "--cluster",
        "a100-80g",
        "--seq-length",
        "2048",
        "--memory-gb",
        "36",
        "--global-batch-size",
        "16",
        "--galvatron-profile",
        str(PROFILE),
        "--no-interleaving",
        "--pp",
        "1",
        "--sequence-parallel",
        "megatron",
        "--zero",
        "3",
        "--galvatron-config",
        str(out),
    ]
    assert main(words) == 0
    assert json.loads(out.read_text())["global_bsz"] == 16
    assert "proven fastest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory-gb", "0"], "--memory-gb"),
        (["--memory-gb", "nan"], "--memory-gb"),
        (["--memory-gb", "0.5"], "lacks"),
        (["--global-batch-size", "x"], "--global-batch-size"),
        (["--pp", "5"], "fixed by hand"),
        (["--galvatron-profile", "/nonexistent"], "no such directory"),
        (["--global-batch-size", "8:64:8:9"], "'8:64:8:9'; valid: a number from 1"),
        (["--global-batch-size", "1:100000000000:1"], "--global-batch-size"),
        (["--global-batch-size", "1:100000:1"], "for up to 1000"),
        (["--global-batch-size", "99999999999999999999"], "valid: a number from 1 to"),
        (
            ["--output", "/nonexistent/plan.yaml"],
            "--output /nonexistent/plan.yaml: directory /nonexistent does not",
        ),
        (["--output", "plan.txt"], "unknown kind of file; valid: a name that ends with .yaml"),
        (["--galvatron-config", "/"], "--galvatron-config /: unknown kind of file"),
        (["--show-space", "--output", "plan.yaml"], "--output: --show-space finds no plan"),
        (["--cp", "2"], "--cp 2: --no-context-parallel forbids it"),
        (["--no-recompute", "--recompute", "full"], "--recompute full: --no-recompute forbids it"),
        (["--no-interleaving", "--virtual-stages", "2"], "--virtual-stages 2: --no-interleaving forbids it"),
        (["--ep", "2"], "--ep 2: model 'gpt3-350m' has no experts"),
    ],
)
def test_impossible_requests_end_in_one_line(capsys, words, message):
    assert main([*SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_range_without_a_step_goes_in_steps_of_its_first():
    assert _batch_sizes("8:32") == (8, 16, 24, 32)
    assert _batch_sizes("8:32:12") == (8, 20, 32)


def test_a_model_too_large_for_the_devices_fits_with_host_memory(capsys, tmp_path):
    words = ["search", "--model", "llama2-7b", "--cluster", "h100", "--global-batch-size", "16", "--json"]
    words += [
        "--memory-gb",
        "12",
        "--seq-length",
        "2048",
        "--uniform",
        "--pp",
        "1",
        "--tp",
        "1",
        "--max-zero",
        "3",
    ]
    assert main(words) == 2
    assert "nothing fits" in capsys.readouterr().err
    assert main([*words, "--offload", "parameters", "--output", str(tmp_path / "plan.yaml")]) == 0
    plan = read_plan(tmp_path / "plan.yaml")
    assert {layer.strategy.offload.value for layer in plan.layers} & {"optimizer", "parameters"}
    capsys.readouterr()
    text = (Path(__file__).parents[2] / "configs/clusters/h100.yaml").read_text()
    small = tmp_path / "small.yaml"
    small.write_text(text.replace("memory_gib: 2048", "memory_gib: 1"))
    assert main([*words, "--cluster", str(small), "--offload", "parameters"]) == 2
    error = capsys.readouterr().err
    assert "on a node that has 1.0; valid: less offloaded" in error and len(error.strip().splitlines()) == 1
    assert main([*words, "--offload", "parameters", "--max-zero", "1"]) == 2
    assert "--offload parameters: needs ZeRO 3" in capsys.readouterr().err
    assert main([*words, "--cluster", "l4", "--offload", "optimizer"]) == 2
    assert "cluster l4: no host" in capsys.readouterr().err


def test_what_megatron_is_to_shard_alone_is_searched_so(capsys):
    words = [*SMALL[:-2], "--pp", "1", "--tp", "1", "--memory-gb", "3", "--zero-backend"]
    assert main([*words, "deepspeed"]) == 0
    assert "zero3" in capsys.readouterr().out
    assert main([*words, "megatron"]) == 2
    assert "nothing fits" in (told := capsys.readouterr().err) and "zero1" in told
    assert main([*words, "megatron", "--offload", "optimizer"]) == 2
    assert "beside --zero-backend megatron" in capsys.readouterr().err
