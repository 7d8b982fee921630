"""What ``torch.cuda`` offers, for a rank that computes on the CPU: streams, events, memory, random state.

The CPU runs everything in program order, so streams have nothing to do, while events keep real time and the
memory counters read what the operating system knows of this process.
"""

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_PEAK = Path("/proc/self/clear_refs")


class Event:
    """A point in time; everything before it has happened when it is recorded."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._seconds: float | None = None

    def record(self, stream: object = None) -> None:
        """Keeps the present time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Returns at once: program order has already waited."""

    def synchronize(self) -> None:
        """Returns at once: program order has already waited."""

    def query(self) -> bool:
        """True: what was recorded has happened."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to ``end``.

        Raises:
            RuntimeError: one of the two was never recorded, as on CUDA.
        """
        if self._seconds is None or end._seconds is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end._seconds - self._seconds) * 1e3


class Stream:
    """A queue of work that is always empty."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = torch.device("cpu")
        self.device_index = 0
        self.cuda_stream = 0

    @classmethod
    def priority_range(cls) -> tuple[int, int]:
        """Lowest and highest priority: there is one."""
        return (0, 0)

    def wait_stream(self, stream: object) -> None:
        """Returns at once."""

    def wait_event(self, event: object) -> None:
        """Returns at once."""

    def synchronize(self) -> None:
        """Returns at once."""

    def query(self) -> bool:
        """True: nothing is pending."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Records an event now and returns it."""
        event = event or Event()
        event.record(self)
        return event


@contextlib.contextmanager
def on_stream(stream: Stream | None) -> Iterator[Stream | None]:
    """The ``torch.cuda.stream`` context: program order is the only order."""
    yield stream


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


class MemoryCounters:
    """Memory of this process, as the operating system counts it, above what it held at the start.

    "Allocated" is the resident set above the one at construction, so it has the tensors and everything else
    that the process keeps (imported libraries, communication buffers). There is no cache on top:
    "reserved" is the same number. Linux only, like the back end itself.
    """

    def __init__(self) -> None:
        self._start_bytes = _status_bytes("VmRSS:")

    def restart(self) -> None:
        """Counts from what the process holds now, once unused memory is given back."""
        self.release_unused()
        self._start_bytes = _status_bytes("VmRSS:")
        self.reset_peak()

    def allocated(self, device: object = None) -> int:
        """Bytes resident now."""
        return max(0, _status_bytes("VmRSS:") - self._start_bytes)

    def peak(self, device: object = None) -> int:
        """Most bytes resident since the start or the last ``reset_peak``."""
        return max(0, _status_bytes("VmHWM:") - self._start_bytes)

    def reset_peak(self, device: object = None) -> None:
        """Starts a new peak from the present.

        The kernel keeps the peak; where it does not let a process reset its own, the old peak stays.
        """
        with contextlib.suppress(PermissionError):
            _CLEAR_PEAK.write_text("5")

    def release_unused(self) -> None:
        """Gives unused memory back to the operating system, like ``torch.cuda.empty_cache``."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def stats(self, device: object = None) -> dict[str, int]:
        """The entries of ``torch.cuda.memory_stats`` that can be known."""
        now, peak = self.allocated(), self.peak()
        return {
            "allocated_bytes.all.current": now,
            "allocated_bytes.all.peak": peak,
            "reserved_bytes.all.current": now,
            "reserved_bytes.all.peak": peak,
            "allocation.all.current": 0,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def info(self, device: object = None) -> tuple[int, int]:
        """Free and total bytes of the machine."""
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def device_properties(device: object = None) -> SimpleNamespace:
    """The properties of the CPU under the names CUDA has for them."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=total, multi_processor_count=os.cpu_count() or 1
    )


class _Generator:
    """A device's generator; the CPU has one."""

    def set_state(self, state: torch.Tensor) -> None:
        torch.default_generator.set_state(state)

    def get_state(self) -> torch.Tensor:
        return torch.default_generator.get_state()

    def manual_seed(self, seed: int) -> torch.Generator:
        return torch.default_generator.manual_seed(int(seed))

    def seed(self) -> int:
        return torch.default_generator.seed()

    def initial_seed(self) -> int:
        return torch.default_generator.initial_seed()


def stand_ins(ranks_here: int, counters: MemoryCounters) -> dict[str, object]:
    """The attributes of ``torch.cuda`` to replace.

    Args:
        ranks_here: ranks on this machine; each sees one device per rank, as a GPU node would show.
        counters: memory of this process.

    Returns:
        Attribute name to value.
    """

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    def call_now(callback: Callable[[], object], **kwargs: object) -> None:
        callback()

    generators = tuple(_Generator() for _ in range(ranks_here))
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "init": nothing,
        "_lazy_init": nothing,
        "_lazy_call": call_now,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "current_device": lambda: 0,
        "device_count": lambda: ranks_here,
        "set_device": nothing,
        "synchronize": nothing,
        "ipc_collect": nothing,
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: "cpu",
        "get_device_properties": device_properties,
        "Stream": Stream,
        "ExternalStream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "set_stream": nothing,
        "stream": on_stream,
        "is_current_stream_capturing": lambda: False,
        "default_generators": generators,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: generators[0].manual_seed(seed),
        "manual_seed_all": lambda seed: generators[0].manual_seed(seed),
        "initial_seed": torch.initial_seed,
        "memory_allocated": counters.allocated,
        "max_memory_allocated": counters.peak,
        "memory_reserved": counters.allocated,
        "max_memory_reserved": counters.peak,
        "device_memory_used": counters.allocated,
        "reset_peak_memory_stats": counters.reset_peak,
        "reset_max_memory_allocated": counters.reset_peak,
        "empty_cache": counters.release_unused,
        "memory_stats": counters.stats,
        "mem_get_info": counters.info,
    }
