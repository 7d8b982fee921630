"""Measures every layer of a training job from hooks on Megatron's own layer modules.

Whatever built the layers (stock Megatron or a plan), their modules are hooked when training starts and left
alone again after ``OBSERVED_STEPS`` steps, or when training ends. A backward pass goes from the arrival of the
gradient of the layer's output to that of its input, plus the forward pass that recomputation repeats before, so
that it holds what the profiler measures too. One name of Megatron is replaced until training ends: ``train`` of
``megatron.training.training`` (and while layers are watched ``train_step``, to time whole steps).

JSON lines, appended to one file per rank; :mod:`galvatron_megatron.describe.observation` reads them.
"""

import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

WARM_UP_STEPS = 2
"""First steps of a job, which allocate memory and load libraries: not written."""
OBSERVED_STEPS = 20
"""Steps that are written; after them the hooks are gone."""
SEAM = "train"
STEP_SEAM = "train_step"


@dataclass(slots=True)
class _Mark:
    """A point in a device's time (on CPU ranks: this thread's), and the memory allocated then."""

    event: torch.cuda.Event | None
    seconds: float
    allocated: int

    @classmethod
    def now(cls, on_gpu: bool) -> "_Mark":
        if not on_gpu:
            return cls(None, time.perf_counter(), 0)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return cls(event, 0.0, torch.cuda.memory_allocated())

    def seconds_until(self, end: "_Mark") -> float:
        if self.event is None:
            return end.seconds - self.seconds
        return self.event.elapsed_time(end.event) / 1e3


type _Span = tuple[_Mark, _Mark]


@dataclass(kw_only=True)
class WatchedLayer:
    """Hooks on one layer and what they saw in the current step."""

    module: torch.nn.Module
    about: Mapping[str, Any]
    """Fields that say which layer this is and how it runs; written with its times."""
    on_gpu: bool
    forwards: list[_Span] = field(default_factory=list)
    backwards: list[tuple[_Span, ...]] = field(default_factory=list)
    _begin: _Mark | None = None
    _repeated: _Span | None = None
    """Forward pass that recomputation repeated, until the gradient of the input arrives."""
    _arrived: _Mark | None = None
    _handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._handles = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    def take(self) -> dict[str, Any]:
        """What was seen since the last call; the device must have done its work."""
        found = {
            **self.about,
            "forward_seconds": [begin.seconds_until(end) for begin, end in self.forwards],
            "backward_seconds": [sum(b.seconds_until(e) for b, e in spans) for spans in self.backwards],
            "kept_bytes": [end.allocated - begin.allocated for begin, end in self.forwards]
            if self.on_gpu
            else [],
        }
        self.forwards.clear()
        self.backwards.clear()
        return found

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        # Under no_grad this is the first pass of a checkpoint; its tensors are not those of the backward pass.
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            hidden_states.register_hook(self._input_gradient)
        self._begin = _Mark.now(self.on_gpu)

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not module.training or self._begin is None:
            return
        span = (self._begin, _Mark.now(self.on_gpu))
        self._begin = None
        if torch._C._current_graph_task_id() == -1:
            self.forwards.append(span)
        else:
            self._repeated = span
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(self._output_gradient)

    def _output_gradient(self, gradient: torch.Tensor) -> None:
        self._arrived = _Mark.now(self.on_gpu)

    def _input_gradient(self, gradient: torch.Tensor) -> None:
        if self._arrived is None:
            return
        own = (self._arrived, _Mark.now(self.on_gpu))
        self.backwards.append((own,) if self._repeated is None else (self._repeated, own))
        self._arrived = self._repeated = None


class JobObserver:
    """Watches the layers of one rank's job and writes what it saw.

    Args:
        path: JSON lines file of this rank, appended to; its directory exists.
        begin: called by all ranks together when training starts, with the model's chunks; gives the first
            record, which says what the job is, and (module, fields that describe it) of every layer.
    """

    def __init__(
        self,
        path: Path,
        begin: Callable[[list[Any]], tuple[dict[str, Any], list[tuple[torch.nn.Module, dict[str, Any]]]]],
    ) -> None:
        self._path = path
        self._begin = begin
        self._layers: list[WatchedLayer] = []
        self._on_gpu = False
        self._step = 0
        self._stop: Callable[[], None] = lambda: None

    def install(self, training: ModuleType) -> None:
        """Waits for the training loop.

        Args:
            training: ``megatron.training.training``.
        """
        original = getattr(training, SEAM)
        signature = inspect.signature(original)

        @wraps(original)
        def train(*args: Any, **kwargs: Any) -> Any:
            setattr(training, SEAM, original)
            model = signature.bind(*args, **kwargs).arguments["model"]
            self._start(training, model if isinstance(model, list) else [model])
            try:
                return original(*args, **kwargs)
            finally:
                self._stop()

        setattr(training, SEAM, train)

    def _start(self, training: ModuleType, chunks: list[Any]) -> None:
        header, layers = self._begin(chunks)
        if not self._write([header]):
            return
        self._on_gpu = next(chunks[0].parameters()).is_cuda
        self._layers = [
            WatchedLayer(module=module, about=about, on_gpu=self._on_gpu) for module, about in layers
        ]
        train_step = getattr(training, STEP_SEAM)

        @wraps(train_step)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = _Mark.now(self._on_gpu)
            result = train_step(*args, **kwargs)
            self._step_ended(begin, _Mark.now(self._on_gpu))
            return result

        def stop() -> None:
            for layer in self._layers:
                layer.remove()
            self._layers.clear()
            if getattr(training, STEP_SEAM) is timed:
                setattr(training, STEP_SEAM, train_step)

        setattr(training, STEP_SEAM, timed)
        self._stop = stop

    def _step_ended(self, begin: _Mark, end: _Mark) -> None:
        if not self._layers:
            return
        if end.event is not None:
            end.event.synchronize()
        seen = [layer.take() for layer in self._layers]
        self._step += 1
        if self._step <= WARM_UP_STEPS:
            return
        step = {
            "record": "step",
            "step": self._step,
            "seconds": begin.seconds_until(end),
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
        records = [{"record": "layer", "step": self._step, **entry} for entry in seen]
        if not self._write([step, *records]) or self._step == WARM_UP_STEPS + OBSERVED_STEPS:
            self._stop()

    def _write(self, records: list[dict[str, Any]]) -> bool:
        """Appends records; where that fails says so once, for the training is worth more than its records."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
        except OSError as error:
            print(
                f"galvatron: --galvatron-observe {self._path}: cannot be written ({error.strerror}); "
                "training goes on unobserved",
                file=sys.stderr,
                flush=True,
            )
            return False
        return True
