"""Time on the device: CUDA events on a GPU, the monotonic clock on CPU ranks."""

from time import perf_counter
from typing import Any

import torch

from galvatron_megatron.device import on_cpu


class Clock:
    """Takes marks in the stream of device work and tells the time between them."""

    def __init__(self) -> None:
        self._cpu = on_cpu()

    def mark(self) -> Any:
        """A point in the device's stream of work, here and now."""
        if self._cpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        """Waits until the device has done all work; call it before :meth:`seconds`."""
        if not self._cpu:
            torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks."""
        return end - start if self._cpu else start.elapsed_time(end) * 1e-3
