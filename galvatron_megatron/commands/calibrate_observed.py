"""``galvatron calibrate OBSERVED``: merges what training jobs observed into the stored profile."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from rich.table import Table

from galvatron_megatron.cost.observed import ObservedPoints, observed_points, partial_profile
from galvatron_megatron.describe.kept_plans import forget_plans
from galvatron_megatron.describe.observation import SUFFIX, ObservedJob, read_observed
from galvatron_megatron.describe.profile import PartPoint, Profile, StepPoint
from galvatron_megatron.describe.profile_store import (
    check_directory,
    default_directory,
    profile_path,
    read_profile,
    write_profile,
)
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.report.terminal import terminal


def is_observed(paths: Sequence[Path]) -> bool:
    """Whether inputs are what jobs observed (JSON lines, or directories of them) and not a CSV table."""
    return any(path.suffix == SUFFIX or path.is_dir() for path in paths)


def check_exists(path: Path) -> None:
    """Refuses an input that is not there, before anything is made of its name.

    Raises:
        DescriptionError: it does not exist; names what is nearest beside it.
    """
    if path.exists():
        return
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        beside = []
    near = get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {path.parent / near[0]}? " if near else ""
    raise DescriptionError(
        f"{path}: does not exist; {hint}valid: files (.jsonl) or directories of --galvatron-observe, or one "
        "CSV file of runs, with --cluster"
    )


def merge_observed(paths: Sequence[Path], directory: Path | None, *, as_json: bool) -> int:
    """Merges, says what changed, and forgets the plans that were priced with the old numbers.

    All jobs are read and checked before the first profile is written.

    Args:
        paths: files of ``--galvatron-observe``, or its directories.
        directory: the profile store; None for the default one.
        as_json: print JSON.

    Returns:
        0.

    Raises:
        GalvatronError: a file or the store cannot be used, or the store has no profile of such a job.
    """
    store = check_directory(directory or default_directory(), create=directory is None)
    jobs = read_observed(_files(paths))
    known = {job.provenance.fingerprint(): _stored(store, job) for job in jobs}
    results = []
    for job in jobs:
        fingerprint = job.provenance.fingerprint()
        before = known[fingerprint]
        points = observed_points(before, job)
        if not points.parts and not points.steps:
            reason = points.left_out[0] if points.left_out else "nothing was observed"
            raise DescriptionError(
                f"{paths[0]}: nothing in it can be merged ({reason}); "
                "valid: jobs of 5 iterations or more, with strategies that were profiled"
            )
        known[fingerprint] = before.merged(partial_profile(before, points))
        results.append((job, before, points))
    forgotten = {}
    for fingerprint in known:
        found = [points for job, _, points in results if job.provenance.fingerprint() == fingerprint]
        # Only what was observed: another job may have measured more since the profile was read.
        parts = tuple(part for points in found for part in points.parts)
        steps = tuple(step for points in found for step in points.steps)
        together = ObservedPoints(parts=parts, steps=steps)
        write_profile(store, partial_profile(known[fingerprint], together))
        forgotten[fingerprint] = forget_plans(store, fingerprint)
    if as_json:
        documents = [_document(*result, forgotten[result[0].provenance.fingerprint()]) for result in results]
        print(json.dumps(documents, indent=2))
        return 0
    console = terminal()
    for job, before, points in results:
        console.print(_table(job, before, points))
        if job.ranks < job.provenance.world_size:
            console.print(f"only {job.ranks} of {job.provenance.world_size} ranks were given")
        for reason in points.left_out:
            console.print(f"left out: {reason}")
    for fingerprint, plans in forgotten.items():
        console.print(f"merged into {profile_path(store, fingerprint)}")
        if plans:
            console.print(f"{len(plans)} kept plan(s) forgotten: the next --galvatron-auto searches again")
    return 0


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not found:
            raise DescriptionError(f"{path}: has no {SUFFIX} file; valid: a directory of --galvatron-observe")
        if path.suffix != SUFFIX and not path.is_dir():
            raise DescriptionError(f"{path}: is no {SUFFIX} file; valid: either tables or observed files")
        files += found
    return files


def _stored(store: Path, job: ObservedJob) -> Profile:
    profile, note = read_profile(store, job.provenance.fingerprint())
    if profile is None:
        missing = f"profile directory {store}: no profile {job.provenance.fingerprint()} of the observed job"
        raise DescriptionError(
            f"{note or missing}; "
            "valid: galvatron profile (or --galvatron-auto) on the same model, ranks and versions first"
        )
    return profile


def _before(profile: Profile, point: PartPoint | StepPoint) -> float | None:
    """Seconds that the profile had for the same setting, or None."""
    for old in (*profile.parts, *profile.steps):
        if old.key == point.key and not getattr(old, "failure", ""):
            return _seconds(old)
    return None


def _seconds(point: PartPoint | StepPoint) -> float:
    """Forward and backward, or the optimizer's step."""
    if isinstance(point, StepPoint):
        return point.seconds
    return point.forward_seconds + point.backward_seconds


def _table(job: ObservedJob, before: Profile, points: ObservedPoints) -> Table:
    step = "" if job.step_seconds is None else f"; step {job.step_seconds * 1e3:.1f} ms"
    shown = Table(
        title=f"job of {job.started[:19]}{step}, peak {job.peak_bytes / 2**30:.2f} GiB", title_justify="left"
    )
    for name in ("part", "tp", "sequence", "recompute"):
        shown.add_column(name)
    for name in ("micro-batch", "profile ms", "observed ms"):
        shown.add_column(name, justify="right")
    for point in (*points.parts, *points.steps):
        old = _before(before, point)
        if isinstance(point, StepPoint):
            how = (f"optimizer, ZeRO {point.zero}", "", "", "", "")
        else:
            kinds = (point.sequence_parallel.value, point.recompute.value)
            how = (point.part, str(point.tp), *kinds, str(point.micro_batch_size))
        shown.add_row(*how, "new" if old is None else f"{old * 1e3:.3f}", f"{_seconds(point) * 1e3:.3f}")
    return shown


def _document(
    job: ObservedJob, before: Profile, points: ObservedPoints, forgotten: list[Path]
) -> dict[str, object]:
    return {
        "profile": job.provenance.fingerprint(),
        "started": job.started,
        "ranks": job.ranks,
        "step_seconds": job.step_seconds,
        "peak_bytes": job.peak_bytes,
        "points": [
            {
                "part": point.part,
                "tp": point.tp,
                "sequence_parallel": point.sequence_parallel.value,
                "recompute": point.recompute.value,
                "micro_batch_size": point.micro_batch_size,
                "seconds_before": _before(before, point),
                "seconds": _seconds(point),
            }
            for point in points.parts
        ],
        "optimizers": [
            {
                "tensors": point.tensors,
                "parameters": point.parameters,
                "updated": point.updated,
                "zero": point.zero,
                "seconds_before": _before(before, point),
                "seconds": _seconds(point),
            }
            for point in points.steps
        ],
        "left_out": list(points.left_out),
        "forgotten_plans": [path.name for path in forgotten],
    }
