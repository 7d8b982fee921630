"""What happens around the steps of a mixed job: a rank that dies, and measurements that are asked for."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from ranks import Ranks, free_port
from runtime_cases import LONG, MIXED, case
from runtime_rank import assert_same_training, references, train

from galvatron_megatron.describe.observation import read_observed

pytestmark = pytest.mark.distributed
HALFWAY = 5


def threads(_rank, _world_size):
    """Runs on every rank: how many threads the process has."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_detached_plan_leaves_no_groups_behind():
    made = case("left", "modern", "tp1", ["tp1", "tp1 zero1", "tp1", "tp1"], arguments={"train-iters": 1})
    alone, counts = Ranks(1), []
    try:
        for _ in range(2):
            assert alone.run(train, made)[0]["planned"]
            counts += alone.run(threads)
    finally:
        alone.close()
    # Megatron's cache of rotary embeddings keeps one group of three threads; a model would keep twenty.
    assert counts[1] - counts[0] <= 6


def test_a_killed_rank_ends_the_job_and_the_checkpoint_loads(ranks, tmp_path):
    expected = references(ranks)["modern"]
    made = case(
        "killed",
        "modern",
        "tp1",
        MIXED,
        arguments={"save": str(tmp_path / "saved"), "save-interval": HALFWAY, "train-iters": LONG},
        dies={"rank": 2, "calls": 2 * HALFWAY + 3},  # the second micro-batch of the seventh step
    )
    file = tmp_path / "case.json"
    file.write_text(json.dumps(made))
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--master-port", str(free_port()), str(here / "runtime_torchrun.py"), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
    begin = time.monotonic()
    job = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, check=False)
    assert job.returncode != 0
    assert time.monotonic() - begin < 120
    first_failure = job.stderr.partition("Root Cause")[2]
    assert "rank      : 2" in first_failure, job.stderr[-3000:]
    assert "Signal 9 (SIGKILL)" in first_failure
    resumed = case(
        "resumed",
        "modern",
        "tp2",
        ["tp4+megatron", "tp1", "tp2", "tp1"],
        arguments={"load": str(tmp_path / "saved"), "override-opt-param-scheduler": True, "train-iters": LONG},
    )
    seen = ranks(4).run(train, resumed)[0]
    assert_same_training(seen, expected, slice(HALFWAY, None))


def test_reductions_and_gathers_of_neighbours_are_under_way_while_activations_move(ranks):
    arguments = {"overlap-grad-reduce": True, "overlap-param-gather": True, "train-iters": 3}
    layers = ["tp1 zero1", "tp2 zero1", "tp1", "tp2+ulysses"]
    made = case("watched", "modern", "tp1 zero1", layers, arguments=arguments, watch=True)
    late = {**made, "mutation": "late_gathers"}
    for seen, mistaken in zip(ranks(4).run(train, made), ranks(4).run(train, late), strict=True):
        moves = seen["exchanges"]
        assert all(move["held_back"] for move in moves)
        assert any(move["backward"] and move["reduced"] for move in moves)
        assert any(not move["backward"] and move["gathered"] for move in moves)
        assert not any(move["gathered"] for move in mistaken["exchanges"])


def observed(directory, name, *stages, **options):
    """A case whose layers are watched."""
    return case(name, "modern", "tp1", *stages, observe=str(directory / name), **options)


def records_of(directory, name, rank):
    lines = (directory / name / f"observed-rank{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_layers_are_observed_with_and_without_a_plan(ranks, tmp_path):
    steps, written = 5, 3
    arguments = {"train-iters": steps}
    ways = {
        "differing": ["tp1", "tp2+megatron recompute-full", "tp4", "tp2+ulysses"],
        "stock": ["tp1"] * 4,
    }
    recomputed = {**arguments, "recompute-granularity": "full", "recompute-method": "uniform"}
    cases = [
        observed(tmp_path, "differing", ways["differing"], arguments=arguments),
        observed(
            tmp_path,
            "stock",
            *(["tp1"] * 2,) * 2,
            pp=2,
            detached=True,
            arguments={**recomputed, "recompute-num-layers": 2},
        ),
    ]
    for made in cases:
        ranks(4).run(train, made)
    for rank in range(4):
        job, *records = records_of(tmp_path, "differing", rank)
        assert job["record"] == "job" and job["rank"] == rank
        assert job["provenance"]["ranks_per_node"] == 4 and job["provenance"]["software"]
        layers = [record for record in records if record["record"] == "layer"]
        assert Counter((entry["step"], entry["layer"]) for entry in layers) == {
            (step, layer): 1 for step in range(steps - written + 1, steps + 1) for layer in range(4)
        }
        for entry in layers:
            assert len(entry["forward_seconds"]) == len(entry["backward_seconds"]) == 2
            assert min(*entry["forward_seconds"], *entry["backward_seconds"]) > 0
        seen = {e["layer"]: (e["tp"], e["sequence_parallel"], e["recompute"]) for e in layers}
        assert seen == {
            0: (1, "none", "none"),
            1: (2, "megatron", "full"),
            2: (4, "none", "none"),
            3: (2, "ulysses", "none"),
        }
        assert layers[0]["left_out"] == "" and "resharding" in layers[1]["left_out"]
        step_records = [record for record in records if record["record"] == "step"]
        assert all(r["seconds"] > 0 and r["peak_bytes"] > 0 for r in step_records)
        assert len(step_records) == written
        # Two layers are recomputed together in each stage: their repeated forward is part of the backward pass.
        _, *records = records_of(tmp_path, "stock", rank)
        layers = [record for record in records if record["record"] == "layer"]
        assert {entry["layer"] for entry in layers} == ({0, 1} if rank < 2 else {2, 3})
        assert {(entry["recompute"], entry["left_out"]) for entry in layers} == {("full", "")}
        assert {len(entry["forward_seconds"]) for entry in layers} == {2}
        assert {len(entry["backward_seconds"]) for entry in layers} == {2}
    (job,) = read_observed([tmp_path / "stock" / f"observed-rank{rank}.jsonl" for rank in range(4)])
    assert job.ranks == 4 and job.step_seconds > 0
    (found,) = job.settings
    assert found.passes == 4 * 2 * 2 * written
    assert found.backward_seconds > found.forward_seconds
