"""What a profile lacks of what a search will ask for."""

from dataclasses import dataclass
from importlib.util import find_spec

from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.describe.profile_key import layer_digest
from galvatron_megatron.device import on_cpu
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.profiler.collectives import GroupShape, shapes_of_plans
from galvatron_megatron.profiler.host_step import host_step_sizes
from galvatron_megatron.profiler.needs import ProfileNeeds, can_exchange
from galvatron_megatron.profiler.overlap import COLLECTIVES as OVERLAPPED
from galvatron_megatron.profiler.sizes import settings_to_measure

MOST_LAYERS = 2
"""Layers in memory at most: a layer's weights then leave the processor's caches as in a real model."""


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


@dataclass(kw_only=True, frozen=True, slots=True)
class Missing:
    """What is missing. Every rank has the same profile, so every rank finds the same lists."""

    model: Model
    needs: ProfileNeeds
    """What to measure."""
    profile: Profile
    """What is measured."""

    @property
    def _world_size(self) -> int:
        return self.profile.provenance.world_size

    def anything(self) -> bool:
        """True where something is to be measured and stored."""
        alone = self.speeds() or self.curves() or self.overlaps() or self.host_steps()
        return bool(alone or self.engines() or self.builds())

    def speeds(self) -> bool:
        """True where the speed of the devices is to be measured, or that of their hosts."""
        speeds = dict(self.profile.speeds)
        return not speeds or (self.needs.host_step and "to_host" not in speeds)

    def curves(self) -> dict[GroupShape, list[tuple[str, bool]]]:
        """(collective, contention) to measure, by the shape of the groups.

        Plans are priced with all sibling groups active. Alone, where there are siblings, a group shows what
        groups take from each other.
        """
        have = {curve.key for curve in self.profile.collectives}
        missing: dict[GroupShape, list[tuple[str, bool]]] = {}
        for collective, shapes in shapes_of_plans(self._world_size, self.needs.tps).items():
            for shape in shapes:
                for contention in (True, False)[: 1 + (shape.ranks < self._world_size)]:
                    if (collective, shape.ranks, shape.stride, contention) not in have:
                        missing.setdefault(shape, []).append((collective, contention))
        return dict(sorted(missing.items()))

    def overlaps(self) -> list[str]:
        """Kinds of collective whose overlap with computation is to be measured."""
        have = {overlap.collective for overlap in self.profile.overlaps}
        return [name for name in OVERLAPPED if name not in have and self._world_size > 1]

    def host_steps(self) -> tuple[int, ...]:
        """Numbers of elements with which a step over states in host memory is to be measured."""
        if not self.needs.host_step:
            return ()
        have = {point.updated for point in self.profile.host_steps}
        wanted = host_step_sizes(self.model.parameter_count(), self._world_size)
        return tuple(elements for elements in wanted if elements not in have)

    def engines(self) -> list[Build]:
        """Models of one layer to run under engines of ZeRO 2 and 3."""
        tp = self.needs.tps[0]
        wanted = on_cpu() and self._world_size > tp and 1 in self.needs.zeros
        if not wanted or find_spec("deepspeed") is None:
            return []
        have = {point.part for point in self.profile.engines}
        layers = dict.fromkeys(layer for layer in self.model.layers if layer_digest(layer) not in have)
        plain = {"sequence_parallel": SequenceParallel.NONE, "parts": False, "step": False}
        return [Build(layer=layer, layers=1, tp=tp, zero=0, **plain) for layer in layers]

    def builds(self) -> list[Build]:
        """Models to build and what to measure on them."""
        builds = []
        measured = {point.zero for point in self.profile.steps}
        for layer in dict.fromkeys(self.model.layers):
            count = sum(1 for other in self.model.layers if other == layer)
            layers = min(count, MOST_LAYERS)
            for tp, kind in self.needs.layouts():
                if kind is SequenceParallel.ULYSSES and not can_exchange(layer, tp):
                    continue
                if self.settings(layer, tp, kind):
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

    def settings(self, layer: Layer, tp: int, kind: SequenceParallel) -> list[tuple[Recompute, int]]:
        """(recomputation, micro-batch size) pairs that one kind of layer lacks under one layout."""
        return settings_to_measure(self.profile.parts, layer_digest(layer), tp, kind, self.needs)
