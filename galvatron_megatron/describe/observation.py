"""Reads what ``--galvatron-observe`` wrote: times of the parts of a model in a training job, rank by rank."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from galvatron_megatron.describe.profile import EMBEDDING, HEAD, Provenance
from galvatron_megatron.describe.typical import typical
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel

FORMAT = 2
LEAST_PASSES = 3
"""Passes of a setting on a rank, or steps of its optimizer, below which their middle half says nothing."""
SUFFIX = ".jsonl"

type Setting = tuple[str, int, SequenceParallel, Recompute, int]
"""Part (``embedding``, ``head``, a digest), tp, sequence parallelism, recomputation, micro-batch size."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ObservedSetting:
    """All passes of the embedding, the head or all layers of one kind under one strategy."""

    setting: Setting
    forward_seconds: float
    """Mean of the middle half of passes, maximum over ranks, as in a profile."""
    backward_seconds: float
    spread: float
    """Largest relative interquartile range of forward or backward on a rank, as in a profile."""
    kept_bytes: int | None
    """Median growth of memory in a forward pass; None where the device does not count (CPU ranks)."""
    passes: int


@dataclass(kw_only=True, frozen=True, slots=True)
class ObservedStep:
    """Zeroing gradients and the optimizer's step of ranks that update equally much."""

    tensors: int
    parameters: int
    updated: int
    """Parameters that the optimizer updates on a rank."""
    zero: int
    seconds: float
    """Mean of the middle half of steps, maximum over ranks, as in a profile."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ObservedJob:
    """What the ranks of one job wrote."""

    provenance: Provenance
    started: str
    ranks: int
    """How many of its ranks' files were read."""
    pp: int
    """Stages of its pipeline."""
    settings: tuple[ObservedSetting, ...]
    optimizers: tuple[ObservedStep, ...]
    left_out: tuple[str, ...]
    """What was not read and why, in words."""
    step_seconds: float | None
    """Median step of the slowest rank; None where no step was written."""
    peak_bytes: int
    """Largest peak of a rank."""


def read_observed(paths: Sequence[Path]) -> list[ObservedJob]:
    """Reads files of records.

    Args:
        paths: one file per rank; a file may hold several jobs, one after the other.

    Returns:
        The jobs, in the order in which they started.

    Raises:
        DescriptionError: a file cannot be read or holds something else; names file and line.
    """
    jobs: dict[tuple[str, str], dict[int, _RankRecords]] = defaultdict(dict)
    for path in dict.fromkeys(paths):
        for records in _read_file(path):
            ranks = jobs[records.started, records.provenance.fingerprint()]
            if records.rank in ranks:
                raise DescriptionError(
                    f"{path}: rank {records.rank} of its job was given already; valid: each once"
                )
            ranks[records.rank] = records
    return [_together(list(jobs[key].values())) for key in sorted(jobs)]


type _Samples = tuple[list[float], list[float], list[int]]
"""Seconds of forward passes, of backward passes, bytes that were kept."""


@dataclass(kw_only=True)
class _RankRecords:
    provenance: Provenance
    started: str
    rank: int
    pp: int
    steps: list[tuple[float, int]] = field(default_factory=list)
    samples: dict[Setting, _Samples] = field(default_factory=dict)
    optimizers: dict[tuple[int, int, int, int], list[float]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)


def _read_file(path: Path) -> list[_RankRecords]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise DescriptionError(
            f"{path}: cannot be read ({reason}); valid: a file of --galvatron-observe"
        ) from None
    jobs: list[_RankRecords] = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            _take(json.loads(line), jobs)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            if number == len(lines) and jobs and not text.endswith("\n"):
                break  # A job that was killed may leave half a line at the end.
            raise DescriptionError(
                f"{path}:{number}: not a record of a job ({type(error).__name__}: {error}); "
                "valid: a file of --galvatron-observe"
            ) from None
    if not jobs:
        raise DescriptionError(f"{path}: is empty; valid: a file of --galvatron-observe")
    return jobs


