"""A job under ``--galvatron-auto`` and the commands, asked the same by one command line, answer the same."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from programs import answer_of

from galvatron_megatron.cli import main
from galvatron_megatron.commands.job_line import read_job_line
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.plan.serialization import plan_from_dict
from galvatron_megatron.search.host_memory import offloads

SIZES = (
    "--num-layers 5 --hidden-size 128 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--vocab-size 1000 --tokenizer-type NullTokenizer --global-batch-size 8 "
)
LINES = {
    "plain": "",
    "kernels": "--transformer-impl local --attention-backend unfused",
    "overlap": "--overlap-grad-reduce --overlap-param-gather --use-distributed-optimizer",
    "buckets": "--bf16 --overlap-grad-reduce --ddp-bucket-size 50000 --galvatron-memory-gb 0.032",
    "narrow": "--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32",
    "half": "--fp16 --tp-comm-overlap",
    "half wide": "--fp16 --accumulate-allreduce-grads-in-fp32 --overlap-grad-reduce --ddp-num-buckets 3",
    "backend": "--galvatron-zero-backend deepspeed --galvatron-memory-gb 0.05 --micro-batch-size 1",
    "uniform": "--galvatron-uniform --tensor-model-parallel-size 2 --sequence-parallel",
    "pipeline": "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 2",
    "offload": "--galvatron-offload optimizer --galvatron-memory-gb 0.0465 --use-distributed-optimizer "
    "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --micro-batch-size 1",
    "recomputed": "--recompute-activations",
}
PROGRAM = """
import argparse, json, sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from megatron.training.arguments import add_megatron_arguments
from profiles import small_profile
from galvatron_megatron.describe.profile import StepPoint
from galvatron_megatron.describe.profile_cluster import cluster_from_ranks
from galvatron_megatron.describe.profile_store import write_profile
from galvatron_megatron.integration.options import Options, add_options
from galvatron_megatron.integration.planning import JobPlanner
from galvatron_megatron.profiler.switches import switches_of

answers = {}
for name, words in json.loads(sys.argv[1]).items():
    # A parser of its own: Megatron's, and our flags.
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    add_options(parser)
    args = parser.parse_args([*words, "--galvatron-auto"])
    options = Options.from_arguments(args)
    planner = JobPlanner(args, {}, options, words, SimpleNamespace(world_size=4), None)
    planner._runtime_problem = lambda plan: ""
    profile = small_profile(planner.model, sizes=(1, 2, 4, 8))
    step = StepPoint(tensors=1, parameters=10**6, updated=10**6, zero=1, seconds=0.02)
    hosts = [(speed, 1e10) for speed in ("to_host", "from_host", "host_memory", "node_memory")]
    profile = replace(
        profile,
        host_steps=(step,),
        speeds=(*profile.speeds, *hosts),
        provenance=replace(profile.provenance, switches=switches_of(args)),
    )
    store = Path(sys.argv[2]) / name
    store.mkdir()
    write_profile(store, profile)
    decision = planner._search(profile, cluster_from_ranks(profile, memory_gb=options.memory_gb), 0.0, ())
    answers[name] = decision.to_dict() | {"options": asdict(planner._run_options())}
