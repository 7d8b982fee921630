"""Whole jobs of our own script under --galvatron-auto; the same path on Megatron's scripts is next door."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest
from jobs import SIZES, SMALL, deepspeed, hand_words, run_ranks, torchrun

from galvatron_megatron.cli import main
from galvatron_megatron.cost.estimate import estimate_plan
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.megatron_args import model_from_arguments, parse_command_line
from galvatron_megatron.describe.profile import StepPoint
from galvatron_megatron.describe.profile_cluster import cluster_from_ranks
from galvatron_megatron.describe.profile_store import from_json
from galvatron_megatron.errors import EXIT_CODE, SearchError
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.megatron_arguments import runs_on_stock_megatron
from galvatron_megatron.plan.serialization import plan_from_dict, read_plan
from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.host_memory import offloads
from galvatron_megatron.search.request import SearchRequest

pytestmark = [pytest.mark.distributed, pytest.mark.jobs]
HALFWAY = 5


def observed_in(directory):
    """Where the planned job writes what its parts took."""
    return directory.parent / "observed"


def saved_in(directory):
    """Where the planned job writes its checkpoints, the first one halfway."""
    return directory.parent / "checkpoints"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A planned job on two ranks, with the directory its profile and plan are kept in."""
    directory = tmp_path_factory.mktemp("profiles")
    report = directory.parent / "report.json"
    saved = directory.parent / "plan.yaml"
    words = ["--galvatron-auto", "--galvatron-profile-dir", str(directory), "--galvatron-uniform"]
    extra = ["--galvatron-report", str(report), "--galvatron-save-plan", str(saved)]
    extra += ["--galvatron-observe", str(observed_in(directory))]
    # And data from processes of their own, as is usual; the other jobs below save themselves the time.
    extra += ["--save", str(saved_in(directory)), "--save-interval", str(HALFWAY), "--num-workers", "2"]
    job = torchrun(2, [str(SMALL), *SIZES, *words, *extra])
    assert job.codes == [0], job.text[-3000:]
    return directory, words, job, report, saved


def test_losses_equal_those_of_the_chosen_arguments_given_by_hand(planned):
    _, _, job, report, saved = planned
    by_hand = run_ranks(2, [str(SMALL), *SIZES, *hand_words(report)])
    assert by_hand.codes == [0, 0], by_hand.text[-3000:]
    assert by_hand.errors == []
    assert list(job.losses) == list(range(1, 11))
    assert job.losses == pytest.approx(by_hand.losses, abs=1e-5)
    assert job.losses[10] < job.losses[1] - 0.1
    assert runs_on_stock_megatron(read_plan(saved))


def test_prediction_and_measurement_stand_side_by_side(planned):
    _, _, job, report, saved = planned
    found = json.loads(report.read_text())
    assert plan_from_dict(found["plan"]) == read_plan(saved)
    assert found["iterations"] == 10
    assert found["measured_step_seconds"] > 0 and found["step_seconds"] > 0
    pp = found["plan"]["pp"]
    assert len(found["measured_memory_bytes"]) == len(found["memory_bytes"]) == pp
    assert all(count > 0 for count in found["measured_memory_bytes"])
    losses = {step: values["lm loss"] for step, values in found["losses"]}
    # Megatron logs the first iteration at once and the mean of the first two as the second.
    losses[2] = (losses[1] + losses[2]) / 2
    assert losses == pytest.approx(job.losses, abs=1e-5)
    assert f"measured {found['measured_step_seconds'] * 1e3:.1f} ms, predicted" in job.text
    assert "galvatron: plan (searched)" in job.text


