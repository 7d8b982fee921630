"""The profile: what was measured on a cluster for a model. Plain values, readable without torch."""

import hashlib
import json
from bisect import bisect_left
from dataclasses import asdict, dataclass, field, replace

from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel

SCHEMA_VERSION = 1

EMBEDDING = "embedding"
"""Name of the embedding among the parts of a profile."""
HEAD = "head"
"""Name of final norm, output layer and loss among the parts of a profile."""

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")


def digest(content: object) -> str:
    """16 hex digits of the SHA-256 of a JSON-serialisable value; equal values give equal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(kw_only=True, frozen=True, slots=True)
class PartPoint:
    """One measurement of a part of the model (a layer, the embedding or the head) on the live ranks."""

    part: str
    """``embedding``, ``head`` or the digest of the layer (see :func:`galvatron_megatron.describe.profile_key.
    layer_digest`)."""
    tp: int
    sequence_parallel: SequenceParallel = SequenceParallel.NONE
    recompute: Recompute = Recompute.NONE
    micro_batch_size: int
    """Samples per micro-batch of one data-parallel rank."""
    forward_seconds: float = 0.0
    """Lower quartile over repeats, maximum over ranks, with every rank of the job busy at the same time."""
    backward_seconds: float = 0.0
    """Includes recomputation and the accumulation of gradients into Megatron's gradient buffer."""
    spread: float = 0.0
    """Relative interquartile range of forward + backward."""
    activation_bytes: int = 0
    """Kept between forward and backward on one rank, the output of the part included."""
    transient_bytes: int = 0
    """Peak above what is kept, in forward or backward."""
    parameters: int = 0
    """Parameters of the part on one rank; those of a tied output layer count for the embedding."""
    tensors: int = 0
    """Parameter tensors they are in."""
    failure: str = ""
    """Why there is no measurement (``out of memory``, or Megatron's reason); empty where there is one."""
    source: str = "measured"

    def __post_init__(self) -> None:
        for name in ("tp", "micro_batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise DescriptionError(f"profile part {self.part} {name}: {value!r}; valid: an integer >= 1")
        for name in ("forward_seconds", "backward_seconds", "activation_bytes", "transient_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value >= 0:
                raise DescriptionError(f"profile part {self.part} {name}: {value!r}; valid: a number >= 0")

    @property
    def key(self) -> tuple[str, int, str, str, int]:
        """What was measured, without the result: two points with one key measure the same thing."""
        return (self.part, self.tp, self.sequence_parallel.value, self.recompute.value, self.micro_batch_size)


@dataclass(kw_only=True, frozen=True, slots=True)
class StepPoint:
    """Time of what a rank does once per step and that no collective causes: zeroing gradients, optimizer."""

    tensors: int
    """Parameter tensors of the rank."""
    parameters: int
    """Parameters of the rank, whose gradients it zeroes."""
    updated: int
    """Parameters the rank's optimizer updates: all of them, or its shard under ZeRO-1."""
    zero: int
    """0 for Megatron's plain optimizer, 1 for its distributed optimizer."""
    seconds: float
    source: str = "measured"

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What was measured, without the result."""
        return (self.tensors, self.parameters, self.updated, self.zero)


@dataclass(kw_only=True, frozen=True, slots=True)
class EnginePoint:
    """Processor time that an engine of ZeRO 2 or 3 takes beside a part's own, in every pass of a micro-batch.

    Hooks on modules and gradients, and copies to and from buffers; waiting for collectives is not in it.
    """

    part: str
    """As of :class:`PartPoint`."""
    zero: int
    """2 or 3."""
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    """Without recomputation."""
    failure: str = ""
    """Why there is no measurement; empty where there is one."""
    source: str = "measured"

    def __post_init__(self) -> None:
        for name in ("forward_seconds", "backward_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise DescriptionError(
                    f"profile engine {self.part} {name}: {getattr(self, name)!r}; valid: a number >= 0"
                )

    @property
    def key(self) -> tuple[str, int]:
        """What was measured, without the result."""
        return (self.part, self.zero)


@dataclass(kw_only=True, frozen=True, slots=True)
class CollectiveCurve:
    """Time of one kind of collective over one group shape, as a function of message size.

    The message size is that of the complete tensor: the all-reduced tensor, the gathered output of an
    all-gather, the input of a reduce-scatter or an all-to-all, the tensor that is broadcast or sent.
    """

    collective: str
    """One of ``COLLECTIVES``."""
    ranks: int
    """Group size."""
    stride: int
    """Distance between neighbours of the group; 1 for consecutive ranks."""
    nodes: int = 1
    """Nodes that one group spans; 1 inside a node."""
    contention: bool = True
    """True: all sibling groups of the job were active at once; False: one group alone."""
    latency_seconds: float
    seconds_per_byte: float
    residual: float
    """Root mean square of the relative error of latency + bytes * seconds_per_byte at the points."""
    points: tuple[tuple[int, float], ...]
    """(message bytes, seconds), by rising size: lower quartile over repeats, maximum over ranks."""
    source: str = "measured"

    def __post_init__(self) -> None:
        if self.collective not in COLLECTIVES:
            raise DescriptionError(
                f"profile collective: {self.collective!r} is unknown; valid: {', '.join(COLLECTIVES)}"
            )
        if not self.points or list(self.points) != sorted(self.points):
            raise DescriptionError(f"profile {self.collective} points: not by rising size; valid: one or more")
        if not all(0 <= seconds < float("inf") for _, seconds in self.points):
            raise DescriptionError(f"profile {self.collective} points: {self.points}; valid: seconds >= 0")

    @property
    def key(self) -> tuple[str, int, int, bool]:
        """What was measured, without the result."""
        return (self.collective, self.ranks, self.stride, self.contention)

    @property
    def bandwidth_bytes_per_second(self) -> float:
        """Asymptotic message bytes per second; infinite where no slope could be seen."""
        return 1 / self.seconds_per_byte if self.seconds_per_byte > 0 else float("inf")

    def seconds(self, message_bytes: float) -> float:
        """Time of one collective: linear between measured points, by the fitted slope above the last.

        Args:
            message_bytes: size of the complete tensor, see the class.

        Returns:
            Seconds; zero for an empty message.
        """
        if message_bytes <= 0:
            return 0.0
        sizes = [size for size, _ in self.points]
        if message_bytes <= sizes[0]:
            return self.points[0][1]
        if message_bytes >= sizes[-1]:
            return self.points[-1][1] + (message_bytes - sizes[-1]) * self.seconds_per_byte
        right = bisect_left(sizes, message_bytes)
        (size_0, time_0), (size_1, time_1) = self.points[right - 1], self.points[right]
        return time_0 + (time_1 - time_0) * (message_bytes - size_0) / (size_1 - size_0)


@dataclass(kw_only=True, frozen=True, slots=True)
class Overlap:
    """How computation and one kind of collective slow each other down."""

    collective: str
    slowdown: float
    """Both take this many times as long while both run: 1 is free overlap, 2 one after the other."""
    source: str = "measured"

    def __post_init__(self) -> None:
        if not 1 <= self.slowdown <= 2:
            raise DescriptionError(
                f"profile overlap {self.collective} slowdown: {self.slowdown!r}; valid: a number from 1 to 2"
            )

    @property
    def key(self) -> str:
        """What was measured, without the result."""
        return self.collective


@dataclass(kw_only=True, frozen=True, slots=True)
class Provenance:
    """Where and when a profile was made; everything but the times decides the fingerprint."""

    model: str
    """Digest of the layer shapes and everything else that changes the cost of one layer."""
    device: str
    """Device name as the system gives it (``NVIDIA A100-SXM4-80GB``, a CPU's model name)."""
    nodes: int
    ranks_per_node: int
    processors_per_node: int
    """Processor cores usable on a node: decides how CPU ranks share them."""
    multiprocessors: int
    """Streaming multiprocessors of a GPU, cores of a CPU rank."""
    backend: str
    """``nccl`` or ``gloo``."""
    software: tuple[tuple[str, str], ...]
    """(name, version) of python, torch, megatron-core and, where present, transformer-engine."""
    switches: str = ""
    """``name=value`` of Megatron's switches that decide which code computes a layer, where not its defaults."""
    created: str = ""
    """UTC, ISO 8601."""
    updated: str = ""

    @property
    def world_size(self) -> int:
        """Ranks of the job that measured."""
        return self.nodes * self.ranks_per_node

    def fingerprint(self) -> str:
        """16 hex digits that change with model shape, hardware, software or switches."""
        content = asdict(self)
        del content["created"], content["updated"]
        return digest([SCHEMA_VERSION, content])


@dataclass(kw_only=True, frozen=True, slots=True)
class Profile:
    """All measurements for one model shape on one cluster; grows as more is measured."""

    provenance: Provenance
    parts: tuple[PartPoint, ...] = ()
    steps: tuple[StepPoint, ...] = ()
    host_steps: tuple[StepPoint, ...] = ()
    """Of ZeRO 1 with main weights and Adam's states in host memory, without the copies; where asked for."""
    engines: tuple[EnginePoint, ...] = ()
    """Of ZeRO 2 and 3, on CPU ranks; empty in older profiles and for large models."""
    collectives: tuple[CollectiveCurve, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    speeds: tuple[tuple[str, float], ...] = ()
    """(name, value) of the device: ``bfloat16``, ``float16`` and ``float32`` matrix operations per second,
    ``copy`` bytes per second, ``to_host`` and ``from_host`` between a device and page-locked host memory,
    ``host_memory`` (read and written) inside that, all ranks of the job at work; ``memory`` bytes of a device,
    ``node_memory`` of its host."""
    notes: tuple[str, ...] = ()
    """What a reader should know: slow ranks, failed measurements."""
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise DescriptionError(
                f"profile schema_version: {self.schema_version!r} is not readable here; valid: {SCHEMA_VERSION}"
            )

    def fingerprint(self) -> str:
        """16 hex digits of what the profile was measured on (not of its numbers)."""
        return self.provenance.fingerprint()

    def collective(
        self, collective: str, ranks: int, stride: int, *, contention: bool = True
    ) -> CollectiveCurve | None:
        """The curve of a collective over a group shape, or None where it was not measured."""
        for curve in self.collectives:
            if curve.key == (collective, ranks, stride, contention):
                return curve
        return None

    def merged(self, other: "Profile") -> "Profile":
        """Adds the measurements of another profile; where both measured the same, ``other`` wins.

        Args:
            other: a profile with the same fingerprint.

        Returns:
            The union, created when ``self`` was.

        Raises:
            DescriptionError: the profiles belong to different models, clusters or software.
        """
        if self.fingerprint() != other.fingerprint():
            raise DescriptionError(
                f"profile {other.fingerprint()}: cannot be merged into {self.fingerprint()}, "
                "it was measured for another model, cluster or software; valid: a profile of equal fingerprint"
            )
        return replace(
            self,
            provenance=replace(self.provenance, updated=max(self.provenance.updated, other.provenance.updated)),
            parts=_union(self.parts, other.parts),
            steps=_union(self.steps, other.steps),
            host_steps=_union(self.host_steps, other.host_steps),
            engines=_union(self.engines, other.engines),
            collectives=_union(self.collectives, other.collectives),
            overlaps=_union(self.overlaps, other.overlaps),
            speeds=other.speeds or self.speeds,
            notes=tuple(dict.fromkeys(self.notes + other.notes)),
        )


def _union(first: tuple, second: tuple) -> tuple:
    """Points of both by key, in a stable order, the second's where both have one."""
    return tuple({point.key: point for point in (*first, *second)}.values())