def _take(record: dict[str, Any], jobs: list[_RankRecords]) -> None:
    kind = record["record"]
    if kind == "job":
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}; this version reads {FORMAT}")
        software = tuple((str(name), str(version)) for name, version in record["provenance"]["software"])
        provenance = Provenance(**{**record["provenance"], "software": software})
        if provenance.fingerprint() != record["fingerprint"]:
            raise ValueError("its fingerprint is not that of its provenance")
        jobs.append(
            _RankRecords(
                provenance=provenance,
                started=str(record["started"]),
                rank=int(record["rank"]),
                pp=int(record["pp"]),
            )
        )
    elif kind == "step":
        jobs[-1].steps.append((_seconds(record["seconds"]), int(record["peak_bytes"])))
    elif kind == "part":
        if record["left_out"]:
            name = f"layer {record['layer']}" if "layer" in record else str(record["part"])
            jobs[-1].left_out.add(f"{name}: {record['left_out']}")
            return
        setting = (
            str(record["part"]),
            int(record["tp"]),
            SequenceParallel(record["sequence_parallel"]),
            Recompute(record["recompute"]),
            int(record["micro_batch_size"]),
        )
        forward, backward, kept = jobs[-1].samples.setdefault(setting, ([], [], []))
        forward += map(_seconds, record["forward_seconds"])
        backward += map(_seconds, record["backward_seconds"])
        kept += map(int, record["kept_bytes"])
    elif kind == "optimizer":
        if record["left_out"]:
            jobs[-1].left_out.add(f"optimizer: {record['left_out']}")
            return
        tensors, parameters, updated, zero = (
            int(record[name]) for name in ("tensors", "parameters", "updated", "zero")
        )
        jobs[-1].optimizers.setdefault((tensors, parameters, updated, zero), []).append(
            _seconds(record["seconds"])
        )
    else:
        raise ValueError(f"record {kind!r} is unknown")


def _seconds(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]
    if not 0 <= number < float("inf"):
        raise ValueError(f"{value!r} seconds")
    return number


def _together(ranks: list[_RankRecords]) -> ObservedJob:
    left_out = {reason for records in ranks for reason in records.left_out}
    by_setting: dict[Setting, list[_Samples]] = defaultdict(list)
    by_update: dict[tuple[int, int, int, int], list[float]] = defaultdict(list)
    for records in ranks:
        for setting, samples in records.samples.items():
            if min(len(samples[0]), len(samples[1])) < LEAST_PASSES:
                left_out.add(f"{words(setting)}: fewer than {LEAST_PASSES} passes")
            else:
                by_setting[setting].append(samples)
        for update, seconds in records.optimizers.items():
            if len(seconds) < LEAST_PASSES:
                left_out.add(f"optimizer: fewer than {LEAST_PASSES} steps")
            else:
                by_update[update].append(typical(seconds)[0])
    medians = [
        float(np.median([seconds for seconds, _ in records.steps])) for records in ranks if records.steps
    ]
    return ObservedJob(
        provenance=ranks[0].provenance,
        started=ranks[0].started,
        ranks=len(ranks),
        pp=ranks[0].pp,
        settings=tuple(_setting(setting, found) for setting, found in by_setting.items()),
        optimizers=tuple(
            ObservedStep(tensors=tensors, parameters=parameters, updated=updated, zero=zero, seconds=max(found))
            for (tensors, parameters, updated, zero), found in by_update.items()
        ),
        left_out=tuple(sorted(left_out)),
        step_seconds=max(medians) if medians else None,
        peak_bytes=max((peak for records in ranks for _, peak in records.steps), default=0),
    )


def _setting(setting: Setting, by_rank: list[_Samples]) -> ObservedSetting:
    """One setting over the ranks that saw enough of it."""
    forward, backward = ([typical(samples[phase]) for samples in by_rank] for phase in (0, 1))
    kept = [int(np.median(samples[2])) for samples in by_rank if samples[2]]
    return ObservedSetting(
        setting=setting,
        forward_seconds=max(seconds for seconds, _ in forward),
        backward_seconds=max(seconds for seconds, _ in backward),
        spread=max(spread for _, spread in (*forward, *backward)),
        kept_bytes=max(kept) if kept else None,
        passes=sum(len(samples[0]) for samples in by_rank),
    )


def words(setting: Setting) -> str:
    """A setting as a reader would say it."""
    part, tp, sequence_parallel, recompute, size = setting
    split = "" if sequence_parallel is SequenceParallel.NONE else f" {sequence_parallel.value}"
    again = "" if recompute is Recompute.NONE else f", recompute {recompute.value}"
    name = part if part in (EMBEDDING, HEAD) else f"layer {part}"
    return f"{name}, tp {tp}{split}{again}, micro-batch {size}"
