"""What happens around the steps of a mixed job: a rank that dies, and measurements that are asked for."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from ranks import free_port
from runtime_cases import LONG, MIXED, case
from runtime_rank import assert_same_training, references, train

pytestmark = pytest.mark.distributed
HALFWAY = 5


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


def test_layers_are_measured_on_request(ranks, tmp_path):
    steps, micro_batches = 3, 2
    made = case(
        "observed",
        "modern",
        "tp1",
        ["tp1", "tp2+megatron recompute-full", "tp4", "tp2+ulysses"],
        arguments={"train-iters": steps},
        late_arguments={"galvatron_observe": str(tmp_path)},
    )
    ranks(4).run(train, made)
    for rank in range(4):
        lines = (tmp_path / f"layers-rank{rank}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        seen = Counter((record["step"], record["layer"], record["pass"]) for record in records)
        assert seen == {
            (step, layer, kind): micro_batches
            for step in range(steps)
            for layer in range(4)
            for kind in ("forward", "backward")
        }
        assert all(record["seconds"] > 0 for record in records)
