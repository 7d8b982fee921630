"""The cluster that a profile was measured on."""

from galvatron_megatron.describe.cluster import Cluster, Constants, Device, Host, Link
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.errors import DescriptionError


def cluster_from_ranks(profile: Profile, *, memory_gb: float | None = None) -> Cluster:
    """The cluster of the live ranks, links from the measured curves.

    Args:
        profile: with speeds and collective curves.
        memory_gb: memory of a device that a plan may use, in GiB; by default all of it, and for CPU ranks the
            rank's share of the host's memory.

    Returns:
        A cluster whose peaks are what the device reached in a short test.

    Raises:
        DescriptionError: the profile lacks the speed of the devices.
    """
    if not profile.speeds:
        raise DescriptionError(
            f"profile {profile.fingerprint()}: lacks the speed of its devices; valid: a complete profile, "
            "galvatron profile again goes on with it"
        )
    place = profile.provenance
    speeds = dict(profile.speeds)
    inside = _link(profile, across_nodes=False)
    return Cluster(
        name=f"live-{place.nodes}x{place.ranks_per_node}",
        nodes=place.nodes,
        devices_per_node=place.ranks_per_node,
        device=Device(
            name=place.device,
            memory_gib=memory_gb if memory_gb is not None else speeds["memory"] / 2**30,
            bf16_tflops=speeds["bfloat16"] / 1e12,
            fp16_tflops=speeds["float16"] / 1e12,
            fp32_tflops=speeds["float32"] / 1e12,
            memory_gb_per_second=speeds["copy"] / 1e9,
            processors=place.multiprocessors,
        ),
        host=_host(speeds),
        intra_node=inside,
        inter_node=_link(profile, across_nodes=True) if place.nodes > 1 else inside,
        constants=_constants(profile),
        sources=(f"measured on the live ranks, profile {profile.fingerprint()}",),
    )


def _host(speeds: dict[str, float]) -> Host | None:
    """Hosts as their devices met them; None in profiles that were made before this was measured."""
    if "to_host" not in speeds:
        return None
    return Host(
        gb_per_second=min(speeds["to_host"], speeds["from_host"]) / 1e9,
        memory_gb_per_second=speeds["host_memory"] / 1e9,
        efficiency=1.0,
        memory_gib=speeds["node_memory"] / 2**30,
        source="measured",
    )


def _constants(profile: Profile) -> Constants:
    """What a device allocates beside a plan: nothing on CPU ranks, a driver context and slack on GPUs."""
    # Of the data-parallel collectives: what training overlaps with computation.
    beside = [
        o.slowdown for o in profile.overlaps if o.collective in ("all_reduce", "all_gather", "reduce_scatter")
    ]
    slowest = max(beside, default=Constants().overlap_slowdown)
    if profile.provenance.backend != "gloo":
        return Constants(overlap_slowdown=slowest)
    return Constants(
        context_gib=0.0, memory_slack=0.0, workspace_mib=0.0, kernel_us=0.0, overlap_slowdown=slowest
    )


def _link(profile: Profile, *, across_nodes: bool) -> Link:
    """Bandwidth and latency of a level: point-to-point, else the ring bandwidth of an all-reduce."""
    found = [c for c in profile.collectives if c.contention and (c.nodes >= 2) == across_nodes]
    for curve in sorted(found, key=lambda c: (c.collective != "send", c.ranks)):
        if curve.collective == "send" and curve.seconds_per_byte > 0:
            per_byte = curve.seconds_per_byte
        elif curve.collective == "all_reduce" and curve.seconds_per_byte > 0:
            per_byte = curve.seconds_per_byte * curve.ranks / (2 * (curve.ranks - 1))
        else:
            continue
        return Link(
            gb_per_second=1 / per_byte / 1e9,
            latency_us=curve.latency_seconds * 1e6,
            efficiency=1.0,
            base_us=0.0,
        )
    # One rank: no link exists, and none is ever asked for.
    return Link(gb_per_second=1.0, latency_us=0.0, efficiency=1.0, base_us=0.0)
