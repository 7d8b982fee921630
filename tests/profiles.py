"""Made-up profiles whose every number follows a rule, so that prices can be checked by hand."""

from dataclasses import replace

from galvatron_megatron.describe.cluster import Cluster, Constants, Device, Link
from galvatron_megatron.describe.layer import Attention, Layer, Mlp
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.profile import (
    EMBEDDING,
    HEAD,
    CollectiveCurve,
    PartPoint,
    Profile,
    Provenance,
    StepPoint,
)
from galvatron_megatron.describe.profile_key import layer_digest, shape_digest
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel

LAYER_PARAMETERS = 1_000_000
REPLICATED = 1_000
"""Parameters of the layer that every rank of a tp group holds."""
EMBEDDING_PARAMETERS = 400_000
LATENCY = 1e-4
PER_BYTE = 1e-9
_LINK = Link(gb_per_second=1.0, latency_us=100.0, efficiency=1.0, base_us=0.0)
FOUR_RANKS = Cluster(
    name="four ranks",
    nodes=1,
    devices_per_node=4,
    device=Device(
        name="cpu",
        memory_gib=8.0,
        bf16_tflops=1.0,
        fp16_tflops=1.0,
        fp32_tflops=1.0,
        memory_gb_per_second=10.0,
        processors=4,
    ),
    intra_node=_LINK,
    inter_node=_LINK,
    constants=Constants(memory_slack=0.0, context_gib=0.0, workspace_mib=0.0),
)


def small_model(layers: int = 4, *, tied: bool = True) -> Model:
    block = Layer(
        kind=LayerKind.BLOCK,
        attention=Attention(heads=4, query_groups=4, head_dim=32),
        mlp=Mlp(ffn_hidden_size=512),
    )
    return Model(
        name="small",
        hidden_size=128,
        seq_length=64,
        vocab_size=1000,
        layers=(block,) * layers,
        precision="fp32",
        tied_embeddings=tied,
    )


def provenance(model: Model, ranks: int = 4) -> Provenance:
    return Provenance(
        model=shape_digest(model),
        device="a processor",
        nodes=1,
        ranks_per_node=ranks,
        processors_per_node=ranks,
        multiprocessors=ranks,
        backend="gloo",
        software=(("torch", "2"),),
        created="2026-01-01T00:00:00+00:00",
        updated="2026-01-02T00:00:00+00:00",
    )


def curve(collective: str, ranks: int, stride: int) -> CollectiveCurve:
    sizes = (1 << 10, 1 << 20, 1 << 26)
    return CollectiveCurve(
        collective=collective,
        ranks=ranks,
        stride=stride,
        latency_seconds=LATENCY,
        seconds_per_byte=PER_BYTE,
        residual=0.0,
        points=tuple((size, LATENCY + size * PER_BYTE) for size in sizes),
    )


def layer_point(model: Model, tp: int, size: int, recompute: Recompute, **changes: object) -> PartPoint:
    """A layer takes size / tp ms forward, twice that backward, and once more forward where recomputed."""
    forward = 1e-3 * size / tp
    again = {Recompute.NONE: 0.0, Recompute.SELECTIVE: 0.25, Recompute.FULL: 1.0}[recompute] * forward
    kept = {Recompute.NONE: 8, Recompute.SELECTIVE: 5, Recompute.FULL: 1}[recompute]
    return PartPoint(
        **{
            "part": layer_digest(model.layers[0]),
            "tp": tp,
            "recompute": recompute,
            "micro_batch_size": size,
            "forward_seconds": forward,
            "backward_seconds": 2 * forward + again,
            "activation_bytes": kept * 100_000 * size,
            "transient_bytes": 50_000 * size,
            "parameters": (LAYER_PARAMETERS - REPLICATED) // tp + REPLICATED,
            "tensors": 12,
        }
        | changes
    )


