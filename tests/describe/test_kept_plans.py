"""Kept plans are forgotten with the numbers they were priced with."""

import errno
import json
import os
from pathlib import Path

import pytest

from galvatron_megatron.describe.kept_plans import forget_plans
from galvatron_megatron.errors import DescriptionError


def kept(directory: Path, name: str, profile: str) -> Path:
    path = directory / f"plan-{name}.json"
    path.write_text(json.dumps({"decision": {"plan": {"fingerprints": {"profile": profile}}}}))
    return path


def test_plans_of_one_profile_are_removed(tmp_path):
    mine, other = kept(tmp_path, "a", "one"), kept(tmp_path, "b", "two")
    damaged = tmp_path / "plan-c.json"
    damaged.write_text("{")
    assert forget_plans(tmp_path, "one") == [mine]
    assert not mine.exists() and other.exists() and damaged.exists()


def test_a_plan_that_cannot_be_removed_is_named_in_one_line(tmp_path, monkeypatch):
    path = kept(tmp_path, "a", "one")

    def refused(self, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(DescriptionError, match=r"cannot be removed \(Read-only.*valid: ") as caught:
        forget_plans(tmp_path, "one")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
