"""Turns what was observed in a training job into points of a profile."""

from dataclasses import replace
from datetime import UTC, datetime

from galvatron_megatron.cost.measured_points import PartTable
from galvatron_megatron.describe.observation import ObservedJob, words
from galvatron_megatron.describe.profile import PartPoint, Profile

OBSERVED = "observed"
"""Source of a point that comes from a training job."""


def observed_points(profile: Profile, job: ObservedJob) -> tuple[list[PartPoint], list[str]]:
    """Points of a job, to be merged into the profile of the same fingerprint.

    Times are the job's. What a job cannot tell without disturbing it (peaks inside a pass; on CPU ranks also
    what is kept between passes) is read off the profile at the same setting and micro-batch size.

    Args:
        profile: stored measurements.
        job: of the same fingerprint.

    Returns:
        The points, and what was left out, in words: settings of which the profile knows nothing.
    """
    table = PartTable(profile)
    points, left_out = [], list(job.left_out)
    for found in job.settings:
        part, tp, sequence_parallel, recompute, size = found.setting
        known = table.lookup(part, tp, sequence_parallel, recompute, size)
        if isinstance(known, str):
            left_out.append(
                f"{words(found.setting)}: in the profile it is {known!r}, so its memory is not known"
            )
            continue
        points.append(
            PartPoint(
                part=part,
                tp=tp,
                sequence_parallel=sequence_parallel,
                recompute=recompute,
                micro_batch_size=size,
                forward_seconds=found.forward_seconds,
                backward_seconds=found.backward_seconds,
                spread=found.spread,
                activation_bytes=found.kept_bytes if (found.kept_bytes or 0) > 0 else known.activation_bytes,
                transient_bytes=known.transient_bytes,
                parameters=known.parameters,
                tensors=known.tensors,
                source=OBSERVED,
            )
        )
    return points, left_out


def partial_profile(profile: Profile, points: list[PartPoint]) -> Profile:
    """Points alone, under a profile's provenance, to be merged into the store."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Profile(provenance=replace(profile.provenance, updated=now), parts=tuple(points))