def ulysses_point(model: Model, ranks: int, size: int, **changes: object) -> PartPoint:
    """Computes as one rank does for size / ranks samples; exchanges take 0.1 ms, and 20 us a sample, twice."""
    alone = layer_point(model, 1, size, Recompute.NONE)
    exchange = 1e-4 + 2e-5 * size
    computed = {
        "tp": ranks,
        "sequence_parallel": SequenceParallel.ULYSSES,
        "forward_seconds": alone.forward_seconds / ranks + exchange,
        "backward_seconds": alone.backward_seconds / ranks + exchange,
        "activation_bytes": alone.activation_bytes // ranks,
        "transient_bytes": alone.transient_bytes // ranks + 100 * size,
    }
    return replace(alone, **(computed | changes))


def small_profile(
    model: Model, *, sizes: tuple[int, ...] = (1, 2, 4), tps: tuple[int, ...] = (1, 2)
) -> Profile:
    parts = []
    for tp in tps:
        for kind in (SequenceParallel.NONE, SequenceParallel.MEGATRON)[: 1 + (tp > 1)]:
            for size in sizes:
                for recompute in Recompute:
                    parts.append(layer_point(model, tp, size, recompute, sequence_parallel=kind))
                for part, parameters in ((EMBEDDING, EMBEDDING_PARAMETERS // tp), (HEAD, 256)):
                    parts.append(
                        PartPoint(
                            part=part,
                            tp=tp,
                            sequence_parallel=kind,
                            micro_batch_size=size,
                            forward_seconds=1e-4 * size,
                            backward_seconds=2e-4 * size,
                            activation_bytes=30_000 * size,
                            transient_bytes=200_000 * size,
                            parameters=parameters,
                            tensors=2,
                        )
                    )
    shapes = [(2, 1), (2, 2), (4, 1)]
    steps = [
        StepPoint(tensors=t, parameters=p, updated=p >> zero, zero=zero, seconds=1e-5 * t + 2e-9 * (p >> zero))
        for zero in (0, 1)
        for t, p in ((12, 1_000_000), (24, 2_000_000), (24, 1_000_000))
    ]
    return Profile(
        provenance=provenance(model),
        parts=tuple(parts),
        steps=tuple(steps),
        collectives=tuple(
            curve(kind, ranks, stride)
            for kind in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")
            for ranks, stride in shapes
        ),
        speeds=(("bfloat16", 1e12), ("float16", 1e12), ("float32", 1e12), ("copy", 1e10), ("memory", 2.0**33)),
    )


def ulysses_problem() -> tuple[Model, Profile, tuple[PartPoint, ...]]:
    """A model, two measured ranks on which Ulysses is best for one sample a step, and its measurements.

    Data parallelism has nothing to share out. Tensor parallelism sums activations over slow links, which its
    measured times hold; Ulysses exchanges less.

    Returns:
        The model, the profile without Ulysses, and what was measured of that.
    """
    model = replace(small_model(), fused_attention=False, seq_length=1024)
    name = layer_digest(model.layers[0])
    profile = small_profile(model, sizes=(1, 2), tps=(1, 2))

    def slowed(point: PartPoint, factor: float) -> PartPoint:
        forward, backward = factor * point.forward_seconds, factor * point.backward_seconds
        return replace(point, forward_seconds=forward, backward_seconds=backward)

    layers = [slowed(point, 10 if point.tp == 1 else 30) for point in profile.parts if point.part == name]
    ends = [point for point in profile.parts if point.part != name]
    speeds = dict(profile.speeds) | {"memory": 2.0**30}
    shapes = [curve("all_to_all", 2, 1), *(entry for entry in profile.collectives if entry.ranks == 2)]
    found = replace(
        profile,
        provenance=provenance(model, ranks=2),
        parts=(*layers, *ends),
        collectives=tuple(shapes),
        speeds=tuple(speeds.items()),
    )
    return model, found, tuple(slowed(ulysses_point(model, 2, size), 10) for size in (1, 2))
