"""Levels of a node below the network: NUMA nodes and NVLink, where the machine says so."""

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from galvatron_megatron.device import on_cpu

NUMA_ROOT = Path("/sys/devices/system/node")
PCI_ROOT = Path("/sys/bus/pci/devices")
SMI_SECONDS = 20.0
"""After this long without an answer of nvidia-smi its levels count as unknown."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Place:
    """The place of one rank inside its node."""

    node: str
    """As in :class:`galvatron_megatron.profiler.topology.RankFacts`."""
    numa: tuple[int, ...] = ()
    """NUMA nodes of the rank's GPU, or of the cores that a CPU rank may use; empty where unknown."""
    bus: str = ""
    """PCI address of the rank's GPU; empty on CPU ranks."""
    nvlinks: tuple[str, ...] = ()
    """PCI addresses of the GPUs that NVLink joins with the rank's own; empty where unknown."""


def place_of_this_rank(node: str) -> Place:
    """Looks at where the rank's GPU hangs, or at the cores that a CPU rank may use.

    Args:
        node: name of the rank's node.
    """
    if on_cpu():
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        return Place(node=node, numa=numa_of_cores(cores))
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    bus = bus_of(device.pci_domain_id, device.pci_bus_id, device.pci_device_id)
    return Place(node=node, numa=numa_of_bus(bus), bus=bus, nvlinks=nvlinks_of(bus))


def parse_cores(text: str) -> set[int]:
    """Reads the kernel's list of cores.

    Args:
        text: such as ``0-3,8,10-11``; an empty one names none.
    """
    cores: set[int] = set()
    for item in text.strip().split(","):
        if item:
            first, _, last = item.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
    return cores


def numa_of_cores(cores: Iterable[int], root: Path = NUMA_ROOT) -> tuple[int, ...]:
    """NUMA nodes that some cores belong to, rising; empty where the machine does not say.

    Args:
        cores: that a process may use.
        root: where the kernel lists the nodes, ``node0/cpulist`` and so on.
    """
    wanted = set(cores)
    lists = {path.parent.name.removeprefix("node"): path for path in root.glob("node[0-9]*/cpulist")}
    return tuple(sorted(int(node) for node, path in lists.items() if wanted & parse_cores(path.read_text())))


def numa_of_bus(bus: str, root: Path = PCI_ROOT) -> tuple[int, ...]:
    """The NUMA node that a device hangs on; empty where the machine does not say (the kernel then says -1).

    Args:
        bus: PCI address, such as ``0000:07:00.0``.
        root: where the kernel lists PCI devices.
    """
    path = root / bus / "numa_node"
    node = int(path.read_text()) if path.exists() else -1
    return (node,) if node >= 0 else ()


def bus_of(domain: int, bus: int, device: int) -> str:
    """PCI address in the kernel's writing."""
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def parse_buses(text: str) -> dict[str, str]:
    """Name of every GPU in the matrix of :func:`parse_nvlinks` to its PCI address in the kernel's writing.

    Args:
        text: of ``nvidia-smi --query-gpu=index,pci.bus_id --format=csv,noheader``, such as
            ``0, 00000000:07:00.0``.
    """
    found = {}
    for line in text.splitlines():
        index, separator, address = (word.strip() for word in line.partition(","))
        if separator and address.count(":") == 2:
            domain, bus, device = address.split(":")
            found[f"GPU{index}"] = f"{int(domain, 16):04x}:{bus}:{device}".lower()
    return found


def parse_nvlinks(matrix: str) -> dict[str, tuple[str, ...]]:
    """GPUs that NVLink joins, from the matrix that ``nvidia-smi topo -m`` prints.

    Args:
        matrix: a heading of names (``GPU0``, ``NIC0``, ``CPU Affinity``), then a line for each device: its name
            and the way to every other one, ``NV`` and the number of links where it is NVLink.

    Returns:
        Names of the GPUs that each GPU has NVLink to, directly or by a switch; empty for none.
    """
    lines = [line.split() for line in matrix.replace("\x1b[4m", "").replace("\x1b[0m", "").splitlines()]
    heading = next((words for words in lines if words and words[0] == "GPU0" and "X" not in words[:2]), [])
    names = [word for word in heading if word.startswith(("GPU", "NIC", "mlx"))]
    names = names[: next((i for i, name in enumerate(names) if name == "GPU"), len(names))]
    found = {}
    for words in lines:
        if words is not heading and len(words) > len(names) and words[0] in names:
            ways = dict(zip(names, words[1:], strict=False))
            if words[0].startswith("GPU"):
                found[words[0]] = tuple(
                    name
                    for name, way in ways.items()
                    if name.startswith("GPU") and way.startswith("NV") and way[2:].isdigit()
                )
    return found


