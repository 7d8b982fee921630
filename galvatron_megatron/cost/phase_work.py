"""What a pass of one micro-batch takes before anything is sharded: operators and exchanges."""

from dataclasses import dataclass

from galvatron_megatron.cost.communication import collective_seconds
from galvatron_megatron.cost.compute import PhaseSeconds, phase_seconds
from galvatron_megatron.cost.counts_values import EXPERT_GROUPS, Collective, LayerCounts
from galvatron_megatron.describe.cluster import MICROSECOND, Cluster
from galvatron_megatron.plan.strategy import Strategy


@dataclass(kw_only=True, frozen=True, slots=True)
class PhaseWork:
    """Seconds of a pass."""

    work: PhaseSeconds
    exchanged: float
    """Collectives in the way of computation."""
    hidden: float
    """Collectives behind other work."""
    dispatch: float
    """In which tokens go to their experts' ranks and back: part of what is exchanged."""
    issued: float
    """Host time."""


def phase_work(
    counts: LayerCounts, strategy: Strategy, phases: tuple[str, ...], cluster: Cluster, precision: str
) -> PhaseWork:
    """Computation and collectives of some phases.

    Args:
        counts: of one micro-batch on one rank.
        strategy: how the layer runs; ZeRO stage and offloading change nothing here.
        phases: of the pass, see ``FORWARD_PHASES`` and ``BACKWARD_PHASES``.
        cluster: devices and links.
        precision: of the model's computation.
    """
    work = phase_seconds(counts.operators, phases, cluster.device, cluster.constants, precision)
    exchanged, hidden = exchanges(counts, strategy, phases, cluster)
    issued = sum(collective.count for collective in counts.collectives if collective.phase in phases)
    return PhaseWork(
        work=work,
        exchanged=exchanged,
        hidden=hidden,
        dispatch=_dispatch(counts, strategy, phases, cluster),
        issued=work.host + issued * cluster.constants.host_us * MICROSECOND,
    )


def exchanges(
    counts: LayerCounts, strategy: Strategy, phases: tuple[str, ...], cluster: Cluster
) -> tuple[float, float]:
    """Seconds of a phase's collectives: (in the way of computation, hidden behind other work).

    A context-parallel ring sends while attention computes; the gather that only the weight gradient waits
    for runs while the input gradient is computed.
    """
    exposed = hidden = 0.0
    for collective in counts.collectives:
        if collective.phase not in phases:
            continue
        seconds = _seconds(collective, strategy, cluster)
        if collective.group == "cp" or collective.phase == "weight_gradient":
            hidden += seconds
        else:
            exposed += seconds
    return exposed, hidden


def _dispatch(counts: LayerCounts, strategy: Strategy, phases: tuple[str, ...], cluster: Cluster) -> float:
    return sum(
        _seconds(collective, strategy, cluster)
        for collective in counts.collectives
        if collective.phase in phases and collective.group in EXPERT_GROUPS
    )


def _seconds(collective: Collective, strategy: Strategy, cluster: Cluster) -> float:
    """Seconds of all executions of a collective of a layer."""
    shapes = {
        "tp": (strategy.tp, 1),
        "cp": (strategy.cp, strategy.tp),
        "etp": (strategy.expert_shards, 1),
        "ep": (strategy.expert_parallel, strategy.expert_shards),
        "etp_ep": (strategy.expert_ranks, 1),
    }
    ranks, stride = shapes[collective.group]
    return collective.count * collective_seconds(collective.kind, collective.bytes, ranks, stride, cluster)
