"""What ``galvatron profile`` does with the store: list, show, export, import."""

import json
from collections.abc import Sequence
from pathlib import Path

from galvatron_megatron.describe.galvatron_files import read_object
from galvatron_megatron.describe.galvatron_store import (
    GalvatronImport,
    find_import,
    import_directories,
    import_from_file,
    import_json,
    imported_fingerprints,
    is_import,
    list_imports,
    write_import,
)
from galvatron_megatron.describe.kept_plans import forget_plans
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.describe.profile_store import (
    from_json,
    list_profiles,
    read_profile,
    to_json,
    write_atomically,
    write_profile,
)
from galvatron_megatron.errors import DescriptionError, GalvatronError, did_you_mean
from galvatron_megatron.report.galvatron_report import print_import, print_imports
from galvatron_megatron.report.profile_report import plot_profile, print_list, print_profile
from galvatron_megatron.report.terminal import terminal


def list_stored(directory: Path, *, as_json: bool) -> None:
    """Prints a line for every profile, measured ones first; as JSON their fingerprints."""
    measured, imported = list_profiles(directory), list_imports(directory)
    if as_json:
        print(json.dumps([entry.fingerprint() for entry in (*measured, *imported)]))
        return
    if measured or not imported:
        print_list(measured, terminal())
    if imported:
        print_imports(imported, terminal())


def find_stored(directory: Path, fingerprint: str | None) -> Profile | GalvatronImport:
    """The profile whose fingerprint begins so; without one the newest, of measured ones where there are any.

    Raises:
        GalvatronError: there is none, there are several, or its file is damaged.
    """
    measured, imported = list_profiles(directory), imported_fingerprints(directory)
    if not measured and not imported:
        raise GalvatronError(f"profile directory {directory}: holds no profile; valid: galvatron profile first")
    if fingerprint is None:
        return measured[0] if measured else list_imports(directory)[0]
    known = [*(profile.fingerprint() for profile in measured), *imported]
    matching = [name for name in known if name.startswith(fingerprint)]
    if len(matching) != 1:
        kind = "is ambiguous" if matching else "is not stored"
        raise GalvatronError(f"profile {fingerprint} {kind}; {did_you_mean(fingerprint, matching or known)}")
    if matching[0] in imported:
        return find_import(directory, matching[0])
    return next(profile for profile in measured if profile.fingerprint() == matching[0])


def show(profile: Profile | GalvatronImport, *, plot: Path | None, as_json: bool) -> None:
    """Prints a profile, and draws it where asked to.

    Raises:
        GalvatronError: it cannot be drawn.
    """
    is_imported = isinstance(profile, GalvatronImport)
    if plot is not None:
        if is_imported:
            raise GalvatronError(
                f"--plot: profile {profile.fingerprint()} was imported from Hetu-Galvatron and has no fitted "
                "curves; valid: a profile that galvatron profile measured"
            )
        plot_profile(profile, plot)
    if as_json:
        print(import_json(profile) if is_imported else to_json(profile), end="")
    elif is_imported:
        print_import(profile, terminal())
    else:
        print_profile(profile, terminal())


def export(profile: Profile | GalvatronImport, target: Path) -> None:
    """Writes a profile into a file that :func:`import_stored` reads.

    Raises:
        DescriptionError: the file cannot be written.
    """
    text = import_json(profile) if isinstance(profile, GalvatronImport) else to_json(profile)
    write_atomically(target, text)
    print(f"wrote {target}")


def import_stored(directory: Path, sources: Sequence[Path]) -> None:
    """Puts an exported profile, or the files in directories of Hetu-Galvatron, into the store.

    Raises:
        GalvatronError: a source cannot be read or is damaged; the store is as it was.
    """
    if all(source.is_dir() for source in sources):
        for entry in import_directories(sources):
            _keep_import(directory, entry)
        return
    if len(sources) > 1:
        other = next(source for source in sources if not source.is_dir())
        raise GalvatronError(
            f"profile import: {other} is no directory; valid: one exported file, or directories of "
            "Hetu-Galvatron"
        )
    (source,) = sources
    try:
        text = source.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise GalvatronError(
            f"{source}: cannot be read ({error.strerror}); valid: an exported profile, or a directory of "
            "Hetu-Galvatron profiles"
        ) from None
    if _says_import(source):
        _keep_import(directory, import_from_file(source))
        return
    profile = from_json(text, str(source))
    before, _ = read_profile(directory, profile.fingerprint())
    merged = write_profile(directory, profile)
    print(
        f"imported {merged.fingerprint()}: {len(merged.parts)} layer points, {len(merged.collectives)} curves"
    )
    forgotten = forget_plans(directory, merged.fingerprint()) if before not in (None, merged) else []
    if forgotten:
        print(f"{len(forgotten)} kept plan(s) forgotten: the next --galvatron-auto searches again")


def _says_import(path: Path) -> bool:
    """Whether a file says that it is a profile of Hetu-Galvatron; one that is no JSON says nothing."""
    try:
        return is_import(read_object(path))
    except DescriptionError:
        return False


def _keep_import(directory: Path, entry: GalvatronImport) -> None:
    write_import(directory, entry)
    machines = ", ".join(f"{nodes} x {devices}" for nodes, devices in entry.files.machines())
    lengths = ", ".join(map(str, entry.files.seq_lengths()))
    parts = [f"machine of {machines} devices"] * entry.has_machine
    parts += [f"model {entry.model}, sequence length {lengths}"] * bool(entry.model)
    if len(parts) < 2:
        lacking = "model" if entry.has_machine else "machine"
        parts.append(f"no {lacking}: give that one to galvatron search by another --galvatron-profile")
    print(f"imported {entry.fingerprint()}: {'; '.join(parts)}")