def test_a_kept_plan_is_used_again_and_damage_costs_nothing_but_time(planned):
    directory, words, _, report, _ = planned
    plan = json.loads(report.read_text())["plan"]
    again = [*words, "--galvatron-plan-only"]
    # Here through the module, as where Python runs no start-up hooks.
    kept = run_ranks(2, ["-m", "galvatron_megatron", str(SMALL), *SIZES, *again])
    assert kept.codes == [0, 0] and "plan (kept in" in kept.text, kept.text[-3000:]
    assert kept.losses == {}
    (plan_file,) = directory.glob("plan-*.json")
    (profile_file,) = directory.glob("profile-*.json")
    before = {path: path.read_text() for path in (plan_file, profile_file)}
    for path in before:
        path.write_text(before[path][: len(before[path]) // 2])
    job = run_ranks(2, [str(SMALL), *SIZES, *again, "--galvatron-report", str(directory / "new.json")])
    assert job.codes == [0, 0], job.text[-3000:]
    assert "damaged" in job.text and "plan (searched)" in job.text
    aside = [path.read_text() for path in directory.iterdir() if "damaged" in path.name]
    assert sorted(aside) == sorted(text[: len(text) // 2] for text in before.values())
    new = json.loads(plan_file.read_text())["decision"]["plan"]
    # What was measured anew differs, and may lead to another plan for the same model.
    assert new["fingerprints"]["model"] == plan["fingerprints"]["model"]
    # The tests below read what the job above kept.
    for path, text in before.items():
        path.write_text(text)


def test_a_job_goes_on_with_fewer_ranks_under_a_plan_of_its_own(planned, tmp_path):
    """Resumed halfway, --galvatron-auto measures, searches and trains as if nothing had changed."""
    directory, _, job, report, _ = planned
    again = tmp_path / "report.json"
    words = ["--galvatron-auto", "--galvatron-profile-dir", str(tmp_path), "--galvatron-report", str(again)]
    words += ["--load", str(saved_in(directory)), "--ckpt-step", str(HALFWAY)]
    resumed = run_ranks(1, [str(SMALL), *SIZES, *words])
    assert resumed.codes == [0], resumed.text[-3000:]
    assert "galvatron: plan (searched)" in resumed.text and resumed.errors == []
    before, after = (plan_from_dict(json.loads(path.read_text())["plan"]) for path in (report, again))
    assert (before.world_size, after.world_size) == (2, 1)
    assert list(resumed.losses) == list(range(HALFWAY + 1, 11))
    # Megatron logs the first two iterations of a job as their mean, with the second one.
    expected = {step: loss for step, loss in job.losses.items() if step > HALFWAY}
    expected[HALFWAY + 2] = (expected[HALFWAY + 1] + expected[HALFWAY + 2]) / 2
    assert resumed.losses == pytest.approx(expected, abs=5e-6)


def smallest_memory(costs: MeasuredCostModel, request: SearchRequest) -> int:
    """Bytes of a device below which nothing fits."""
    low, high = 0, 1 << 32
    while high - low > 1 << 10:
        middle = (low + high) // 2
        try:
            search(replace(request, memory_bytes=middle, names_nearest=False, runners_up=0), costs)
            high = middle
        except SearchError:
            low = middle
    return high


def test_what_fits_with_sharded_or_offloaded_states_alone_is_planned_so_and_trains(planned, tmp_path):
    directory, *_ = planned
    (profile_file,) = directory.glob("profile-*.json")
    profile = from_json(profile_file.read_text(), str(profile_file))
    fixed = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    bucket = 10_000
    words = [*SIZES, *fixed, "--overlap-grad-reduce", "--ddp-bucket-size", str(bucket), "--train-iters", "4"]
    options = RunOptions(implementation="local", overlap_gradients=True, bucket_elements=bucket)
    cluster = cluster_from_ranks(profile)
    model = model_from_arguments(parse_command_line(words))
    request = SearchRequest(
        model=model,
        world_size=2,
        devices_per_node=2,
        memory_bytes=1,
        global_batch_size=8,
        constraints=Constraints(tp=1, pp=1),
        allow_cp=False,
    )
    # What a step over states in host memory takes is measured by the job below; memory does not depend on it.
    step = StepPoint(tensors=1, parameters=10**6, updated=10**6, zero=1, seconds=1e-2)
    costs = MeasuredCostModel(model, cluster, replace(profile, host_steps=(step,)), options)
    least = [smallest_memory(costs, replace(request, max_zero=zero)) for zero in range(4)]
    assert least[3] < least[2] < least[1] < least[0]
    memory = ["--galvatron-memory-gb", repr((least[2] + least[3]) / 2 / 2**30)]
    report = tmp_path / "report.json"
    auto = ["--galvatron-auto", "--galvatron-profile-dir", str(directory), "--galvatron-report", str(report)]
    job = run_ranks(2, [str(SMALL), *words, *auto, *memory])
    assert job.codes == [0, 0], job.text[-3000:]
    found = json.loads(report.read_text())
    plan = plan_from_dict(found["plan"])
    assert 3 in {strategy.zero for strategy in (plan.base, *plan.strategies)} and not runs_on_stock_megatron(
        plan
    )
    assert max(found["memory_bytes"]) < least[2]
    assert "galvatron: plan (searched)" in job.text
    assert list(job.losses) == [1, 2, 3, 4] and job.losses[4] < job.losses[1]
    assert found["measured_step_seconds"] > 0

    store = tmp_path / "store"
    store.mkdir()
    shutil.copy(profile_file, store)
    with_host = smallest_memory(costs, replace(request, offloads=tuple(Offload)))
    assert with_host < least[3]
    memory = ["--galvatron-memory-gb", repr((with_host + least[3]) / 2 / 2**30)]
    auto = ["--galvatron-auto", "--galvatron-profile-dir", str(store), "--galvatron-report", str(report)]
    offloaded = run_ranks(2, [str(SMALL), *words, *auto, *memory, "--galvatron-offload", "parameters"])
    assert offloaded.codes == [0, 0], offloaded.text[-3000:]
    found = json.loads(report.read_text())
    plan = plan_from_dict(found["plan"])
    assert offloads(plan) and max(found["memory_bytes"]) < least[3]
    assert list(offloaded.losses) == [1, 2, 3, 4]
    assert offloaded.losses == pytest.approx(job.losses, abs=1e-5)
    # Of all that was measured before, only the step over states in host memory was missing.
    grown = from_json((store / profile_file.name).read_text(), "grown")
    assert len(grown.host_steps) == 2 and grown.parts == profile.parts and grown.steps == profile.steps


def test_the_deepspeed_launcher_gives_the_same_plan_and_losses(planned, tmp_path):
    _, words, job, report, saved = planned
    again = tmp_path / "report.json"
    own = deepspeed([str(SMALL), *SIZES, *words, "--galvatron-report", str(again)], ["--num_gpus", "2"])
    assert own.codes == [0], own.text[-3000:]
    # The same kind of job: it finds the plan that the one under torchrun made.
    assert "galvatron: plan (kept in" in own.text and own.errors == []
    assert json.loads(again.read_text())["plan"] == json.loads(report.read_text())["plan"]
    assert own.losses == pytest.approx(job.losses, abs=1e-5)
    hosts = tmp_path / "hosts"
    hosts.write_text("first slots=1\nsecond slots=1\n")
    nodes = [["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node)] for node in range(2)]
    two = deepspeed([str(SMALL), *SIZES, "--galvatron-plan", str(saved)], *nodes)
    assert two.codes == [0, 0] and two.errors == [], two.text[-3000:]
    assert two.losses == pytest.approx(job.losses, abs=1e-5)


def predicted_text(profile, plan):
    """How a job shows the step time of a plan under a profile."""
    model = model_from_arguments(parse_command_line(SIZES))
    costs = MeasuredCostModel(model, cluster_from_ranks(profile), profile, RunOptions(implementation="local"))
    return f"predicted: {estimate_plan(plan, costs).step_seconds * 1e3:.1f} ms a step"


def test_what_a_job_observed_is_merged_and_a_read_only_store_with_it_serves_the_next_search(
    planned, tmp_path, capsys
):
    directory, words, _, report, _ = planned
    (profile_file,) = directory.glob("profile-*.json")
    shutil.copy(profile_file, tmp_path)
    merge = ["calibrate", str(observed_in(directory)), "--profile-dir", str(tmp_path), "--json"]
    assert main(merge) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["ranks"] == 2 and told["step_seconds"] > 0
    before = from_json(profile_file.read_text(), "before")
    profile_file = tmp_path / profile_file.name
    merged = from_json(profile_file.read_text(), "merged")
    plan = plan_from_dict(json.loads(report.read_text())["plan"])
    observed = {point.part for point in merged.parts if point.source == "observed"}
    # A job with a pipeline has the tied weight twice and waits in its optimizer.
    alone = plan.pp == 1
    assert len(observed) == (3 if alone else 1) and ({"embedding", "head"} < observed) == alone
    assert any(step.source == "observed" for step in merged.steps) == alone
    assert predicted_text(merged, plan) != predicted_text(before, plan)
    assert merged.collectives == before.collectives
    store = tmp_path / "store"
    store.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(store)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        shutil.copy(profile_file, store)
        subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
        there = [*words, "--galvatron-profile-dir", str(store), "--galvatron-plan-only"]
        new = tmp_path / "new.yaml"
        job = run_ranks(2, [str(SMALL), *SIZES, *there, "--galvatron-save-plan", str(new)])
        assert job.codes == [0, 0] and "plan (searched)" in job.text, job.text[-3000:]
        assert "note: this plan is not kept" in job.text and "Read-only file system" in job.text
        chosen = read_plan(new)
        assert predicted_text(merged, chosen) in job.text
        lacking = run_ranks(2, [str(SMALL), *SIZES, *there, "--hidden-size", "128"])
        assert lacking.codes == [EXIT_CODE, EXIT_CODE], lacking.text[-3000:]
        # Every rank says the same, in a line of its own.
        assert len({line.partition(": ")[2] for line in lacking.errors}) == 1, lacking.errors
        assert "Traceback" not in lacking.text
        assert "lacks measurements of this job and cannot be written to (Read-only" in lacking.errors[0]
    finally:
        subprocess.run(["umount", str(store)], check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--galvatron-memory-gb", "0.0001"], "nothing fits"),
        (["--tensor-model-parallel-size", "3"], "tp is fixed by hand"),
        (["--pipeline-model-parallel-size", "2", "--num-layers", "1"], "pipeline"),
    ],
)
def test_a_failure_ends_every_rank_with_one_line(planned, words, message):
    directory, auto, _, _, _ = planned
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    job = run_ranks(2, [str(SMALL), *SIZES, *auto, *words])
    assert job.codes == [EXIT_CODE, EXIT_CODE], job.text[-3000:]
    assert len(job.errors) == 1 and message in job.errors[0]
    assert "Traceback" not in job.text
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_plan_file_whose_layers_differ_trains_like_a_uniform_one(tmp_path):
    # Not beside the chosen plan: Megatron draws other weights at every number of stages.
    job = run_ranks(2, [str(SMALL), *SIZES, "--micro-batch-size", "2"])
    assert job.codes == [0, 0], job.text[-3000:]
    path = tmp_path / "mixed.yaml"
    path.write_text(
        "{schema_version: 1, pp: 1, micro_batch_size: 2, micro_batches: 2, base: {tp: 1, dp: 2}, stages: [["
        "{count: 2, kind: block, tp: 1, dp: 2}, "
        "{count: 2, kind: block, tp: 2, dp: 1, sequence_parallel: megatron}]]}"
    )
    mixed = run_ranks(2, [str(SMALL), *SIZES, "--galvatron-plan", str(path)])
    assert mixed.codes == [0, 0], mixed.text[-3000:]
    assert "strategy per layer" in mixed.text
    assert mixed.losses == pytest.approx(job.losses, abs=1e-4)
    wrong = run_ranks(1, [str(SMALL), *SIZES, "--galvatron-plan", str(path)])
    assert wrong.codes == [EXIT_CODE]
    assert len(wrong.errors) == 1 and "made for 2 ranks" in wrong.errors[0]
