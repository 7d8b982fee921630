"""Time of collectives: latency and bandwidth by group shape and link level, with shared adapters."""

from functools import lru_cache
from math import ceil, log2

from galvatron_megatron.describe.cluster import GB, MICROSECOND, Cluster
from galvatron_megatron.errors import DescriptionError

_VOLUME = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0}


@lru_cache(maxsize=65536)
def collective_seconds(kind: str, message_bytes: float, ranks: int, stride: int, cluster: Cluster) -> float:
    """Time of one collective while all sibling groups of the job run the same collective.

    Rings inside a node; between nodes one ring per adapter. A group with r members in a node drives r
    adapters, and its siblings drive the others, so that every device always has one adapter's bandwidth and
    the ring of a group moves r times that (never more than the links inside the node), or once that where
    the link does not spread groups over adapters (``Link.spreads_groups``)::

        all-reduce                                2 (n-1)/n B / bandwidth
        all-gather, reduce-scatter, broadcast       (n-1)/n B / bandwidth

    The latency is the number of dependent hops: 2 (r-1) inside a node, and a tree of depth log2(nodes) between
    nodes for an all-reduce, where the other collectives follow the ring (NCCL's algorithms).

    Args:
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``broadcast``, ``all_to_all`` or ``send``.
        message_bytes: of the full buffer: the all-reduced tensor, the gathered output, the input of a
            reduce-scatter or (on one rank) of an all-to-all, the tensor sent.
        ranks: size of the group.
        stride: distance between neighbouring ranks of the group (for ``send``: between the two ranks).
        cluster: where it runs.

    Returns:
        Seconds; zero for a group of one or an empty message.

    Raises:
        DescriptionError: the kind is unknown.
    """
    if message_bytes <= 0 or (ranks == 1 and kind != "send"):
        return 0.0
    inside, between = cluster.intra_node, cluster.inter_node
    if kind == "send":
        crosses = stride >= cluster.devices_per_node
        link = between if crosses else inside
        return link.latency_us * MICROSECOND + message_bytes / (link.gb_per_second * GB * link.efficiency)
    members = cluster.members_per_node(ranks, stride)
    nodes = ceil(ranks / members)
    hops = (members - 1) * inside.latency_us
    if kind == "all_to_all":
        seconds = message_bytes * (members - 1) / ranks / inside.bandwidth(ranks)
        if nodes > 1:
            away = message_bytes * (ranks - members) / ranks / between.bandwidth(ranks)
            seconds = max(seconds, away)
            hops += (nodes - 1) * between.latency_us
        return seconds + (max(inside.base_us, between.base_us if nodes > 1 else 0) + hops) * MICROSECOND
    if kind not in _VOLUME:
        raise DescriptionError(
            f"collective {kind!r} is unknown; valid: {', '.join([*_VOLUME, 'all_to_all', 'send'])}"
        )
    bandwidth = inside.bandwidth(members) if members > 1 else float("inf")
    base = inside.base_us
    if nodes > 1:
        driven = members if between.spreads_groups or members >= cluster.devices_per_node else 1
        bandwidth = min(bandwidth, driven * between.bandwidth(ranks))
        hops += (2 * ceil(log2(nodes)) if kind == "all_reduce" else nodes - 1) * between.latency_us
        base = between.base_us
    volume = _VOLUME[kind] * (ranks - 1) / ranks * message_bytes
    return volume / bandwidth + (base + hops) * MICROSECOND
