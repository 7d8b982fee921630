"""Profiling on live CPU ranks, with real Megatron layers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from galvatron_megatron.cost.measured_points import PartTable
from galvatron_megatron.describe.profile import EMBEDDING, HEAD
from galvatron_megatron.describe.profile_key import layer_digest
from galvatron_megatron.describe.profile_store import list_profiles, profile_path, read_profile
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel

WORDS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 200 --tokenizer-type NullTokenizer --mock-data --lr 1e-4 --micro-batch-size 1"
)
MEGATRON = WORDS.split()
pytestmark = pytest.mark.alone


def parsed(*more: str) -> Namespace:
    from megatron.training.arguments import parse_args

    from galvatron_megatron.integration import cpu_device

    before, sys.argv = sys.argv, ["script", *MEGATRON, *more]
    try:
        arguments = parse_args()
    finally:
        sys.argv = before
    cpu_device.configure(arguments)
    return arguments


def measure(
    rank: int,
    world_size: int,
    directory: str,
    *more: str,
    sizes: tuple[int, ...] = (1, 2),
    tps: tuple[int, ...] | None = None,
    ulysses: tuple[int, ...] = (2,),
):
    """Profiles; returns model, profile, cluster and seconds."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from galvatron_megatron.describe.megatron_args import model_from_arguments
    from galvatron_megatron.profiler.needs import ProfileNeeds
    from galvatron_megatron.profiler.session import profile_live_ranks

    arguments = parsed(*more)
    before = dict(vars(arguments))
    model = model_from_arguments(vars(arguments))
    needs = ProfileNeeds.for_job(
        model,
        world_size,
        8,
        micro_batch_sizes=sizes,
        tps=tps,
        ulysses=ulysses if world_size > 1 else (),
        host_step=True,
    )
    groups = len(dist.distributed_c10d._world.pg_map)
    state = torch.get_rng_state()
    started = time.perf_counter()
    profile, cluster = profile_live_ranks(
        model, arguments, needs, Path(directory), show=False, seconds_per_point=0.02, timeout_seconds=100
    )
    seconds = time.perf_counter() - started
    assert vars(arguments) == before
    assert not parallel_state.model_parallel_is_initialized()
    assert len(dist.distributed_c10d._world.pg_map) == groups
    assert torch.equal(torch.get_rng_state(), state)
    # Megatron makes its own groups in the same process afterwards.
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    return model, profile, cluster, seconds


@pytest.fixture(scope="module")
def first(ranks, tmp_path_factory) -> tuple[Path, list]:
    """A store and what two ranks measured into it."""
    directory = tmp_path_factory.mktemp("store")
    return directory, ranks(2).run(measure, str(directory))


