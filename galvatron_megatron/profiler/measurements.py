"""Measures what a profile lacks on the live ranks and keeps it, piece by piece."""

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.profile import EnginePoint, PartPoint, Profile
from galvatron_megatron.describe.profile_key import layer_digest
from galvatron_megatron.describe.profile_store import read_profile, to_json, write_profile
from galvatron_megatron.device import on_cpu
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.profiler.collectives import GroupShape, Siblings, measure_curve, siblings_of
from galvatron_megatron.profiler.few_layers import (
    REFUSALS,
    FewLayers,
    arguments_for,
    build,
    parallel_state_of,
    refusal,
)
from galvatron_megatron.profiler.host_step import measure_host_step
from galvatron_megatron.profiler.layers import PartMeasurement
from galvatron_megatron.profiler.missing import Build, Missing
from galvatron_megatron.profiler.needs import ProfileNeeds
from galvatron_megatron.profiler.optimizer import measure_step
from galvatron_megatron.profiler.overlap import measure_overlap
from galvatron_megatron.profiler.process_group import agree, any_reason, on_rank_zero
from galvatron_megatron.profiler.progress import Progress
from galvatron_megatron.profiler.stragglers import straggler_note
from galvatron_megatron.profiler.topology import nodes_of_group
from galvatron_megatron.profiler.zero_engines import STAGES, can_measure_engines, measure_engines

ROUNDS = 2
"""How often every setting is measured, with all others of its model in between."""
UNSURE = 0.05
"""Relative standard error above which a setting is measured again."""
AGAIN_SHARE = 0.3
"""Part of the time of the first rounds that this may take, the least certain setting first."""
LEAST_LARGEST_BYTES = 4 << 20
"""Every curve reaches this far, where bandwidth and not latency decides."""
LARGEST_CPU_BYTES = 32 << 20
LARGEST_GPU_BYTES = 1 << 30


