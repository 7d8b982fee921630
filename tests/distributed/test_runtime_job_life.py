"""What happens around the steps of a mixed job: a rank that dies, and measurements that are asked for."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
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


OBSERVED_STEPS, WRITTEN = 5, 3
"""Steps of an observed job, and those of them that are written."""
OBSERVED = {
    # name: base layout, layers by stage and chunk, and the rest of the case
    "differing": ("tp1", [["tp1", "tp2+megatron recompute-full", "tp4", "tp2+ulysses"]], {}),
    "tensor": ("tp2+megatron zero1", [["tp2+megatron zero1"] * 2], {}),
    # Two layers are recomputed together in every chunk.
    "overlapped": (
        "tp1 zero1",
        [["tp1 zero1 recompute-full"] * 2] * 4,
        {"pp": 2, "virtual": 2, "micro_batches": 4},
    ),
}
ARGUMENTS = {
    "differing": {},
    "tensor": {},
    "overlapped": {
        **dict.fromkeys(("overlap-grad-reduce", "overlap-param-gather"), True),
        "recompute-granularity": "full",
        "recompute-method": "uniform",
        "recompute-num-layers": 2,
    },
}


@pytest.fixture(scope="module")
def observed(ranks, tmp_path_factory):
    """What the ranks of every job wrote: by name and rank, the job's record and the others."""
    directory = tmp_path_factory.mktemp("observed")
    found = {}
    for name, (base, stages, options) in OBSERVED.items():
        made = case(
            name,
            "modern",
            base,
            *stages,
            observe=str(directory / name),
            detached=name != "differing",
            arguments={"train-iters": OBSERVED_STEPS, **ARGUMENTS[name]},
            **options,
        )
        ranks(4).run(train, made)
        files = [directory / name / f"observed-rank{rank}.jsonl" for rank in range(4)]
        lines = [list(map(json.loads, file.read_text().splitlines())) for file in files]
        found[name] = [(job, records) for job, *records in lines], read_observed(files)[0]
    return found


def of_kind(records, kind):
    return [record for record in records if record["record"] == kind]


def parts_of(records):
    """Records of parts by layer, ``embedding`` or ``head``; of every step that is written there is one."""
    found = defaultdict(list)
    for record in of_kind(records, "part"):
        found[record.get("layer", record["part"])].append(record)
    steps = list(range(OBSERVED_STEPS - WRITTEN + 1, OBSERVED_STEPS + 1))
    assert all([record["step"] for record in entries] == steps for entries in found.values())
    return found


def how(record):
    return tuple(record[name] for name in ("tp", "sequence_parallel", "recompute", "micro_batch_size"))


def passes(entries):
    """How many forward and backward passes of a part every step wrote."""
    times = [(entry["forward_seconds"], entry["backward_seconds"]) for entry in entries]
    assert all(seconds > 0 for pair in times for series in pair for seconds in series)
    (counts,) = {tuple(map(len, pair)) for pair in times}
    return counts


def test_layers_that_differ_are_observed(observed):
    for rank, (job, records) in enumerate(observed["differing"][0]):
        assert job["record"] == "job" and job["rank"] == rank and job["pp"] == 1
        assert job["provenance"]["ranks_per_node"] == 4 and job["provenance"]["software"]
        parts = parts_of(records)
        assert {part: how(entries[0]) for part, entries in parts.items()} == {
            "embedding": (1, "none", "none", 1),
            0: (1, "none", "none", 1),
            1: (2, "megatron", "full", 2),
            2: (4, "none", "none", 4),
            3: (2, "ulysses", "none", 2),
            "head": (1, "none", "none", 1),
        }
        assert {passes(entries) for entries in parts.values()} == {(2, 2)}
        left_out = {part: entries[0]["left_out"] for part, entries in parts.items()}
        assert left_out["embedding"] == left_out[0] == left_out["head"] == ""
        assert "resharding" in left_out[1]
        steps = of_kind(records, "step")
        assert all(r["seconds"] > 0 and r["peak_bytes"] > 0 for r in steps) and len(steps) == WRITTEN
        assert all("optimizers of their own" in r["left_out"] for r in of_kind(records, "optimizer"))


def test_tensor_and_sequence_parallel_layers_and_the_optimizer_are_observed(observed):
    by_rank, job = observed["tensor"]
    for _, records in by_rank:
        parts = parts_of(records)
        assert set(parts) == {"embedding", 0, 1, "head"}
        assert {(*how(r[0]), r[0]["left_out"], passes(r)) for r in parts.values()} == {
            (2, "megatron", "none", 2, "", (2, 2))
        }
        for step, update in zip(of_kind(records, "step"), of_kind(records, "optimizer"), strict=True):
            inside = [
                sum(entry["forward_seconds"] + entry["backward_seconds"])
                for entry in of_kind(records, "part")
                if entry["step"] == step["step"]
            ]
            # Nothing counts twice: all parts and the optimizer are less than the step that they are in.
            assert update["seconds"] > 0
            assert update["seconds"] + sum(inside) < step["seconds"]
    assert job.ranks == 4 and job.step_seconds > 0 and job.left_out == ()
    assert sorted(setting.passes for setting in job.settings) == [4 * 2 * WRITTEN] * 2 + [4 * 2 * 2 * WRITTEN]
    (update,) = job.optimizers
    # Half of the 64 padded rows of width 32, twice; final norm; two layers of norms and of halved matrices.
    layer = 2 * 32 + (4 * 32 * 32 + 3 * 32 * 64) // 2
    assert update.parameters == 2 * 64 * 32 // 2 + 32 + 2 * layer
    assert (update.zero, update.updated) == (1, update.parameters // 2)


def test_of_interleaved_stages_only_passes_beside_no_collective_are_taken(observed):
    by_rank, job = observed["overlapped"]
    for rank, (_, records) in enumerate(by_rank):
        parts = parts_of(records)
        stage = rank // 2
        first, second = ([2 * stage, 2 * stage + 1], [4 + 2 * stage, 4 + 2 * stage + 1])
        ends = ["embedding"] if stage == 0 else ["head"]
        assert set(parts) == {*first, *second, *ends}
        assert {how(parts[layer][0]) for layer in (*first, *second)} == {(1, "none", "full", 1)}
        # Four micro-batches. Two pass through the first chunk before the second one begins, with the last
        # parameters to be gathered; that one has reduced its gradients when two are left for the first.
        assert [passes(parts[layer]) for layer in (*first, *second)] == [(2, 2)] * 2 + [(3, 3)] * 2
        assert passes(parts[ends[0]]) == ((2, 2) if stage == 0 else (3, 3))
        assert all("stages" in entry["left_out"] for entry in of_kind(records, "optimizer"))
    (layers,) = [found for found in job.settings if found.setting[3].value == "full"]
    assert job.pp == 2 and layers.passes == 4 * 2 * (2 + 3) * WRITTEN
    assert {found.setting[0] for found in job.settings} > {"embedding", "head"}
    # What is recomputed is part of the backward pass.
    assert layers.backward_seconds > layers.forward_seconds