@pytest.mark.distributed
def test_two_ranks_measure_everything_once(ranks, first):
    directory, answers = first
    model, profile, cluster, first_seconds = answers[0]
    assert all(answer[1:3] == (profile, cluster) for answer in answers)
    assert (cluster.nodes, cluster.devices_per_node) == (1, 2)
    # The host as measured with both ranks at work: a copy inside memory, as fast as a device's own to a factor.
    assert cluster.host.source == "measured" and cluster.host.memory_gib > 0.5
    assert 0.05 < cluster.host.gb_per_second / cluster.device.memory_gb_per_second < 20
    assert read_profile(directory, profile.fingerprint()) == (profile, "")
    assert not [point for point in profile.parts if point.failure]
    layer = layer_digest(model.layers[0])
    engines = {point.key: point for point in profile.engines if not point.failure}
    assert engines.keys() == {(part, zero) for part in (EMBEDDING, layer, HEAD) for zero in (2, 3)}
    # Stage 2 has hooks on gradients alone, stage 3 on some 20 modules of a layer, tens of microseconds each.
    assert engines[layer, 2].backward_seconds > 0
    assert 2e-4 < engines[layer, 3].forward_seconds < 0.1
    assert 2e-4 < engines[layer, 3].backward_seconds < 0.1
    points = {point.key: point for point in profile.parts}
    for tp, kind in ((1, "none"), (2, "none"), (2, "megatron")):
        for size in (1, 2):
            plain = points[layer, tp, kind, "none", size]
            full = points[layer, tp, kind, "full", size]
            selective = points[layer, tp, kind, "selective", size]
            assert plain.forward_seconds > 0 and plain.backward_seconds > 0
            # Only the output of the layer is kept: sequence x samples x hidden x 4 bytes, or its share.
            output = 32 * size * 64 * 4 // (tp if kind == "megatron" else 1)
            # (gloo may hold a tensor a moment longer than its caller does.)
            assert output <= full.activation_bytes <= 2 * output
            assert full.activation_bytes < selective.activation_bytes < plain.activation_bytes
            assert full.transient_bytes > plain.transient_bytes
            assert {EMBEDDING, HEAD} <= {p.part for p in profile.parts if p.tp == tp}
    # Under Ulysses a rank has the weights, and of activations, the kept ones included, its share alone.
    exchanged = [point for point in profile.parts if point.sequence_parallel is SequenceParallel.ULYSSES]
    assert {(p.part, p.tp, p.recompute, p.micro_batch_size) for p in exchanged} == {
        (layer, 2, Recompute.NONE, size) for size in (1, 2)
    }
    table = PartTable(profile)
    for point in exchanged:
        alone = points[layer, 1, "none", "none", point.micro_batch_size]
        assert point.forward_seconds > 0 and point.backward_seconds > 0
        assert (point.parameters, point.tensors) == (alone.parameters, alone.tensors)
        # (gloo may hold a tensor a moment longer than its caller does.)
        assert 0.99 <= 2 * point.activation_bytes / alone.activation_bytes <= 1.3
        for recompute in Recompute:
            found = table.lookup(layer, 2, SequenceParallel.ULYSSES, recompute, point.micro_batch_size)
            assert found.forward_seconds == pytest.approx(point.forward_seconds)
            assert found.backward_seconds >= point.backward_seconds * (1 - 1e-9)
            assert found.activation_bytes <= point.activation_bytes
    # 4 h^2 + 8 h^2 weights, 9 h + 4 h biases and norms, all but 6 h of them split over tp.
    whole, half = (points[layer, tp, "none", "none", 1] for tp in (1, 2))
    assert whole.parameters == 12 * 64**2 + 13 * 64
    assert half.parameters == (whole.parameters - 6 * 64) // 2 + 6 * 64
    assert whole.tensors == 12
    assert points[EMBEDDING, 1, "none", "none", 1].parameters == (model.padded_vocab_size(1) + 32) * 64
    assert {(c.collective, c.ranks, c.stride) for c in profile.collectives} >= {
        ("all_reduce", 2, 1),
        ("all_gather", 2, 1),
        ("reduce_scatter", 2, 1),
        ("send", 2, 1),
    }
    assert {overlap.collective for overlap in profile.overlaps} == {
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "send",
    }
    assert {step.zero for step in profile.steps} == {0, 1}
    # States in host memory: all of a rank's, and a quarter of them.
    large = -(-model.parameter_count() // 2)
    small, whole = profile.host_steps
    assert (small.updated, whole.updated) == (large // 4, large)
    assert small.seconds > 0 and whole.seconds < 1e-6 * large + 0.1
    again = ranks(2).run(measure, str(directory))
    assert again[0][1] == profile
    assert again[0][3] < first_seconds / 3


@pytest.mark.distributed
def test_more_sizes_add_to_the_profile(ranks, first):
    directory, answers = first
    small = answers[0][1]
    large = ranks(2).run(measure, str(directory), sizes=(1, 2, 4))[0][1]
    assert {p.key for p in small.parts} < {p.key for p in large.parts}
    assert [p for p in large.parts if p.key in {q.key for q in small.parts}] == list(small.parts)
    assert large.collectives == small.collectives


@pytest.mark.distributed
def test_a_damaged_profile_is_measured_again_on_the_next_run(ranks, first, tmp_path):
    profile = first[1][0][1]
    path = profile_path(tmp_path, profile.fingerprint())
    path.write_text(profile_path(first[0], profile.fingerprint()).read_text()[:1000])
    again = ranks(2).run(measure, str(tmp_path), sizes=(1,), tps=(1,), ulysses=())[0][1]
    assert {p.key for p in again.parts} == {
        p.key for p in profile.parts if p.tp == 1 and p.micro_batch_size == 1
    }
    assert [p.name for p in tmp_path.iterdir() if "damaged" in p.name]


@pytest.mark.distributed
def test_what_runs_out_of_memory_is_recorded_and_the_next_is_measured(ranks, tmp_path):
    # More bytes than a process can address: the processor's allocator really refuses.
    huge = 1 << 40
    answers = ranks(2).run(measure, str(tmp_path), sizes=(1, huge))
    _, profile, _, _ = answers[0]
    assert answers[1][1] == profile
    by_size = {size: [p for p in profile.parts if p.micro_batch_size == size] for size in (1, huge)}
    assert {p.failure for p in by_size[huge]} == {"out of memory"}
    assert {p.failure for p in by_size[1]} == {""}
    # The failures came in between: every layout and recomputation has both.
    layers = [{p.key[:-1] for p in points} for points in by_size.values()]
    assert layers[0] == layers[1]
    assert {step.zero for step in profile.steps} == {0, 1}


@pytest.mark.distributed
def test_hybrid_layers_are_measured_by_kind(ranks, tmp_path):
    words = ("--hybrid-layer-pattern", "*-*-", "--position-embedding-type", "none")
    model, profile, _, _ = ranks(2).run(measure, str(tmp_path), *words, sizes=(1,), tps=(1,))[0]
    assert len(set(model.layers)) == 2
    measured = {p.part for p in profile.parts if not p.failure}
    names = {layer_digest(layer) for layer in model.layers}
    assert names <= measured
    # Under Ulysses too: attention exchanges heads, what has none runs on its slice of the sequence.
    assert names == {p.part for p in profile.parts if p.sequence_parallel is SequenceParallel.ULYSSES}
    assert not [p for p in profile.parts if p.failure]


def fail_on_rank_0(rank: int, world_size: int, directory: str) -> str:
    from galvatron_megatron.errors import GalvatronError

    try:
        measure(rank, world_size, directory)
    except GalvatronError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_an_unusable_store_ends_every_rank_with_the_same_error(ranks, tmp_path):
    answers = ranks(2).run(fail_on_rank_0, str(tmp_path / "missing"))
    assert answers[0] and len(set(answers)) == 1
    assert "does not exist" in answers[0]


def start(directory: Path, ranks: int = 1, options: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "galvatron_megatron",
        "profile",
        "--ranks",
        str(ranks),
        "--directory",
        str(directory),
    ]
    command += ["--micro-batch-size", "1", "--micro-batch-size", "2", *options, "--", *MEGATRON]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if ranks > 1 else subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.distributed
def test_killed_at_twenty_moments_a_session_loses_nothing(tmp_path):
    script = Path(__file__).with_name("profile_kills.py")
    tests = script.parents[1]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "20"],
        env=os.environ
        | {"PYTHONPATH": f"{tests}:{script.parent}", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # The blows fell on sessions at work, not only on their beginnings.
    assert int(done.stdout.split()[-1]) >= 3


@pytest.mark.distributed
def test_a_killed_command_goes_on_without_loss(tmp_path):
    process = start(tmp_path)
    deadline = time.monotonic() + 100
    # Wait for progress, then strike at a random moment of the measurements.
    while not grown(tmp_path, set()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.Random(1).random() * 0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    profiles = list_profiles(tmp_path)
    # Whatever file is there can be read.
    assert len(profiles) == len(list(tmp_path.glob("profile-*.json")))
    seen = {p.key for profile in profiles for p in (*profile.parts, *profile.steps)}
    assert seen
    process = start(tmp_path, options=("--offload",))
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "1 in host memory" in out.decode()
    (profile,) = list_profiles(tmp_path)
    assert len(profile.host_steps) == 2
    assert seen <= {p.key for p in (*profile.parts, *profile.steps)}
    recomputes = {p.recompute for p in profile.parts if p.part not in (EMBEDDING, HEAD)}
    assert recomputes == set(Recompute)
    assert {p.sequence_parallel for p in profile.parts} == {SequenceParallel.NONE}
    started = time.perf_counter()
    process = start(tmp_path, options=("--plot", str(tmp_path / "curves.png")))
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    process.stdout.close()
    assert time.perf_counter() - started < 30


def children(parent: int) -> list[int]:
    """Process ids of a process's children."""
    tasks = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(word) for word in tasks.read_text().split()] if tasks.exists() else []


@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_command_with_one_line(tmp_path):
    process = start(tmp_path, ranks=2)
    deadline = time.monotonic() + 100
    while not grown(tmp_path, set()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    # Rank 0 alone shows how far the session is.
    assert error.decode().count("measurements to make") == 1
    last = error.decode().strip().splitlines()[-1]
    assert last.startswith("galvatron profile: ") and "rank" in last
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert list_profiles(tmp_path)


def hang(directory: Path, stopped: int) -> None:
    """Stops one of two ranks for good and waits for the end of the command."""
    process = start(directory, ranks=2, options=("--rank-timeout", "4"))
    deadline = time.monotonic() + 100
    while not list_profiles(directory) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[stopped], signal.SIGSTOP)
    kept = list_profiles(directory)
    began = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 4 + 3 + 5 + 10
    assert process.returncode == 2
    last = error.decode().strip().splitlines()[-1]
    assert last.startswith(
        f"galvatron profile: profile: rank {1 - stopped} of 2 waited in vain for rank {stopped} "
    )
    assert "while measuring " in last and "at most 4 s" in last and "what was measured is kept" in last
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    (after,) = list_profiles(directory)
    assert {curve.key for profile in kept for curve in profile.collectives} <= {
        c.key for c in after.collectives
    }
    assert after.speeds and not list(directory.glob(".*.tmp"))


@pytest.mark.distributed
def test_a_rank_that_hangs_ends_the_others_in_time_and_is_named(tmp_path):
    # Rank 0 also serves the rendezvous store, which knows no time limit while it hangs.
    directories = [tmp_path / str(stopped) for stopped in range(2)]
    for directory in directories:
        directory.mkdir()
    with ThreadPoolExecutor(2) as both:
        list(both.map(hang, directories, range(2)))


def grown(directory: Path, seen: set) -> bool:
    """True once there is a measurement that was not there before."""
    for path in directory.glob("profile-*.json"):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if len(content["parts"]) + len(content["steps"]) > len(seen):
            return True
    return False
