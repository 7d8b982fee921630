"""Hetu-Galvatron's profiles in the profile store: one JSON file each, named by the digest of its tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from galvatron_megatron.describe.galvatron_files import (
    HARDWARE,
    MODEL,
    GalvatronFiles,
    read_galvatron_directory,
    read_object,
)
from galvatron_megatron.describe.galvatron_tables import check_tables
from galvatron_megatron.describe.profile import digest
from galvatron_megatron.describe.profile_store import write_atomically
from galvatron_megatron.errors import DescriptionError, did_you_mean
from galvatron_megatron.plan.document import check_keys

FORMAT = "hetu-galvatron profile"
_SCHEMA_VERSION = 1
_KEYS = ("format", "schema_version", "sources", "changed", "imported", "files")


@dataclass(kw_only=True, frozen=True, slots=True)
class GalvatronImport:
    """Profile files of Hetu-Galvatron, and where they came from."""

    files: GalvatronFiles
    """Of a machine, of one model, or of both."""
    sources: tuple[str, ...]
    """Directories they were read from."""
    changed: str
    """UTC, ISO 8601: when the newest of the files was last changed. The files themselves carry no date."""
    imported: str
    """UTC, ISO 8601."""

    def fingerprint(self) -> str:
        """16 hex digits of the tables; where and when they were read does not count."""
        return digest([FORMAT, self.files.documents])

    @property
    def has_machine(self) -> bool:
        """Whether bandwidths are there."""
        return not self.files.lacks(HARDWARE)

    @property
    def model(self) -> str:
        """Precision and name of the model, or "" where there is none."""
        return next(iter(self.files.models), "")


def import_directories(directories: Sequence[Path | str]) -> list[GalvatronImport]:
    """Reads directories of profile files as one profile for every model in them.

    Args:
        directories: of a machine, of models, or of both; their files are put together.

    Returns:
        One entry a model, each with the machine's files where there are any; the machine alone where there is
        no model.

    Raises:
        DescriptionError: one line about what is damaged, missing or contradictory.
    """
    files, newest = None, 0.0
    for directory in directories:
        found = read_galvatron_directory(directory)
        newest = max(newest, *((Path(directory) / name).stat().st_mtime for name in found.documents))
        files = found if files is None else files.merged(found)
    if files is None:
        raise DescriptionError("no directory of Hetu-Galvatron profiles; valid: one or more")
    check_tables(files)
    return [
        GalvatronImport(
            files=files.of_model(model),
            sources=tuple(str(Path(directory).absolute()) for directory in directories),
            changed=datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
            imported=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        for model in files.models or [None]
    ]


def import_json(entry: GalvatronImport) -> str:
    """A profile as JSON text; :func:`import_from_file` gives the equal profile back."""
    document = {
        "format": FORMAT,
        "schema_version": _SCHEMA_VERSION,
        "sources": list(entry.sources),
        "changed": entry.changed,
        "imported": entry.imported,
        "files": entry.files.documents,
    }
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def is_import(document: Mapping[str, object]) -> bool:
    """Whether a JSON object says that it is such a profile."""
    return document.get("format") == FORMAT


def import_from_file(path: Path) -> GalvatronImport:
    """Reads a profile from a file of the store, or from one that was exported.

    Raises:
        DescriptionError: the file cannot be read, or is damaged.
    """
    document = check_keys(read_object(path), str(path), required=_KEYS, error=DescriptionError)
    if not is_import(document) or document["schema_version"] != _SCHEMA_VERSION:
        raise DescriptionError(
            f"{path}: {document['format']!r} {document['schema_version']!r}; valid: {FORMAT} {_SCHEMA_VERSION}"
        )
    files, sources = document["files"], document["sources"]
    is_whole = (
        isinstance(files, dict)
        and files
        and all(isinstance(content, dict) for content in files.values())
        and isinstance(sources, list)
        and all(isinstance(text, str) for text in (*sources, document["changed"], document["imported"]))
    )
    if not is_whole:
        raise DescriptionError(f"{path}: damaged; valid: a file written by galvatron profile import")
    found = GalvatronImport(
        files=GalvatronFiles(where=str(path), documents=files),
        sources=tuple(sources),
        changed=document["changed"],
        imported=document["imported"],
    )
    if found.files.lacks(HARDWARE) and found.files.lacks(MODEL):
        raise DescriptionError(f"{path}: neither a machine nor a model is in it; valid: import it again")
    check_tables(found.files)
    return found


def import_path(directory: Path, fingerprint: str) -> Path:
    """The file of one profile in a store."""
    return directory / f"galvatron-{fingerprint}.json"


def write_import(directory: Path, entry: GalvatronImport) -> Path:
    """Puts a profile into a store, in the place of an equal one.

    Raises:
        DescriptionError: the file cannot be written.
    """
    path = import_path(directory, entry.fingerprint())
    write_atomically(path, import_json(entry))
    return path


def list_imports(directory: Path) -> list[GalvatronImport]:
    """All readable imports of a store, newest first; damaged ones are left alone and not listed."""
    found = []
    for path in sorted(directory.glob("galvatron-*.json")):
        try:
            entry = import_from_file(path)
        except DescriptionError:
            continue
        if import_path(directory, entry.fingerprint()) == path:
            found.append(entry)
    return sorted(found, key=lambda entry: entry.imported, reverse=True)


def imported_fingerprints(directory: Path) -> list[str]:
    """Fingerprints of all imports of a store, damaged ones too."""
    return sorted(path.stem.removeprefix("galvatron-") for path in directory.glob("galvatron-*.json"))


def find_import(directory: Path, fingerprint: str) -> GalvatronImport:
    """The profile of a store whose fingerprint begins so.

    Raises:
        DescriptionError: there is none, there are several, or its file is damaged.
    """
    known = imported_fingerprints(directory)
    matching = [name for name in known if name.startswith(fingerprint)]
    if len(matching) != 1:
        if matching:
            problem = f"is ambiguous; valid: {', '.join(matching)}"
        else:
            valid = did_you_mean(fingerprint, known) if known else "valid: galvatron profile import DIR first"
            problem = f"is not stored in {directory}; {valid}"
        raise DescriptionError(f"Hetu-Galvatron profile {fingerprint} {problem}")
    path = import_path(directory, matching[0])
    entry = import_from_file(path)
    if entry.fingerprint() != matching[0]:
        raise DescriptionError(
            f"{path}: damaged, its content belongs to {entry.fingerprint()}; valid: import it again"
        )
    return entry


def galvatron_files(source: str, store: Path) -> GalvatronFiles:
    """The files of a directory, of an exported file, or of a profile in the store.

    Args:
        source: directory, file, or the first digits of a fingerprint.
        store: directory of profiles.

    Raises:
        DescriptionError: there is no such thing, or it is damaged.
    """
    path = Path(source)
    if path.is_dir():
        return read_galvatron_directory(path)
    if path.is_file():
        return import_from_file(path).files
    if not source or set(source) - set("0123456789abcdef"):
        raise DescriptionError(
            f"{source}: no such directory; valid: a directory of Hetu-Galvatron profiles, a file written by "
            "galvatron profile export, or the fingerprint of a profile that was imported"
        )
    return find_import(store, source).files
