"""The store: exact, atomic, safe with several writers, and never the loser of a damaged file."""

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from profiles import layer_point, provenance, small_model, small_profile

from galvatron_megatron.describe import profile_store
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.describe.profile_store import (
    check_directory,
    from_json,
    list_profiles,
    profile_path,
    read_profile,
    to_json,
    write_profile,
)
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Recompute

HERE = Path(__file__).parent
TESTS = HERE.parent


def test_json_gives_the_equal_profile_back():
    profile = small_profile(small_model())
    assert from_json(to_json(profile), "text") == profile


def test_what_is_written_is_read_and_merged(tmp_path):
    profile = small_profile(small_model())
    part = replace(profile, steps=(), collectives=(), parts=profile.parts[:3])
    write_profile(tmp_path, part)
    write_profile(tmp_path, replace(profile, parts=profile.parts[3:]))
    found, note = read_profile(tmp_path, profile.fingerprint())
    assert (found, note) == (profile, "")
    assert list_profiles(tmp_path) == [profile]


def test_nothing_stored_is_no_error(tmp_path):
    assert read_profile(tmp_path, "0" * 16) == (None, "")


@pytest.mark.parametrize("damage", ["half", "empty", "other", "unknown key", "negative", "binary"])
def test_a_damaged_file_is_set_aside_and_measured_again(tmp_path, damage):
    profile = small_profile(small_model())
    path = profile_path(tmp_path, profile.fingerprint())
    text = to_json(profile)
    content = json.loads(text)
    path.write_bytes(
        {
            "half": text[: len(text) // 2].encode(),
            "empty": b"",
            "other": to_json(small_profile(replace(small_model(), hidden_size=256))).encode(),
            "unknown key": json.dumps(content | {"surprise": 1}).encode(),
            "negative": text.replace('"tp": 1', '"tp": -1', 1).encode(),
            "binary": b"\x80\x04\x95" + bytes(range(256)),
        }[damage]
    )
    before = path.read_bytes()
    found, note = read_profile(tmp_path, profile.fingerprint())
    assert found is None
    assert "set aside" in note and "\n" not in note
    aside = [p for p in tmp_path.iterdir() if "damaged" in p.name]
    assert [p.read_bytes() for p in aside] == [before]
    write_profile(tmp_path, profile)
    assert read_profile(tmp_path, profile.fingerprint()) == (profile, "")


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    profile = small_profile(small_model())
    write_profile(tmp_path, profile)
    path = profile_path(tmp_path, profile.fingerprint())
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(profile_store.os, "fsync", full)
    with pytest.raises(DescriptionError, match="No space left"):
        write_profile(tmp_path, replace(profile, notes=("new",)))
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_directory_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(DescriptionError, match="does not exist"):
        check_directory(tmp_path / "missing")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DescriptionError, match="not a directory"):
        check_directory(file)
    assert check_directory(tmp_path / "made" / "deep", create=True).is_dir()
    with pytest.raises(DescriptionError, match="cannot be written"):
        # No user, root neither, can make a file here.
        check_directory(Path("/proc/self"))
    assert check_directory(Path("/proc/self"), write=False).is_dir()


@contextmanager
def mounted(directory: Path, size: str):
    """A file system of a few pages; skips where this user may not mount one."""
    directory.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_file_system_that_is_full_keeps_the_old_profile(tmp_path):
    profile = small_profile(small_model())
    with mounted(tmp_path / "small", "128k") as directory:
        write_profile(directory, profile)
        before = profile_path(directory, profile.fingerprint()).read_bytes()
        with pytest.raises(DescriptionError, match=r"No space left on device.*free space") as caught:
            write_profile(directory, replace(profile, notes=("x" * 200_000,)))
        assert "\n" not in str(caught.value)
        assert profile_path(directory, profile.fingerprint()).read_bytes() == before
        assert not list(directory.glob(".*.tmp"))
        # Nothing blocks the next write that fits.
        assert write_profile(directory, replace(profile, notes=("short",))).notes == ("short",)


def test_a_read_only_store_is_read_and_never_written(tmp_path):
    profile = small_profile(small_model())
    with mounted(tmp_path / "store", "1m") as directory:
        write_profile(directory, profile)
        for path in directory.glob("*.lock"):
            path.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        assert read_profile(directory, profile.fingerprint()) == (profile, "")
        assert list_profiles(directory) == [profile]
        with pytest.raises(DescriptionError, match=r"Read-only file system.*--galvatron-profile-dir"):
            check_directory(directory)
        with pytest.raises(DescriptionError, match="Read-only file system"):
            write_profile(directory, profile)
        # A damaged file cannot be set aside there, and is measured into another store.
        subprocess.run(["mount", "-o", "remount,rw", str(directory)], check=True)
        profile_path(directory, profile.fingerprint()).write_text("{")
        subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        found, note = read_profile(directory, profile.fingerprint())
        assert found is None and "cannot be set aside (Read-only file system)" in note


def test_without_a_lock_file_a_profile_is_still_read(tmp_path, monkeypatch):
    profile = small_profile(small_model())
    write_profile(tmp_path, profile)

    def refused(**kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def no_lock(*args, **kwargs):
        raise AssertionError("a lock is a file, which a read-only store takes none of")

    monkeypatch.setattr(profile_store.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(profile_store, "FileLock", no_lock)
    assert read_profile(tmp_path, profile.fingerprint()) == (profile, "")
    with pytest.raises(DescriptionError, match=r"Read-only file system.*--galvatron-profile-dir"):
        check_directory(tmp_path)


def test_a_lock_that_is_held_too_long_is_an_error(tmp_path, monkeypatch):
    profile = small_profile(small_model())
    monkeypatch.setattr(profile_store, "LOCK_SECONDS", 0.2)
    held = profile_store.FileLock(profile_path(tmp_path, profile.fingerprint()).with_suffix(".lock"))
    with held, pytest.raises(DescriptionError, match="locked"):
        write_profile(tmp_path, profile)


def test_many_writers_lose_nothing(tmp_path):
    program = (
        "import sys\n"
        f"sys.path[:0] = [{str(HERE)!r}, {str(TESTS)!r}]\n"
        "from test_profile_store import write_some\n"
        "write_some(sys.argv[1], int(sys.argv[2]))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(n)]) for n in range(1, 5)]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 4
    model = small_model()
    found, _ = read_profile(tmp_path, provenance(model).fingerprint())
    assert {(p.tp, p.micro_batch_size) for p in found.parts} == {
        (t, s) for t in range(1, 5) for s in range(1, 11)
    }


def write_some(directory: str, tp: int) -> None:
    model = small_model()
    for size in range(1, 11):
        point = layer_point(model, tp, size, Recompute.NONE)
        write_profile(Path(directory), Profile(provenance=provenance(model), parts=(point,)))
