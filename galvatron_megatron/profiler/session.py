"""Fills a profile on the live ranks, in front of a training job or on its own."""

import logging
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist

from galvatron_megatron.describe.cluster import Cluster
from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.describe.profile import EnginePoint, PartPoint, Profile
from galvatron_megatron.describe.profile_cluster import cluster_from_ranks
from galvatron_megatron.describe.profile_key import layer_digest, shape_digest
from galvatron_megatron.describe.profile_store import (
    check_directory,
    from_json,
    read_profile,
    to_json,
    write_profile,
)
from galvatron_megatron.device import on_cpu
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.profiler.collectives import (
    GroupShape,
    Siblings,
    measure_curve,
    shapes_of_plans,
    siblings_of,
)
from galvatron_megatron.profiler.few_layers import (
    REFUSALS,
    FewLayers,
    arguments_for,
    build,
    megatron_state_restored,
    parallel_state_of,
    refusal,
)
from galvatron_megatron.profiler.host_step import compile_host_step, host_step_sizes, measure_host_step
from galvatron_megatron.profiler.layers import PartMeasurement
from galvatron_megatron.profiler.levels import level_notes, place_of_this_rank
from galvatron_megatron.profiler.lost_ranks import Watchdog, end_process, one_line_errors
from galvatron_megatron.profiler.needs import ProfileNeeds, can_exchange
from galvatron_megatron.profiler.optimizer import measure_step
from galvatron_megatron.profiler.overlap import COLLECTIVES as OVERLAPPED
from galvatron_megatron.profiler.overlap import measure_overlap
from galvatron_megatron.profiler.process_group import agree, gather, own_process_group
from galvatron_megatron.profiler.progress import Progress
from galvatron_megatron.profiler.sizes import settings_to_measure
from galvatron_megatron.profiler.stragglers import straggler_note
from galvatron_megatron.profiler.switches import switches_of
from galvatron_megatron.profiler.topology import (
    gather_facts,
    measure_speeds,
    nodes_of_group,
    provenance_of_ranks,
)
from galvatron_megatron.profiler.zero_engines import STAGES, can_measure_engines, measure_engines

MOST_LAYERS = 2
"""Layers in memory at most: a layer's weights then leave the processor's caches as in a real model."""
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


@dataclass(kw_only=True, frozen=True, slots=True)
class Build:
    """One model to build: every measurement on it is made before the next one is built."""

    layer: Layer
    layers: int
    tp: int
    sequence_parallel: SequenceParallel
    zero: int
    parts: bool
    """Measure the layers, embedding and head."""
    step: bool
    """Measure the optimizer."""

    @property
    def weight_shards(self) -> int:
        """In how many parts the weights are split: Megatron's tensor-parallel degree."""
        return 1 if self.sequence_parallel is SequenceParallel.ULYSSES else self.tp

    def __str__(self) -> str:
        kind = "" if self.sequence_parallel is SequenceParallel.NONE else f" {self.sequence_parallel.value}"
        return f"{self.layers} {self.layer.kind.value} layers, tp {self.tp}{kind}, zero {self.zero}"


def on_rank_zero[T](work: Callable[[], T]) -> T:
    """Runs work on rank 0 and gives every rank its answer, or raises its error on every rank."""
    answer: tuple[Any, str] = (None, "")
    if dist.get_rank() == 0:
        try:
            answer = (work(), "")
        except GalvatronError as error:
            answer = (None, str(error))
    value, message = agree(answer)
    if message:
        raise GalvatronError(message)
    return value


