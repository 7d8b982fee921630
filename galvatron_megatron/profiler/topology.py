"""Nodes and devices of the live ranks."""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from galvatron_megatron.describe.host import memory_bytes, processor_name, software_versions
from galvatron_megatron.describe.profile import Provenance
from galvatron_megatron.device import on_cpu
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.profiler.clock import Clock
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
    processors: frozenset[int]
    """Numbers of the processor cores that the rank may use."""
    multiprocessors: int


def facts_of_this_rank() -> RankFacts:
    """Looks at the rank's host and device."""
    namespace = Path("/proc/self/ns/net")
    place = namespace.readlink().name if namespace.is_symlink() else ""
    known = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = frozenset(known)
    if on_cpu():
        memory = memory_bytes()
        device, multiprocessors = processor_name(), len(cores)
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
    """What a profile made on these ranks is filed under, without the times.

    Ranks of a node may each be bound to cores of their own, so that no rank alone knows how many there are.
    """
    nodes, ranks_per_node = check_nodes(facts)
    return Provenance(
        model=model_digest,
        device=facts[0].device,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        processors_per_node=len(frozenset().union(*(entry.processors for entry in facts[:ranks_per_node]))),
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


def _seconds(work: Callable[[], object]) -> float:
    """Lower quartile of a few repeats on all ranks at once, after one that is not counted."""
    clock = Clock()
    work()
    dist.barrier()
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
    dist.barrier()
    for _ in range(3):
        start = time.perf_counter()
        far.copy_(near)
        times.append(time.perf_counter() - start)
    found += [2 * copied_bytes / undisturbed(times)[0], float(memory_bytes())]
    return _slowest(("to_host", "from_host", "host_memory", "node_memory"), found)


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