class Measurements:
    """The measurements of one session, equal on every rank but for the store."""

    def __init__(
        self,
        model: Model,
        arguments: Namespace,
        needs: ProfileNeeds,
        directory: Path,
        defaults: dict[str, Any],
        profile: Profile,
        *,
        nodes: list[str],
        progress: Progress,
        seconds_per_point: float,
    ) -> None:
        """Starts with what is known.

        Args:
            model: what the arguments describe.
            arguments: Megatron's parsed arguments; left unchanged.
            needs: what to measure.
            directory: the profile store.
            defaults: the training script's ``args_defaults``.
            profile: what is measured.
            nodes: of the ranks.
            progress: told what is being measured.
            seconds_per_point: time for the repeats of one setting.
        """
        self.model = model
        self.arguments = arguments
        self.needs = needs
        self.directory = directory
        self.defaults = defaults
        self.profile = profile
        self.nodes = nodes
        self.progress = progress
        self.seconds_per_point = seconds_per_point
        self._world = profile.provenance.world_size

    def stored_text(self, again: bool) -> tuple[str, str]:
        """The stored profile as text, and a line about a damaged file."""
        if again:
            return "", ""
        found, note = read_profile(self.directory, self.profile.fingerprint())
        return (to_json(found) if found else ""), note

    @property
    def missing(self) -> Missing:
        """What the profile lacks by now."""
        return Missing(model=self.model, needs=self.needs, profile=self.profile)

    def _most_measurements(self, item: Build) -> int:
        """Measurements on a model, unless curves turn out to be bent."""
        return item.parts * len(self.needs.settings(item.tp, item.sequence_parallel)) + item.step

    def measure(self) -> None:
        """Measures everything that is missing and stores it piece by piece."""
        progress, missing = self.progress, self.missing
        curves, overlaps, builds = missing.curves(), missing.overlaps(), missing.builds()
        host_steps, engines = missing.host_steps(), missing.engines()
        links = sum(map(len, curves.values())) + len(overlaps)
        others = len(host_steps) + len(engines)
        progress.start(links + others + sum(self._most_measurements(item) for item in builds))
        with progress.phase("links"):
            for shape, wanted in curves.items():
                with siblings_of(shape) as siblings:
                    for collective, contention in wanted:
                        self._measure_curve(collective, siblings, contention)
        with progress.phase("overlap"):
            for collective in overlaps:
                progress.at(f"overlap of {collective} and computation")
                self.keep(overlaps=(measure_overlap(collective, LEAST_LARGEST_BYTES),))
                progress.advance()
        with progress.phase("optimizer"):
            for elements in host_steps:
                progress.at(f"a step over {elements} elements in host memory")
                self.keep(host_steps=(measure_host_step(elements, self.model.precision),))
                progress.advance()
        with progress.phase("building models"):
            for item in builds:
                progress.at(str(item))
                self._measure_build(item)
        with progress.phase("engines"):
            for item in engines:
                progress.at(f"ZeRO 2 and 3, {item}")
                self._measure_engines(item)
                progress.advance()

    def _arguments_of(self, item: Build) -> Namespace:
        return arguments_for(
            self.arguments,
            self.model,
            item.layer,
            layers=item.layers,
            tp=item.weight_shards,
            sequence_parallel=item.sequence_parallel,
            zero=item.zero,
            world_size=self._world,
            defaults=self.defaults,
        )

    def _measure_engines(self, item: Build) -> None:
        name, points = layer_digest(item.layer), []
        try:
            made = self._arguments_of(item)
            reason = "" if can_measure_engines(made) else "too large to count, or with experts"
            if not reason:
                with parallel_state_of(item.weight_shards, made):
                    points = measure_engines(made, name)
        except (GalvatronError, *REFUSALS) as error:
            reason = refusal(error)
        # A lost rank looks like a refusal to the others, which notice here.
        if reason := any_reason(reason):
            points = [EnginePoint(part=name, zero=zero, failure=reason) for zero in STAGES]
        notes = (f"ZeRO 2 and 3, {item}: engines not measured, {reason}",) if reason else ()
        self.keep(engines=tuple(points), notes=notes)

    def _measure_curve(self, collective: str, siblings: Siblings, contention: bool) -> None:
        shape = siblings.shape
        what = f"{collective} over {shape.ranks} ranks, stride {shape.stride}"
        self.progress.at(what)
        curve, by_rank = measure_curve(
            collective,
            siblings,
            largest_bytes=self._largest_bytes(collective),
            nodes=nodes_of_group(shape.ranks, shape.stride, self.profile.provenance.ranks_per_node),
            contention=contention,
        )
        self.keep(collectives=(curve,), notes=self._stragglers(what, by_rank) if contention else ())
        self.progress.advance()

    def _largest_bytes(self, collective: str) -> int:
        tokens = self.needs.micro_batch_sizes[-1] * self.model.seq_length
        activation = 4 * tokens * self.model.hidden_size
        weights = (
            4 * self.model.vocab_size * self.model.hidden_size
            + 48 * len(self.model.layers) * self.model.hidden_size**2
        )
        wanted = activation if collective in ("send", "broadcast", "all_to_all") else max(activation, weights)
        return min(max(wanted, LEAST_LARGEST_BYTES), LARGEST_CPU_BYTES if on_cpu() else LARGEST_GPU_BYTES)

    def _measure_build(self, item: Build) -> None:
        progress = self.progress
        name = layer_digest(item.layer)
        try:
            made = self._arguments_of(item)
        except GalvatronError as error:
            self._keep_failure(item, name, str(error))
            return
        with parallel_state_of(item.weight_shards, made), _sequence_group(item) as group:
            few, reason = None, ""
            try:
                few = build(made, item.layers, group)
            except REFUSALS as error:
                reason = refusal(error)
            # Memory may have run out on one rank alone; all give up together.
            reason = any_reason(reason)
            if few is None or reason:
                self._keep_failure(item, name, reason)
                return
            if item.parts:
                with progress.phase("layers"):
                    self._measure_parts(item, few)
            if item.step:
                with progress.phase("optimizer"):
                    self.keep(steps=(measure_step(few, zero=item.zero),))
                progress.advance()

    def _measure_parts(self, item: Build, few: FewLayers) -> None:
        """Measures the layers until all their curves can be read off."""
        left = len(self.needs.settings(item.tp, item.sequence_parallel))
        while settings := self.missing.settings(item.layer, item.tp, item.sequence_parallel):
            measurements = [
                PartMeasurement(
                    few=few,
                    layer_name=layer_digest(item.layer),
                    tp=item.tp,
                    sequence_parallel=item.sequence_parallel,
                    recompute=recompute,
                    micro_batch_size=size,
                    seq_length=self.model.seq_length,
                )
                for recompute, size in settings
            ]
            started = time.perf_counter()
            for _ in range(ROUNDS):
                self._measure_round(measurements)
            self._measure_uncertain(measurements, AGAIN_SHARE * (time.perf_counter() - started))
            done = min(left, len(measurements))
            left -= done
            self.progress.advance(done)
            if any(
                recompute is Recompute.NONE
                for recompute, _ in self.missing.settings(item.layer, item.tp, item.sequence_parallel)
            ):
                # The curve is bent; before that costs more sizes, make sure that no disturbance bent it.
                self._measure_round([m for m in measurements if m.recompute is Recompute.NONE])
            if item.tp == 1:
                # Without tensor parallelism no rank waits for another one.
                self.keep(notes=self._stragglers("computing layers", measurements[-1].by_rank))
        # What the curves turned out not to need.
        self.progress.advance(left)

    def _measure_uncertain(self, measurements: list[PartMeasurement], budget_seconds: float) -> None:
        """Measures again what varies much, for as long as rank 0 says."""
        started = time.perf_counter()
        while True:
            least_certain = max(measurements, key=lambda measurement: measurement.uncertainty)
            is_over = agree(time.perf_counter() - started > budget_seconds)
            if is_over or least_certain.uncertainty <= UNSURE:
                return
            self._measure_round([least_certain])

    def _measure_round(self, measurements: list[PartMeasurement]) -> None:
        for measurement in measurements:
            if points := measurement.round(self.seconds_per_point / ROUNDS):
                self.keep(parts=tuple(points))

    def _stragglers(self, what: str, by_rank: list[float]) -> tuple[str, ...]:
        note = straggler_note(what, by_rank, self.nodes)
        return (note,) if note else ()

    def _keep_failure(self, item: Build, name: str, reason: str) -> None:
        points = tuple(
            PartPoint(
                part=name,
                tp=item.tp,
                sequence_parallel=item.sequence_parallel,
                recompute=recompute,
                micro_batch_size=size,
                failure=reason,
            )
            for recompute, size in (self.needs.settings(item.tp, item.sequence_parallel) if item.parts else ())
        )
        note = f"{item}: not measured, {reason}"
        self.keep(parts=points, notes=(note,))
        self.progress.advance(self._most_measurements(item))

    def keep(self, **found: tuple) -> None:
        """Adds measurements on every rank and stores them on rank 0."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        place = self.profile.provenance
        new = Profile(provenance=replace(place, created=place.created or now, updated=now), **found)
        self.profile = replace(self.profile, provenance=new.provenance).merged(new)
        with self.progress.phase("storing"):
            on_rank_zero(lambda: write_profile(self.directory, new) and None)


@contextmanager
def _sequence_group(item: Build) -> Iterator[dist.ProcessGroup | None]:
    """Ranks over which the layers of a model run under Ulysses, None where they do not; all ranks call this."""
    if item.sequence_parallel is not SequenceParallel.ULYSSES:
        yield None
        return
    with siblings_of(GroupShape(ranks=item.tp, stride=1)) as siblings:
        yield siblings.handle