def profile_live_ranks(
    model: Model,
    arguments: Namespace,
    needs: ProfileNeeds,
    directory: Path,
    *,
    args_defaults: Mapping[str, Any] | None = None,
    backend: str | None = None,
    memory_gb: float | None = None,
    again: bool = False,
    show: bool = True,
    seconds_per_point: float = 0.25,
    timeout_seconds: float = 300.0,
    end_stuck: Callable[[str], None] = end_process,
) -> tuple[Profile, Cluster]:
    """Measures what the profile store lacks; every rank of the job calls this before Megatron initialises.

    The CPU device back end must be installed where there is no GPU. Rank 0 reads and writes the store; every
    measurement is stored as soon as it is made, so that a job that is killed goes on where it was.

    Args:
        model: what the arguments describe.
        arguments: Megatron's parsed arguments, validated or not; left unchanged.
        needs: what to measure.
        directory: the profile store, an existing directory; writable where it lacks anything.
        args_defaults: the training script's ``args_defaults``.
        backend: ``nccl`` or ``gloo``; Megatron's ``--distributed-backend`` by default.
        memory_gb: memory of a device that a plan may use, for the cluster.
        again: measure even what the store has.
        show: show progress on rank 0.
        seconds_per_point: time for the repeats of one setting.
        timeout_seconds: after this long without an answer of a rank, the job ends with an error.
        end_stuck: ends this process with a line where another rank's silence holds it in a call without a
            time limit.

    Returns:
        The profile and the cluster of the live ranks, equal on every rank.

    Raises:
        GalvatronError: the store cannot be used, ranks cannot reach each other, or one died.
    """
    backend = backend or getattr(arguments, "distributed_backend", None) or ("gloo" if on_cpu() else "nccl")
    if on_cpu():
        backend = "gloo"
    if not any(getattr(arguments, name, False) for name in ("use_torch_fsdp2", "use_megatron_fsdp")):
        # Megatron asks for it with tensor parallelism; it counts until CUDA starts in this process.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if needs.host_step:
        compile_host_step()
    with (
        megatron_state_restored(),
        _quiet(),
        Watchdog(timeout_seconds, end_stuck) as watchdog,
        own_process_group(backend, timeout_seconds),
        Progress(show=show and dist.get_rank() == 0) as progress,
        one_line_errors(progress, timeout_seconds),
    ):
        watchdog.watch(progress)
        progress.at("the hardware of the ranks")
        on_rank_zero(lambda: str(check_directory(directory, write=False)))
        facts = gather_facts()
        switches = switches_of(arguments)
        provenance = provenance_of_ranks(shape_digest(model), backend, facts, switches=switches)
        run = _Run(
            model, arguments, needs, directory, dict(args_defaults or {}), Profile(provenance=provenance)
        )
        run.seconds_per_point = seconds_per_point
        run.nodes = [entry.node for entry in facts]
        text, note = on_rank_zero(lambda: run.stored_text(again))
        if text:
            run.profile = from_json(text, str(directory))
        if note:
            progress.note(note)
        run.progress = progress
        if run.lacks_anything():
            # Before minutes of measurements; a read-only store that holds all of them serves as it is.
            on_rank_zero(lambda: str(check_directory(directory, lacks="measurements of this job")))
        if run.lacks_speeds():
            progress.at("the speed of the devices")
            with progress.phase("device speed"):
                places = gather(place_of_this_rank(run.nodes[dist.get_rank()]))
                run.keep(speeds=measure_speeds(facts), notes=level_notes(places))
        run.measure()
    return run.profile, cluster_from_ranks(run.profile, memory_gb=memory_gb)


