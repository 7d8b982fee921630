"""Turns what was observed in a training job into points of a profile."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from galvatron_megatron.cost.measured_points import PartTable
from galvatron_megatron.describe.observation import ObservedJob, words
from galvatron_megatron.describe.profile import PartPoint, Profile, StepPoint

OBSERVED = "observed"
"""Source of a point that comes from a training job."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ObservedPoints:
    """What a job tells a profile."""

    parts: tuple[PartPoint, ...] = ()
    steps: tuple[StepPoint, ...] = ()
    left_out: tuple[str, ...] = ()
    """What it cannot tell and why, in words."""


def observed_points(profile: Profile, job: ObservedJob) -> ObservedPoints:
    """Points of a job, to be merged into the profile of the same fingerprint.

    Times are the job's. What a job cannot tell without disturbing it (peaks inside a pass; on CPU ranks also
    what is kept between passes) is read off the profile at the same setting and micro-batch size. An optimizer
    that the profile has not measured is left to the profiler, who measures it at several sizes.

    Args:
        profile: stored measurements.
        job: of the same fingerprint.
    """
    place = job.provenance
    if job.pp > 1 and place.backend == "gloo" and place.ranks_per_node > place.processors_per_node:
        reason = (
            "CPU ranks share processors, and stages of the pipeline leave them to each other while they wait"
        )
        return ObservedPoints(left_out=(*job.left_out, f"all parts: {reason}"))
    table = PartTable(profile)
    parts, steps, left_out = [], [], list(job.left_out)
    for found in job.settings:
        part, tp, sequence_parallel, recompute, size = found.setting
        known = table.lookup(part, tp, sequence_parallel, recompute, size)
        if isinstance(known, str):
            left_out.append(
                f"{words(found.setting)}: in the profile it is {known!r}, so its memory is not known"
            )
            continue
        parts.append(
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
    measured = {point.zero for point in profile.steps}
    for step in job.optimizers:
        if step.zero not in measured:
            left_out.append(f"optimizer: the profile has none of ZeRO {step.zero}")
            continue
        steps.append(
            StepPoint(
                tensors=step.tensors,
                parameters=step.parameters,
                updated=step.updated,
                zero=step.zero,
                seconds=step.seconds,
                source=OBSERVED,
            )
        )
    return ObservedPoints(parts=tuple(parts), steps=tuple(steps), left_out=tuple(left_out))


def partial_profile(profile: Profile, points: ObservedPoints) -> Profile:
    """Points alone, under a profile's provenance, to be merged into the store."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Profile(provenance=replace(profile.provenance, updated=now), parts=points.parts, steps=points.steps)
