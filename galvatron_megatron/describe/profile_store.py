"""The store of profiles: one JSON file per fingerprint in a directory that many jobs may share."""

import json
import os
import tempfile
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.errors import DescriptionError, GalvatronError, did_you_mean
from galvatron_megatron.plan.document import write_document

LOCK_SECONDS = 30.0
"""How long a job waits for another one that writes the same profile."""


def default_directory() -> Path:
    """Where profiles are kept unless ``--galvatron-profile-dir`` says otherwise."""
    return user_cache_path("galvatron_megatron") / "profiles"


def profile_path(directory: Path, fingerprint: str) -> Path:
    """The file of one profile."""
    return directory / f"profile-{fingerprint}.json"


def check_directory(directory: Path, *, create: bool = False, write: bool = True, lacks: str = "") -> Path:
    """Makes sure that a directory can hold profiles, before anything is measured or searched for.

    Args:
        directory: the directory.
        create: make it, with its parents (meant for the default directory).
        write: profiles are to be written there; a store that many read may be read-only.
        lacks: what is to be written, for the error.

    Returns:
        The directory.

    Raises:
        DescriptionError: it does not exist, is not a directory or cannot be written to.
    """
    try:
        if create:
            directory.mkdir(parents=True, exist_ok=True)
        if not directory.is_dir():
            kind = "is not a directory" if directory.exists() else "does not exist"
            raise DescriptionError(f"profile directory {directory}: {kind}; valid: an existing directory")
        if write:
            with tempfile.TemporaryFile(dir=directory):
                pass
    except OSError as error:
        raise DescriptionError(
            f"profile directory {directory}: {f'lacks {lacks} and ' if lacks else ''}cannot be written to "
            f"({error.strerror}); valid: an existing "
            "writable directory, named by --galvatron-profile-dir (--directory of galvatron profile)"
        ) from None
    return directory


def _writable(directory: Path) -> bool:
    try:
        check_directory(directory)
    except DescriptionError:
        return False
    return True


def to_json(profile: Profile) -> str:
    """A profile as JSON text; :func:`from_json` gives the equal profile back."""
    return json.dumps(asdict(profile), indent=1, sort_keys=True, default=lambda value: value.value) + "\n"


def from_json(text: str, where: str) -> Profile:
    """Reads a profile from JSON text.

    Args:
        text: what :func:`to_json` wrote.
        where: name of the source, for the error.

    Returns:
        The profile.

    Raises:
        DescriptionError: not JSON, unknown or missing keys, or values that a profile refuses.
    """
    try:
        return _build(Profile, json.loads(text), "profile")
    except (GalvatronError, ValueError, TypeError, RecursionError) as error:
        raise DescriptionError(
            f"profile {where}: damaged or not a profile ({error}); valid: a file written by galvatron profile"
        ) from None


def _build(kind: Any, value: Any, where: str) -> Any:
    """Turns decoded JSON into the annotated type, strictly."""
    origin = get_origin(kind)
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise DescriptionError(f"{where}: {value!r} is not a mapping")
        hints = get_type_hints(kind)
        names = {f.name for f in fields(kind)}
        for name in value:
            if name not in names:
                raise DescriptionError(f"{where}.{name}: unknown key; {did_you_mean(name, names)}")
        for f in fields(kind):
            if f.name not in value and f.default is MISSING and f.default_factory is MISSING:
                raise DescriptionError(f"{where}.{f.name}: missing")
        return kind(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise DescriptionError(f"{where}: {value!r} is not a list")
        inner = get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_build(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(inner) != len(value):
            raise DescriptionError(f"{where}: {len(value)} items; valid: {len(inner)}")
        return tuple(_build(t, item, where) for t, item in zip(inner, value, strict=True))
    if origin is types.UnionType:
        raise DescriptionError(f"{where}: unsupported type {kind}")
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise DescriptionError(f"{where}: {value!r} is not of type {kind.__name__}")
    return value


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise DescriptionError(
            f"profile {path}: locked by another job for more than {LOCK_SECONDS:.0f} s; "
            "valid: wait for that job, or another profile directory"
        ) from None
    except OSError as error:
        raise DescriptionError(
            f"profile {path}: cannot be locked ({error.strerror}); valid: a writable profile directory"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Raises:
        DescriptionError: the directory is full or not writable; the old file is untouched.
    """
    write_document(text, path, DescriptionError)


def write_profile(directory: Path, profile: Profile) -> Profile:
    """Adds a profile's measurements to the store.

    Args:
        directory: an existing writable directory.
        profile: measurements; merged into what the file of the same fingerprint already has.

    Returns:
        The merged profile as stored.

    Raises:
        DescriptionError: the file cannot be locked or written.
    """
    path = profile_path(directory, profile.fingerprint())
    with _locked(path):
        stored, _ = _read(path)
        merged = profile if stored is None else stored.merged(profile)
        write_atomically(path, to_json(merged))
    return merged


def read_profile(directory: Path, fingerprint: str) -> tuple[Profile | None, str]:
    """Reads a stored profile.

    A damaged file is set aside (renamed to ``*.damaged``), so that it is measured again and nothing is lost.

    Args:
        directory: the profile directory.
        fingerprint: of the profile.

    Returns:
        The profile or None where there is none to use, and a line to show about a damaged file, or "".

    Raises:
        DescriptionError: the file is there but cannot be read.
    """
    path = profile_path(directory, fingerprint)
    if not path.exists():
        return None, ""
    if not _writable(directory):
        # A lock is a file too. What is read is whole without it, since files are replaced as a whole.
        return _read(path)
    with _locked(path):
        return _read(path)


def _read(path: Path) -> tuple[Profile | None, str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        raise DescriptionError(
            f"profile {path}: cannot be read ({error.strerror}); valid: a readable file"
        ) from None
    try:
        profile = from_json(text, str(path))
        if profile_path(path.parent, profile.fingerprint()) != path:
            raise DescriptionError(f"profile {path}: its content belongs to {profile.fingerprint()}")
    except DescriptionError as error:
        aside = path.with_suffix(f".damaged-{os.getpid()}")
        try:
            path.replace(aside)
        except OSError as cause:
            return None, f"{error}; cannot be set aside ({cause.strerror})"
        return None, f"{error}; set aside as {aside.name}, measuring again"
    return profile, ""


def list_profiles(directory: Path) -> list[Profile]:
    """All readable profiles of a directory, newest first; damaged ones are left alone and not listed."""
    found = []
    for path in sorted(directory.glob("profile-*.json")):
        try:
            found.append(from_json(path.read_text(encoding="utf-8", errors="replace"), str(path)))
        except (DescriptionError, OSError):
            continue
    return sorted(found, key=lambda profile: profile.provenance.updated, reverse=True)
