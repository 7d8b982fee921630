"""``galvatron calibrate`` on what jobs observed: the profile, and the price that a search reads off it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from profiles import FOUR_RANKS, small_model, small_profile

from galvatron_megatron.cli import main
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.describe.observation import FORMAT
from galvatron_megatron.describe.profile import EMBEDDING, HEAD, Profile
from galvatron_megatron.describe.profile_key import layer_digest
from galvatron_megatron.describe.profile_store import profile_path, read_profile, write_profile
from galvatron_megatron.errors import EXIT_CODE
from galvatron_megatron.plan.strategy import Strategy

MODEL = small_model()
PROFILE = small_profile(MODEL)
SLOWER = 3.0


def job_record(rank: int, *, started: str, profile: Profile = PROFILE, pp: int = 1) -> dict:
    return {
        "record": "job",
        "format": FORMAT,
        "started": started,
        "rank": rank,
        "pp": pp,
        "fingerprint": profile.fingerprint(),
        "provenance": asdict(profile.provenance),
    }


def records(
    rank: int, *, slower: float = SLOWER, started: str = "2026-02-01T00:00:00+00:00", **changes
) -> list:
    """What a rank writes whose layers take ``slower`` times what the profile says at tp 1, two samples."""
    job = job_record(rank, started=started)
    layer = {
        "record": "part",
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


BASE = Strategy(dp=4)
SETTING = Setting(pp=1, virtual_stages=1, base=BASE, micro_batch_size=2, micro_batches=1)


def costs(profile: Profile) -> MeasuredCostModel:
    """The cost model of a search."""
    return MeasuredCostModel(MODEL, FOUR_RANKS, profile, RunOptions(implementation="local"))


def price(profile: Profile) -> float:
    """Seconds of a layer at tp 1, micro-batch 2."""
    return costs(profile).layer_cost(0, BASE, SETTING).micro_batch_seconds


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


def test_embedding_head_and_optimizer_change_the_price_of_the_search(store: Path, tmp_path: Path) -> None:
    own = {"forward_seconds": [4e-3] * 3, "backward_seconds": [5e-3] * 3}
    first, _, layer = records(0)
    ends = [layer | own | {"part": part} for part in (EMBEDDING, HEAD)]
    known = PROFILE.steps[1]
    update = asdict(known) | {"left_out": "", "seconds": 7 * known.seconds}
    entries = [first, *ends, *[{"record": "optimizer", "step": 3, **update}] * 3]
    before = costs(PROFILE)
    assert calibrate(store, write(tmp_path / "o.jsonl", entries)) == 0
    profile, _ = read_profile(store, PROFILE.fingerprint())
    after = costs(profile)
    for name in ("embedding_cost", "head_cost"):
        # They took 0.1 + 0.2 ms a sample.
        old, new = (getattr(model, name)(SETTING) for model in (before, after))
        assert old.micro_batch_seconds == pytest.approx(0.6e-3)
        assert new.micro_batch_seconds == pytest.approx(9e-3)
        assert (old.state_bytes, old.transient_bytes) == (new.state_bytes, new.transient_bytes)
    (observed,) = [point for point in profile.steps if point.source == "observed"]
    assert observed.key == known.key and len(profile.steps) == len(PROFILE.steps)
    assert observed.seconds == pytest.approx(7 * known.seconds)
    # All that a rank updates at once: its layer pays for the optimizer.
    assert after.layer_cost(0, BASE, SETTING).sync_seconds > before.layer_cost(0, BASE, SETTING).sync_seconds


def test_an_optimizer_that_was_not_profiled_is_left_to_the_profiler(
    store: Path, tmp_path: Path, capsys
) -> None:
    update = {"tensors": 12, "parameters": 9, "updated": 9, "zero": 2, "seconds": 1.0, "left_out": ""}
    step = {"record": "optimizer", "step": 3, **update}
    assert calibrate(store, write(tmp_path / "o.jsonl", [*records(1), *[step] * 3])) == 0
    assert "the profile has none of ZeRO 2" in capsys.readouterr().out
    assert read_profile(store, PROFILE.fingerprint())[0].steps == PROFILE.steps


def test_all_jobs_are_checked_before_one_is_written(store: Path, tmp_path: Path, capsys) -> None:
    other = small_profile(small_model(tied=False))
    write_profile(store, other)
    good = write(tmp_path / "good.jsonl", records(1))
    layer = records(1, tp=4)[2]
    late = job_record(1, started="2027-01-01T00:00:00+00:00", profile=other)
    bad = write(tmp_path / "bad.jsonl", [late, layer])
    before = {path: path.read_bytes() for path in store.glob("*.json")}
    assert len(before) == 2
    assert calibrate(store, good, bad) == EXIT_CODE
    assert "nothing in it can be merged" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in store.glob("*.json")} == before
    bad.write_text(bad.read_text().replace('"tp": 4', '"tp": 1'))
    assert calibrate(store, good, bad) == 0
    assert all(path.read_bytes() != text for path, text in before.items())


def test_stages_that_share_processors_say_nothing(tmp_path: Path, capsys) -> None:
    place = PROFILE.provenance
    crowded = replace(PROFILE, provenance=replace(place, processors_per_node=place.ranks_per_node // 2))
    store = tmp_path / "store"
    store.mkdir()
    write_profile(store, crowded)
    started = "2026-02-01T00:00:00+00:00"
    for pp, code in ((2, EXIT_CODE), (1, 0)):
        entries = [job_record(1, started=started, profile=crowded, pp=pp), *records(1)[1:]]
        assert calibrate(store, write(tmp_path / "o.jsonl", entries)) == code
        assert ("CPU ranks share processors" in capsys.readouterr().err) == bool(code)


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
        (lambda lines: [lines[0].replace(f'"format": {FORMAT}', '"format": 9')], "format 9"),
        (lambda lines: [*lines[:2], lines[2].replace('s": [0', 's": [-0')], "seconds"),
        (
            lambda lines: [*lines[:2], lines[2].replace('"left_out": ""', '"left_out": "moves"')],
            "layer 0: moves",
        ),
        (lambda lines: [*lines[:2], lines[2].replace('"tp": 1', '"tp": 4')], "not measured"),
        (lambda lines: lines[:2], "nothing was observed"),
    ],
)
def test_wrong_files_are_refused_in_one_line(store: Path, tmp_path: Path, capsys, change, message) -> None:
    lines = write(tmp_path / "o.jsonl", records(1)).read_text().splitlines()
    assert f'"format": {FORMAT}' in lines[0]
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
    table = tmp_path / "runs.csv"
    table.write_text("")
    for words, message in (
        ([path, "--cluster", "h100"], "--cluster: goes with a CSV file"),
        ([empty], "has no .jsonl file"),
        ([path, "--folds", 3], "--folds: goes with a CSV file"),
        ([path, table], "is no .jsonl file"),
        ([tmp_path / "none.jsonl"], "does not exist"),
        ([tmp_path / "emtpy"], f"does not exist; did you mean {empty}?"),
        ([path, tmp_path / "emtpy"], f"does not exist; did you mean {empty}?"),
        ([table], "with --cluster"),
    ):
        assert calibrate(store, *words) == EXIT_CODE
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert calibrate(empty, path) == EXIT_CODE
    assert f"no profile {PROFILE.fingerprint()}" in capsys.readouterr().err
