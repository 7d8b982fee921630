import errno
import os
from pathlib import Path

import pytest

from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.decision import Decision, DecisionStore
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Strategy

LAYER = LayerPlan(kind=LayerKind.BLOCK, strategy=Strategy(tp=1, dp=2))
DECISION = Decision(
    plan=Plan(
        pp=1,
        micro_batch_size=2,
        micro_batches=4,
        base=LAYER.strategy,
        stages=(StagePlan(layers=(LAYER, LAYER)),),
    ),
    step_seconds=0.25,
    memory_bytes=(123,),
    profile_seconds=1.5,
    search_seconds=0.5,
    runners_up=(("pp2", 0.3),),
    source="searched",
    notes=("a note",),
)
JOB = {"model": "abc", "world_size": 2}


def test_round_trip(tmp_path):
    store = DecisionStore(tmp_path)
    assert store.read(JOB) == (None, "")
    store.write(JOB, DECISION)
    assert store.read(JOB) == (DECISION, "")
    # Another job has another plan.
    assert store.read(JOB | {"world_size": 4}) == (None, "")
    assert [path.name for path in tmp_path.iterdir()] == [store.path(JOB).name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace('"micro_batches": 4', '"micro_batches": "many"'),
        lambda text: text.replace('"step_seconds"', '"step"'),
        lambda text: text.replace('"step_seconds": 0.25', '"step_seconds": "fast"'),
        lambda text: text.replace("123", '"much"'),
    ],
)
def test_a_damaged_file_is_set_aside_whole(tmp_path, damage):
    store = DecisionStore(tmp_path)
    store.write(JOB, DECISION)
    path = store.path(JOB)
    damaged = damage(path.read_text())
    path.write_text(damaged)
    found, note = store.read(JOB)
    assert found is None
    assert "damaged" in note and "\n" not in note
    assert not path.exists()
    assert path.with_suffix(".damaged").read_text() == damaged
    store.write(JOB, DECISION)
    assert store.read(JOB) == (DECISION, "")


def test_a_damaged_file_in_a_read_only_store_is_planned_around(tmp_path, monkeypatch):
    store = DecisionStore(tmp_path)
    store.path(JOB).write_text("{")

    def refused(self, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "replace", refused)
    found, note = store.read(JOB)
    assert found is None and "cannot be set aside (Read-only file system), planning again" in note
    assert "\n" not in note


def test_something_else_is_refused():
    with pytest.raises(GalvatronError, match="not a kept plan"):
        Decision.from_dict({})
    with pytest.raises(GalvatronError, match="plan: None; valid: a mapping"):
        Decision.from_dict({"plan": None})