print(json.dumps(answers))
"""


def words_of(name: str) -> list[str]:
    return [*SIZES.split(), *LINES[name].split()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[dict, Path]:
    """What jobs answer, from a process of its own, and the profiles they have it from."""
    stores = tmp_path_factory.mktemp("stores")
    return answer_of(PROGRAM, json.dumps({name: words_of(name) for name in LINES}), str(stores)), stores


def test_the_lines_change_every_switch_that_jobs_are_measured_with(answers):
    found = [RunOptions(**answer["options"]) for answer in answers[0].values()]
    # Of published runs alone, and refused where prices are measured.
    other = {"scatter_gather_sends", "optimizer_in_step", "optimizer_instances"}
    same = {entry.name for entry in fields(RunOptions) if len({getattr(o, entry.name) for o in found}) == 1}
    assert same == other


def test_the_lines_lead_to_different_plans(answers):
    plans = {name: plan_from_dict(answer["plan"]) for name, answer in answers[0].items()}
    assert [name for name, plan in plans.items() if offloads(plan)] == ["offload"]
    assert plans["uniform"].is_uniform
    assert len({tuple(map(str, plan.strategies)) for plan in plans.values()}) > 4


@pytest.mark.parametrize("name", LINES)
def test_a_command_line_gives_the_plan_of_its_job(answers, name, tmp_path, capsys, monkeypatch):
    wanted, store = answers[0][name], answers[1] / name
    used = []
    real = MeasuredCostModel.__init__
    monkeypatch.setattr(MeasuredCostModel, "__init__", lambda *args: used.append(args[4]) or real(*args))
    line = ["--profile-dir", str(store), "--json", "--", "pretrain_gpt.py", *words_of(name)]
    file = tmp_path / "plan.yaml"
    assert main(["search", "--output", str(file), *line]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert plan_from_dict(found["plan"]) == plan_from_dict(wanted["plan"])
    assert found["predicted"]["step_seconds"] == wanted["step_seconds"]
    # Under the plan, as a job has it from a file; what only a search looks at would be refused beside it.
    without = [word for word in line if word not in ("--galvatron-uniform", "--galvatron-offload", "optimizer")]
    if "--galvatron-memory-gb" in without:
        place = without.index("--galvatron-memory-gb")
        del without[place : place + 2]
    assert main(["estimate", *without, "--galvatron-plan", str(file)]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["step_seconds"] == pytest.approx(wanted["step_seconds"])
    assert [asdict(options) for options in used] == [wanted["options"]] * 2


def test_a_profile_of_other_switches_is_not_taken_in_silence(answers, capsys):
    store = answers[1] / "narrow"
    line = ["--profile-dir", str(store), "--", "pretrain_gpt.py", *SIZES.split(), "--bf16"]
    for command in ("search", "estimate"):
        assert main([command, *line, "--micro-batch-size", "1"]) == 2
        told = capsys.readouterr()
        assert "but none under grad_reduce_in_bf16=False" in told.err and told.err.count("\n") == 1
    (profile,) = store.glob("profile-*.json")
    assert main(["search", "--profile", str(profile), *line]) == 0


def test_what_is_not_measured_is_refused_with_the_flag_of_the_line(answers, capsys):
    for flags, message in (
        ("--tensor-model-parallel-size 4", "--tensor-model-parallel-size 4: not measured in profile"),
        ("--context-parallel-size 2", "--context-parallel-size 2: not measured in profile"),
        ("--num-distributed-optimizer-instances 2", "--num-distributed-optimizer-instances 2: a job measures"),
        ("--galvatron-plan plan.yaml", "--galvatron-plan plan.yaml: the plan is given, nothing is searched"),
        ("--galvatron-memory-gb x", "--galvatron-memory-gb: 'x'; valid: "),
        ("--galvatron-unifrom", "did you mean '--galvatron-uniform'"),
    ):
        line = ["--profile-dir", str(answers[1] / "plain"), "--", "pretrain_gpt.py", *SIZES.split()]
        assert main(["search", *line, *flags.split()]) == 2
        told = capsys.readouterr()
        assert message in told.err and told.err.count("\n") == 1 and not told.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--global-batch-size", "8"], "--model: missing; valid: --model, or -- followed by"),
        (["--model", "llama2-7b"], "--global-batch-size: missing; valid: "),
        (["--model", "llama2-7b", "--global-batch-size", "8", "more"], "'more': no flag; valid: -- "),
        (["--tp", "2", "--", "pretrain_gpt.py"], "--tp: unused beside a Megatron command line"),
        (["--grad-reduce-in-bf16", "--", "p.py"], "--grad-reduce-in-bf16: unused beside a Megatron command"),
        (["--model", "llama2-7b", "--global-batch-size", "8", "--vocab-size", "9"], "--vocab-size: unused"),
        (["--", "pretrain_gpt.py", *SIZES.split()[:-2]], "--global-batch-size: missing; a plan is made for"),
    ],
)
def test_questions_that_are_not_whole_are_refused_in_one_line(words, message, capsys):
    assert main(["search", *words]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out


def test_a_job_on_cpu_ranks_is_read_as_its_device_sets_it():
    line = read_job_line(["pretrain_gpt.py", *SIZES.split(), "--galvatron-device", "cpu"], vocab_size=None)
    assert line.options.implementation == "local" and not line.model.fused_attention
