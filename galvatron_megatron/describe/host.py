"""What can be said about this host without torch: its processor and the versions of what runs on it."""

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


def software_versions() -> tuple[tuple[str, str], ...]:
    """(name, version) of Python and of ``SOFTWARE``, as far as installed."""
    found = [("python", platform.python_version())]
    for name in SOFTWARE:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)