@contextmanager
def _sequence_group(item: Build) -> Iterator[dist.ProcessGroup | None]:
    """Ranks over which the layers of a model run under Ulysses, None where they do not; all ranks call this."""
    if item.sequence_parallel is not SequenceParallel.ULYSSES:
        yield None
        return
    with siblings_of(GroupShape(ranks=item.tp, stride=1)) as siblings:
        yield siblings.handle


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Megatron's log lines about every small model out of the job's output."""
    logger = logging.getLogger("megatron")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Run:
    """The work of one call, equal on every rank but for the store."""

    def __init__(
        self,
        model: Model,
        arguments: Namespace,
        needs: ProfileNeeds,
        directory: Path,
        defaults: dict[str, Any],
        profile: Profile,
    ) -> None:
        self.model = model
        self.arguments = arguments
        self.needs = needs
        self.directory = directory
        self.defaults = defaults
        self.profile = profile
        self.seconds_per_point = 0.25
        self.nodes: list[str] = []
        self.progress = Progress(show=False)
        self._world = profile.provenance.world_size

    def stored_text(self, again: bool) -> tuple[str, str]:
        """The stored profile as text, and a line about a damaged file."""
        if again:
            return "", ""
        found, note = read_profile(self.directory, self.profile.fingerprint())
        return (to_json(found) if found else ""), note

    # What is missing. Every rank has the same profile, so every rank finds the same list.

    def lacks_anything(self) -> bool:
        """True where something is to be measured and stored."""
        complete = not (self.lacks_speeds() or self.missing_curves() or self.missing_overlaps())
        others = self.missing_host_steps() or self.missing_engines() or self.missing_builds()
        return not complete or bool(others)

    def lacks_speeds(self) -> bool:
        """True where the speed of the devices is to be measured, or that of their hosts."""
        speeds = dict(self.profile.speeds)
        return not speeds or (self.needs.host_step and "to_host" not in speeds)

    def missing_curves(self) -> dict[GroupShape, list[tuple[str, bool]]]:
        """(collective, contention) to measure, by the shape of the groups.

        Plans are priced with all sibling groups active. Alone, where there are siblings, a group shows what
        groups take from each other.
        """
        have = {curve.key for curve in self.profile.collectives}
        missing: dict[GroupShape, list[tuple[str, bool]]] = {}
        for collective, shapes in shapes_of_plans(self._world, self.needs.tps).items():
            for shape in shapes:
                for contention in (True, False)[: 1 + (shape.ranks < self._world)]:
                    if (collective, shape.ranks, shape.stride, contention) not in have:
                        missing.setdefault(shape, []).append((collective, contention))
        return dict(sorted(missing.items()))

    def missing_overlaps(self) -> list[str]:
        """Kinds of collective whose overlap with computation is to be measured."""
        have = {overlap.collective for overlap in self.profile.overlaps}
        return [name for name in OVERLAPPED if name not in have and self._world > 1]

    def missing_host_steps(self) -> tuple[int, ...]:
        """Numbers of elements with which a step over states in host memory is to be measured."""
        if not self.needs.host_step:
            return ()
        have = {point.updated for point in self.profile.host_steps}
        wanted = host_step_sizes(self.model.parameter_count(), self._world)
        return tuple(elements for elements in wanted if elements not in have)

    def missing_engines(self) -> list[Build]:
        """Models of one layer to run under engines of ZeRO 2 and 3."""
        tp = self.needs.tps[0]
        wanted = on_cpu() and self._world > tp and 1 in self.needs.zeros
        if not wanted or find_spec("deepspeed") is None:
            return []
        have = {point.part for point in self.profile.engines}
        layers = dict.fromkeys(layer for layer in self.model.layers if layer_digest(layer) not in have)
        plain = {"sequence_parallel": SequenceParallel.NONE, "parts": False, "step": False}
        return [Build(layer=layer, layers=1, tp=tp, zero=0, **plain) for layer in layers]

    def missing_builds(self) -> list[Build]:
        """Models to build and what to measure on them."""
        builds = []
        measured = {point.zero for point in self.profile.steps}
        for layer in dict.fromkeys(self.model.layers):
            count = sum(1 for other in self.model.layers if other == layer)
            layers = min(count, MOST_LAYERS)
            for tp, kind in self.needs.layouts():
                if kind is SequenceParallel.ULYSSES and not can_exchange(layer, tp):
                    continue
                if self._missing_settings(layer, tp, kind):
                    builds.append(
                        Build(
                            layer=layer,
                            layers=layers,
                            tp=tp,
                            sequence_parallel=kind,
                            zero=0,
                            parts=True,
                            step=kind is SequenceParallel.NONE and 0 in self.needs.zeros,
                        )
                    )
            plain = {"layer": layer, "sequence_parallel": SequenceParallel.NONE, "parts": False, "step": True}
            smallest = self.needs.tps[0]
            for zero in sorted(set(self.needs.zeros) - measured):
                builds.append(Build(layers=1, tp=smallest, zero=zero, **plain))
                if zero or not any(item.step and item.parts for item in builds):
                    builds.extend(Build(layers=layers, tp=tp, zero=zero, **plain) for tp in self.needs.tps)
        return builds

    def _missing_settings(self, layer: Layer, tp: int, kind: SequenceParallel) -> list[tuple[Recompute, int]]:
        return settings_to_measure(self.profile.parts, layer_digest(layer), tp, kind, self.needs)

    def _most_measurements(self, item: Build) -> int:
        """Measurements on a model, unless curves turn out to be bent."""
        return item.parts * len(self.needs.settings(item.tp, item.sequence_parallel)) + item.step

    def measure(self) -> None:
        """Measures everything that is missing and stores it piece by piece."""
        curves, overlaps, builds = self.missing_curves(), self.missing_overlaps(), self.missing_builds()
        host_steps = self.missing_host_steps()
        progress, engines = self.progress, self.missing_engines()
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

    def _measure_engines(self, item: Build) -> None:
        name, points = layer_digest(item.layer), []
        try:
            made = arguments_for(
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
            reason = "" if can_measure_engines(made) else "too large to count, or with experts"
            if not reason:
                with parallel_state_of(item.weight_shards, made):
                    points = measure_engines(made, name)
        except (GalvatronError, *REFUSALS) as error:
            reason = refusal(error)
        # A lost rank looks like a refusal to the others, which notice here.
        if reason := next((found for found in gather(reason) if found), ""):
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
            made = arguments_for(
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
            reason = next((found for found in gather(reason) if found), "")
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
        while settings := self._missing_settings(item.layer, item.tp, item.sequence_parallel):
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
                for recompute, _ in self._missing_settings(item.layer, item.tp, item.sequence_parallel)
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
