"""What can be said about this host without torch: processor, memory and the versions of what runs on it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SOFTWARE = ("torch", "megatron-core", "transformer-engine")
"""Packages whose change makes measurements void."""


def processor_name() -> str:
    """Name of the processor's model, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        # Not Linux: the standard library's answer will do.
        pass
    return platform.processor() or platform.machine()


def gpus() -> int:
    """NVIDIA GPUs that this host shows, without starting CUDA."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def memory_bytes(root: Path = Path("/")) -> int:
    """Memory in bytes that this process and those it shares a container with may use.

    The least of what the host has and of the limits of the control groups the process is in: ``memory.max``
    of version 2, ``memory.limit_in_bytes`` of version 1, by the group and all above it.

    Args:
        root: of the file system.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_control_group_limits(root)])


def _control_group_limits(root: Path) -> list[int]:
    """Bytes by every limit that is set; version 1 writes a huge number where none is."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # Not Linux, or /proc is not there: no limits that anyone could read.
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's, and the container's own group the mount itself.
        for folder in (mount, *(mount / part for part in _prefixes(group))):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():  # not "max"
                limits.append(int(text))
    return limits


def _prefixes(group: str) -> list[str]:
    """A control group's path and those of all groups above it but the root."""
    parts = [part for part in group.split("/") if part and part != ".."]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def software_versions() -> tuple[tuple[str, str], ...]:
    """(name, version) of Python and of ``SOFTWARE``, as far as installed."""
    found = [("python", platform.python_version())]
    for name in SOFTWARE:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)