def nvlinks_of(bus: str, ask: Callable[[Sequence[str]], str] | None = None) -> tuple[str, ...]:
    """PCI addresses of the GPUs that NVLink joins with one; empty where nvidia-smi is missing or does not say.

    Args:
        bus: PCI address of the GPU.
        ask: runs nvidia-smi with some arguments and returns what it prints.
    """
    ask = ask or _ask_smi
    buses = parse_buses(ask(["--query-gpu=index,pci.bus_id", "--format=csv,noheader"]))
    own = next((name for name, address in buses.items() if address == bus), None)
    if own is None:
        return ()
    links = parse_nvlinks(ask(["topo", "-m"])).get(own, ())
    return tuple(buses[name] for name in links if name in buses)


def _ask_smi(words: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *words], capture_output=True, text=True, timeout=SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        # No such tool in this container, or one without rights: the level stays unknown.
        return ""
    return done.stdout


def level_notes(places: Sequence[Place]) -> tuple[str, ...]:
    """Describes the levels inside nodes, and ranks whose order does not follow them.

    Tensor parallelism takes consecutive ranks, so neighbours in rank should be neighbours in the node.

    Args:
        places: of every rank, by rank; ranks of a node are consecutive.

    Returns:
        Lines for the reader of a profile; none where no node has levels that are known.
    """
    notes = []
    numa = [place.numa[0] if len(place.numa) == 1 else None for place in places]
    keys = [
        None if number is None else (place.node, number) for place, number in zip(places, numa, strict=True)
    ]
    notes += _notes_of("NUMA nodes", places, keys)
    notes += _notes_of("NVLink islands", places, _islands(places))
    return tuple(notes)


def _islands(places: Sequence[Place]) -> list[tuple[str, str] | None]:
    """For every rank the first device that NVLink joins with its own, over others too; None without NVLink."""
    links: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for place in places:
        for other in place.nvlinks:
            links.setdefault((place.node, place.bus), set()).add((place.node, other))
            links.setdefault((place.node, other), set()).add((place.node, place.bus))
    return [_first_reached(links, (place.node, place.bus)) for place in places]


def _first_reached(
    links: Mapping[tuple[str, str], set[tuple[str, str]]], start: tuple[str, str]
) -> tuple[str, str] | None:
    if start not in links:
        return None
    seen, waiting = {start}, [start]
    while waiting:
        for other in links[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return min(seen)


def _notes_of(what: str, places: Sequence[Place], keys: Sequence[tuple | None]) -> list[str]:
    """One line on the first node's groups, and one on the first node whose ranks do not follow them."""
    notes: list[str] = []
    nodes: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        nodes.setdefault(place.node, []).append(rank)
    for node, ranks in nodes.items():
        groups: dict[tuple, list[int]] = {}
        for rank in ranks:
            if keys[rank] is not None:
                groups.setdefault(keys[rank], []).append(rank)
        if sum(map(len, groups.values())) < len(ranks):
            # Not known of every rank, or ranks that belong to several.
            continue
        listed = "; ".join(_ranks(members) for members in groups.values())
        if not notes and (len(groups) > 1 or what.startswith("NVLink")):
            notes.append(f"{what} of {node.split()[0]}: ranks {listed}")
        if any(members[-1] - members[0] >= len(members) for members in groups.values()):
            notes.append(
                f"{what} of {node.split()[0]} hold ranks that are not consecutive ({listed}): "
                "tensor parallelism, which takes consecutive ranks, leaves them; order the ranks by them"
            )
            break
    return notes


def _ranks(members: Sequence[int]) -> str:
    """``0-3`` for consecutive ranks, else ``0, 2``."""
    if len(members) > 1 and members[-1] - members[0] == len(members) - 1:
        return f"{members[0]}-{members[-1]}"
    return ", ".join(map(str, members))
