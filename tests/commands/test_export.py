import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from galvatron_megatron.cli import main
from galvatron_megatron.describe.megatron_args import plan_constraints
from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.serialization import plan_to_json, read_plan, write_plan
from galvatron_megatron.plan.strategy import SequenceParallel, Strategy

ROOT = Path(__file__).parents[2]
BASE = Strategy(tp=2, dp=4, sequence_parallel=SequenceParallel.MEGATRON, zero=1)
OTHER = Strategy(tp=4, dp=2, sequence_parallel=SequenceParallel.MEGATRON, zero=3)


def plan_of(*counts: int, strategy: Strategy = BASE) -> Plan:
    stages = tuple(
        StagePlan(layers=(LayerPlan(kind=LayerKind.BLOCK, strategy=strategy),) * count) for count in counts
    )
    return Plan(pp=len(counts), micro_batch_size=1, micro_batches=8, base=BASE, stages=stages)


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    write_plan(plan_of(15, 17), path)
    return path


def test_flags_of_a_uniform_plan(plan_file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(plan_file), "--model", str(ROOT / "configs/models/llama2-7b.yaml")]) == 0
    printed = capsys.readouterr()
    assert printed.out == (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--context-parallel-size 1 --micro-batch-size 1 --global-batch-size 32 --use-distributed-optimizer "
        "--pipeline-model-parallel-layout 'Et*15|t*17L'\n"
    )
    assert printed.err == ""


def test_a_plan_beyond_flags_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "mixed.json"
    write_plan(plan_of(4, strategy=OTHER), path)
    assert main(["export", str(path)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"--micro-batch-size 1 --global-batch-size 32 --galvatron-plan {path}\n"
    # The job takes these flags for decisions made by hand, which the plan must keep.
    plan_constraints(printed.out.split()).check(read_plan(path))
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_other_formats_and_output_files(plan_file: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / f"copy.{kind}"
    assert main(["export", str(plan_file), "--format", kind, "--output", str(output)]) == 0
    assert read_plan(output) == read_plan(plan_file)


def test_json_is_printed(plan_file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(plan_file), "--format", "json"]) == 0
    assert capsys.readouterr().out == plan_to_json(read_plan(plan_file))


def test_a_plan_for_another_model_is_refused(plan_file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(plan_file), "--model", str(ROOT / "configs/models/llama2-13b.yaml")]) == 2
    error = capsys.readouterr().err
    assert error == f"galvatron export: {plan_file}.stages: 32 layers; valid: 40, as in 'llama2-13b'\n"


def test_bad_files_and_arguments(plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(tmp_path / "none.yaml")]) == 2
    plan_file.write_text(json.dumps({"pp": 1}))
    assert main(["export", str(plan_file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(SystemExit) as caught:
        main(["export", str(plan_file), "--format", "toml"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seq-length", "4096"], "--seq-length: without a model"),
        (["--format", "yaml", "--output", "copy.json"], "--output copy.json: would hold YAML"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(
    plan_file: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", str(plan_file), *words]) == 2
    assert capsys.readouterr().err.startswith(f"galvatron export: {message}")


def test_shipped_plans_by_name(capsys: pytest.CaptureFixture) -> None:
    name = "llama2-7b-16-ranks"
    assert main(["export", name, "--model", "llama2-7b"]) == 0
    assert "--tensor-model-parallel-size" in capsys.readouterr().out
    assert main(["export", name + "s"]) == 2
    assert f"did you mean '{name}'?" in capsys.readouterr().err


def test_a_reader_that_leaves_gets_no_traceback(plan_file: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "galvatron_megatron", "export", str(plan_file)]
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_plans_fit_the_model_they_are_named_after(path: Path, capsys: pytest.CaptureFixture) -> None:
    model = next(
        candidate
        for candidate in (ROOT / "configs/models").glob("*.yaml")
        if path.stem.startswith(read_model(candidate).name + "-")
    )
    assert main(["export", str(path), "--model", str(model)]) == 0
    assert "--global-batch-size" in capsys.readouterr().out


def test_a_strategy_file_of_hetu_galvatron_becomes_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (config,) = (ROOT / "tests/data/galvatron_a100_8gpu").glob("galvatron_config_*.json")
    out = tmp_path / "plan.yaml"
    assert main(["export", str(config), "--devices", "8", "--format", "yaml", "--output", str(out)]) == 0
    plan = read_plan(out)
    assert (plan.world_size, plan.global_batch_size, len(plan.layers)) == (8, 16, 32)
    assert main(["export", str(out), "--devices", "8", "--format", "yaml"]) == 2
    assert "says its devices itself" in capsys.readouterr().err
    assert main(["export", str(config), "--format", "yaml"]) == 2
    assert "--devices N" in capsys.readouterr().err
    assert main(["export", str(config), "--devices", "8"]) == 2
    assert "--format yaml" in capsys.readouterr().err
