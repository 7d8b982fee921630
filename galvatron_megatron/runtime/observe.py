"""Measures each layer's forward and backward pass while training, for comparison with predictions.

One JSON object per line: ``step``, ``layer`` (from 0), ``pass`` (``forward`` or ``backward``), ``seconds`` and
``bytes`` (growth of allocated device memory during the pass). A backward pass is measured from the arrival of
the gradient of the layer's output to that of its input, so that it contains what runs in between:
recomputation, resharding and gradient communication that is not overlapped.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(slots=True)
class _Mark:
    """A point in a device's (or without one, this thread's) time, and the memory allocated then."""

    event: torch.cuda.Event | None
    seconds: float
    allocated: int

    @classmethod
    def now(cls) -> "_Mark":
        if not torch.cuda.is_available():
            return cls(None, time.perf_counter(), 0)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return cls(event, 0.0, torch.cuda.memory_allocated())

    def seconds_until(self, end: "_Mark") -> float:
        if self.event is None:
            return end.seconds - self.seconds
        return self.event.elapsed_time(end.event) / 1e3


@dataclass(kw_only=True)
class LayerObserver:
    """Collects measurements of a rank's layers and writes them once per step."""

    path: Path
    """JSON lines file of this rank; appended to."""
    step: int = 0
    _passes: list[tuple[int, str, _Mark, _Mark]] = field(default_factory=list)
    _open: dict[int, list[_Mark]] = field(default_factory=dict)

    def forward_begins(self) -> _Mark:
        """Marks the beginning of a forward pass."""
        return _Mark.now()

    def forward_ends(self, layer: int, begin: _Mark, output: torch.Tensor) -> None:
        """Ends a forward pass and waits for the gradient of the layer's output.

        Args:
            layer: index in the model.
            begin: what ``forward_begins`` returned.
            output: what the layer returns.
        """
        self._passes.append((layer, "forward", begin, _Mark.now()))
        if output.requires_grad:
            output.register_hook(lambda _: self._open.setdefault(layer, []).append(_Mark.now()))

    def watch_input(self, layer: int, activation: torch.Tensor) -> torch.Tensor:
        """Ends the backward pass of a layer when the gradient of its input arrives.

        Args:
            layer: index in the model.
            activation: the layer's input.

        Returns:
            The activation to compute with.
        """
        if not activation.requires_grad:
            return activation
        watched = activation.view_as(activation)
        watched.register_hook(lambda _: self._backward_ends(layer))
        return watched

    def _backward_ends(self, layer: int) -> None:
        begins = self._open.get(layer)
        if begins:
            self._passes.append((layer, "backward", begins.pop(), _Mark.now()))

    def end_step(self) -> None:
        """Writes the measurements of the step that ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        with self.path.open("a") as file:
            for layer, kind, begin, end in self._passes:
                record = {
                    "step": self.step,
                    "layer": layer,
                    "pass": kind,
                    "seconds": begin.seconds_until(end),
                    "bytes": end.allocated - begin.allocated,
                }
                file.write(json.dumps(record) + "\n")
        self._passes.clear()
        self._open.clear()
        self.step += 1
