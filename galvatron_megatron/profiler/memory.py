"""Device memory in use and at its peak: the allocator's on a GPU, tensor by tensor on CPU ranks."""

import time
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from galvatron_megatron.device import on_cpu

_SETTLED_SECONDS = 0.004
_MOST_SECONDS = 0.1


class _StorageTracker(TorchDispatchMode):
    """Adds up the storages that operators return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def _freed(self, identity: int) -> None:
        self.now -= self._known.pop(identity, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            item.untyped_storage()._cdata
            for item in tree_iter((args, kwargs))
            if isinstance(item, torch.Tensor) and item.layout == torch.strided
        }
        result = function(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if not isinstance(item, torch.Tensor) or item.layout != torch.strided:
                continue
            storage = item.untyped_storage()
            identity = storage._cdata
            if identity in before or identity in self._known:
                continue
            self._known[identity] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, identity)
        self.peak = max(self.peak, self.now)
        return result

    def settle(self) -> None:
        """Waits until nothing is freed any more: gloo's threads hold tensors longer than their callers do."""
        end = time.monotonic() + _MOST_SECONDS
        before = None
        while before != self.now and time.monotonic() < end:
            before = self.now
            time.sleep(_SETTLED_SECONDS)


class MemoryMeter:
    """Reads memory between marks; use as a context manager around the work.

    On a GPU the numbers are the caching allocator's. On CPU ranks they are the storages that operators have
    made and that are still alive, which is what an allocator without rounding would hold; an operator's own
    workspace is not seen.
    """

    def __init__(self) -> None:
        self._tracker = _StorageTracker() if on_cpu() else None

    def __enter__(self) -> "MemoryMeter":
        if self._tracker is not None:
            self._tracker.__enter__()
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(*exc)

    def read(self) -> tuple[int, int]:
        """Bytes in use now, and the peak since the last call; then the peak starts anew."""
        if self._tracker is not None:
            self._tracker.settle()
            now, peak = self._tracker.now, self._tracker.peak
            self._tracker.peak = now
            return now, peak
        torch.cuda.synchronize()
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return now, peak
