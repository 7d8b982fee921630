"""``galvatron calibrate`` on what jobs observed: the profile, and the price that a search reads off it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from profiles import FOUR_RANKS, small_model, small_profile

from galvatron_megatron.cli import main
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.describe.observation import FORMAT
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.describe.profile_key import layer_digest
from galvatron_megatron.describe.profile_store import profile_path, read_profile, write_profile
from galvatron_megatron.errors import EXIT_CODE
from galvatron_megatron.plan.strategy import Strategy

MODEL = small_model()
PROFILE = small_profile(MODEL)
SLOWER = 3.0


def records(
    rank: int, *, slower: float = SLOWER, started: str = "2026-02-01T00:00:00+00:00", **changes
) -> list:
    """What a rank writes whose layers take ``slower`` times what the profile says at tp 1, two samples."""
    job = {
        "record": "job",
        "format": FORMAT,
        "started": started,
        "rank": rank,
        "fingerprint": PROFILE.fingerprint(),
        "provenance": asdict(PROFILE.provenance),
    }
    layer = {
        "record": "layer",
        "step": 3,
        "layer": 0,
        "part": layer_digest(MODEL.layers[0]),
        "tp": 1,
        "sequence_parallel": "none",
        "recompute": "none",
        "micro_batch_size": 2,
        "left_out": "",
        # The last pass was disturbed; rank 1 is the slower one.
        "forward_seconds": [2e-3 * slower * (1 + 0.1 * (rank - 1))] * 4 + [1.0],
        "backward_seconds": [4e-3 * slower * (1 + 0.1 * (rank - 1))] * 4 + [1.0],
        "kept_bytes": [],
    }
    step = {"record": "step", "step": 3, "seconds": 0.5, "peak_bytes": 1 << 30}
    return [job, step, layer | changes]


def write(path: Path, entries: list) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def price(profile: Profile) -> float:
    """Seconds of a layer at tp 1, micro-batch 2, as the cost model of a search has them."""
    base = Strategy(dp=4)
    setting = Setting(pp=1, virtual_stages=1, base=base, micro_batch_size=2, micro_batches=1)
    costs = MeasuredCostModel(MODEL, FOUR_RANKS, profile, RunOptions(implementation="local"))
    return costs.layer_cost(0, base, setting).micro_batch_seconds


@pytest.fixture
def store(tmp_path: Path) -> Path:
    directory = tmp_path / "store"
    directory.mkdir()
    write_profile(directory, PROFILE)
    return directory


def layer_points(directory: Path) -> dict:
    profile, _ = read_profile(directory, PROFILE.fingerprint())
    return {point.key: point for point in profile.parts}


def calibrate(store: Path, *inputs: Path | str) -> int:
    return main(["calibrate", *map(str, inputs), "--profile-dir", str(store)])


def test_a_slowed_layer_changes_the_price_of_the_search(store: Path, tmp_path: Path, capsys) -> None:
    observed = tmp_path / "observed"
    observed.mkdir()
    for rank in (0, 1):
        write(observed / f"observed-rank{rank}.jsonl", records(rank))
    plans = {name: store / f"plan-{name}.json" for name in ("mine", "other")}
    for name, path in plans.items():
        mark = PROFILE.fingerprint() if name == "mine" else "another"
        path.write_text(json.dumps({"decision": {"plan": {"fingerprints": {"profile": mark}}}}))
    before = price(PROFILE)
    assert calibrate(store, observed) == 0
    assert "18.000" in capsys.readouterr().out
    points = layer_points(store)
    assert len(points) == len(PROFILE.parts)
    key = (layer_digest(MODEL.layers[0]), 1, "none", "none", 2)
    changed = [k for k, point in points.items() if point.source == "observed"]
    assert changed == [key]
    assert points[key].forward_seconds == pytest.approx(6e-3)
    assert points[key].backward_seconds == pytest.approx(12e-3)
    assert points[key].activation_bytes == 1_600_000
    # What was priced with the old numbers is searched again.
    assert not plans["mine"].exists() and plans["other"].exists()
    profile, _ = read_profile(store, PROFILE.fingerprint())
    assert price(profile) == pytest.approx(SLOWER * before, rel=1e-6)


def test_twice_is_once_and_a_later_job_wins(store: Path, tmp_path: Path) -> None:
    early = write(tmp_path / "early.jsonl", records(0, slower=5.0))
    late = write(tmp_path / "late.jsonl", records(0, started="2026-03-01T00:00:00+00:00"))
    for _ in range(2):
        assert calibrate(store, late, early) == 0
    points = layer_points(store)
    assert len(points) == len(PROFILE.parts)
    assert points[layer_digest(MODEL.layers[0]), 1, "none", "none", 2].forward_seconds == pytest.approx(5.4e-3)


def test_a_size_between_the_measured_ones_is_added(store: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", records(1, micro_batch_size=3, kept_bytes=[7] * 5))
    assert calibrate(store, path) == 0
    point = layer_points(store)[layer_digest(MODEL.layers[0]), 1, "none", "none", 3]
    assert (point.source, point.activation_bytes, point.transient_bytes) == ("observed", 7, 150_000)


def test_half_a_line_of_a_killed_job_is_no_error(store: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", records(1))
    path.write_text(path.read_text() + '{"record": "lay')
    assert calibrate(store, path) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "is empty"),
        (lambda lines: ["not JSON", *lines], ":1: not a record"),
        (lambda lines: lines[1:], ":1: not a record"),
        (lambda lines: [lines[0].replace("gloo", "nccl"), *lines[1:]], "fingerprint"),
        (lambda lines: [lines[0].replace('"format": 1', '"format": 9')], "format 9"),
        (lambda lines: [*lines[:2], lines[2].replace('s": [0', 's": [-0')], "seconds"),
        (
            lambda lines: [*lines[:2], lines[2].replace('"left_out": ""', '"left_out": "moves"')],
            "layer 0: moves",
        ),
        (lambda lines: [*lines[:2], lines[2].replace('"tp": 1', '"tp": 4')], "not measured"),
        (lambda lines: lines[:2], "no layer was observed"),
    ],
)
def test_wrong_files_are_refused_in_one_line(store: Path, tmp_path: Path, capsys, change, message) -> None:
    lines = write(tmp_path / "o.jsonl", records(1)).read_text().splitlines()
    path = tmp_path / "o.jsonl"
    path.write_text("".join(line + "\n" for line in change(lines)))
    before = profile_path(store, PROFILE.fingerprint()).read_bytes()
    assert calibrate(store, path) == EXIT_CODE
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert profile_path(store, PROFILE.fingerprint()).read_bytes() == before


def test_other_wrong_requests(store: Path, tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "o.jsonl", records(1))
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, message in (
        ([path, "--cluster", "h100"], "--cluster: goes with a CSV file"),
        ([empty], "has no .jsonl file"),
        ([path, tmp_path / "runs.csv"], "is no .jsonl file"),
        ([tmp_path / "none.jsonl"], "cannot be read"),
        ([tmp_path / "runs.csv"], "with --cluster"),
    ):
        assert calibrate(store, *words) == EXIT_CODE
        assert message in capsys.readouterr().err
    assert calibrate(empty, path) == EXIT_CODE
    assert f"no profile {PROFILE.fingerprint()}" in capsys.readouterr().err
