"""Nodes and devices of the live ranks."""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from galvatron_megatron.describe.cluster import Cluster, Constants, Device, Host, Link
from galvatron_megatron.describe.host import processor_name, software_versions
from galvatron_megatron.describe.profile import Profile, Provenance
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.profiler.clock import Clock, on_cpu
from galvatron_megatron.profiler.fit import undisturbed
from galvatron_megatron.profiler.process_group import gather


@dataclass(kw_only=True, frozen=True, slots=True)
class RankFacts:
    """What one rank knows about its place."""

    node: str
    """Host name and network namespace: ranks with equal ones talk without the network between nodes."""
    device: str
    memory_bytes: int
    """Of the rank's own device; on CPU ranks its share of the host's memory, once ranks are counted."""
    processors: int
    """Processor cores that the rank may use."""
    multiprocessors: int


def facts_of_this_rank() -> RankFacts:
    """Looks at the rank's host and device."""
    namespace = Path("/proc/self/ns/net")
    place = namespace.readlink().name if namespace.is_symlink() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if on_cpu():
        memory = _host_memory_bytes()
        device, multiprocessors = processor_name(), cores
    else:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        device, memory = properties.name, properties.total_memory
        multiprocessors = properties.multi_processor_count
    return RankFacts(
        node=f"{socket.gethostname()} {place}",
        device=device,
        memory_bytes=memory,
        processors=cores,
        multiprocessors=multiprocessors,
    )


def check_nodes(facts: list[RankFacts]) -> tuple[int, int]:
    """Nodes and ranks per node.

    Args:
        facts: of every rank, by rank.

    Raises:
        GalvatronError: nodes with different numbers of ranks, ranks of a node that are not consecutive, or
            different devices.
    """
    counts = Counter(entry.node for entry in facts)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{node.split()[0]}: {count}" for node, count in counts.items())
        raise GalvatronError(f"ranks: nodes have different numbers of ranks ({listed}); valid: equal numbers")
    ranks_per_node = len(facts) // len(counts)
    for start in range(0, len(facts), ranks_per_node):
        if len({entry.node for entry in facts[start : start + ranks_per_node]}) > 1:
            raise GalvatronError(
                f"ranks: {start} to {start + ranks_per_node - 1} are not on one node; "
                "valid: ranks of a node are consecutive"
            )
    devices = {entry.device for entry in facts}
    if len(devices) > 1:
        raise GalvatronError(f"ranks: different devices ({', '.join(sorted(devices))}); valid: equal devices")
    return len(counts), ranks_per_node


def provenance_of_ranks(
    model_digest: str, backend: str, facts: list[RankFacts], *, switches: str
) -> Provenance:
    """What a profile made on these ranks is filed under, without the times."""
    nodes, ranks_per_node = check_nodes(facts)
    return Provenance(
        model=model_digest,
        device=facts[0].device,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        processors_per_node=facts[0].processors,
        multiprocessors=facts[0].multiprocessors,
        backend=backend,
        software=software_versions(),
        switches=switches,
    )


def nodes_of_group(ranks: int, stride: int, ranks_per_node: int) -> int:
    """Nodes that a group of a shape spans, the first group standing for its siblings."""
    return len({(index * stride) // ranks_per_node for index in range(ranks)})


def measure_speeds(facts: list[RankFacts]) -> tuple[tuple[str, float], ...]:
    """The speeds of a device and its memory, for a profile; every rank calls this.

    Args:
        facts: of every rank.

    Returns:
        See :attr:`galvatron_megatron.describe.profile.Profile.speeds`.
    """
    cpu = on_cpu()
    memory = min(entry.memory_bytes for entry in facts)
    if cpu:
        # CPU ranks share the host's memory.
        memory //= Counter(entry.node for entry in facts).most_common(1)[0][1]
    copied = 8 << 20 if cpu else 512 << 20
    return (*_device_speed(256 if cpu else 8192, copied), *_host_speed(copied), ("memory", float(memory)))


def cluster_from_ranks(profile: Profile, *, memory_gb: float | None = None) -> Cluster:
    """The cluster of the live ranks, links from the measured curves.

    Args:
        profile: with speeds and collective curves.
        memory_gb: memory of a device that a plan may use, in GiB; by default all of it, and for CPU ranks the
            rank's share of the host's memory.

    Returns:
        A cluster whose peaks are what the device reached in a short test.
    """
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


def _seconds(work: Callable[[], object]) -> float:
    """Lower quartile of a few repeats, after one that is not counted."""
    clock = Clock()
    work()
    times = []
    for _ in range(5):
        start = clock.mark()
        work()
        end = clock.mark()
        clock.synchronize()
        times.append(clock.seconds(start, end))
    return undisturbed(times)[0]


def _slowest(names: tuple[str, ...], found: list[float]) -> tuple[tuple[str, float], ...]:
    """The slowest rank's speeds, by name."""
    return tuple(zip(names, (min(values) for values in zip(*gather(found), strict=True)), strict=True))


def _host_speed(copied_bytes: int) -> tuple[tuple[str, float], ...]:
    """Copies between device and page-locked host memory and inside host memory, all ranks at work.

    On CPU ranks, where the host is the device, all three are copies inside its memory. A copy inside memory
    counts twice: what it reads and what it writes.
    """
    page_locked = not on_cpu()
    near, far = (torch.zeros(copied_bytes, device="cpu", dtype=torch.uint8) for _ in range(2))
    if page_locked:
        near = near.pin_memory()
    device = torch.zeros(copied_bytes, device="cuda", dtype=torch.uint8)
    found = [
        copied_bytes / _seconds(lambda: near.copy_(device, non_blocking=True)),
        copied_bytes / _seconds(lambda: device.copy_(near, non_blocking=True)),
    ]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        far.copy_(near)
        times.append(time.perf_counter() - start)
    found += [2 * copied_bytes / undisturbed(times)[0], float(_host_memory_bytes())]
    return _slowest(("to_host", "from_host", "host_memory", "node_memory"), found)


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _device_speed(size: int, copied_bytes: int) -> tuple[tuple[str, float], ...]:
    """Square matrix products and a copy, all ranks at work, the slowest rank's speed."""
    found = []
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.ones((size, size), device="cuda", dtype=kind) for _ in range(2))
        found.append(2 * size**3 / _seconds(lambda a=a, b=b: torch.mm(a, b)))
    source, target = (torch.zeros(copied_bytes, device="cuda", dtype=torch.uint8) for _ in range(2))
    found.append(copied_bytes / _seconds(lambda: target.copy_(source)))
    return _slowest(("bfloat16", "float16", "float32", "copy"), found)


def gather_facts() -> list[RankFacts]:
    """Facts of every rank, by rank, on every rank."""
    return gather(facts_of_this_rank())
