"""Measures layers, embedding, head and optimizer of a training job while it trains.

Whatever built the model (stock Megatron or a plan), its modules are hooked when training starts and left alone
again after ``OBSERVED_STEPS`` steps, or when training ends. One name of Megatron is replaced until training
ends: ``train`` of ``megatron.training.training`` (and while parts are watched ``train_step``, to time whole
steps).

JSON lines, appended to one file per rank; :mod:`galvatron_megatron.describe.observation` reads them.
"""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from galvatron_megatron.runtime.observed_passes import (
    ChunkForward,
    Mark,
    WatchedEmbedding,
    WatchedHead,
    WatchedLayer,
    WatchedPart,
    take_step,
)
from galvatron_megatron.runtime.observed_step import WatchedOptimizer

WARM_UP_STEPS = 2
"""First steps of a job, which allocate memory and load libraries: not written."""
OBSERVED_STEPS = 20
"""Steps that are written; after them the hooks are gone."""
SEAM = "train"
STEP_SEAM = "train_step"


@dataclass(kw_only=True)
class ObservedChunk:
    """What is to be watched of one model chunk; every description says in ``left_out`` why not, or ""."""

    module: torch.nn.Module
    """The chunk, without wrappers."""
    layers: list[tuple[torch.nn.Module, dict[str, Any]]]
    """Layer modules and what describes them."""
    embedding: dict[str, Any] | None = None
    """What describes the embedding; None where the chunk has none."""
    head: dict[str, Any] | None = None
    """What describes the head; None where the chunk has none."""
    norm: torch.nn.Module | None = None
    """The norm behind the last layer, where the head begins."""


@dataclass(kw_only=True)
class ObservedParts:
    """What a job is and what of it is to be watched on this rank."""

    header: dict[str, Any]
    """The first record."""
    chunks: list[ObservedChunk]
    optimizer: dict[str, Any]
    """What describes the optimizer's step."""
    gathers: bool
    """Whether parameters are gathered beside forward passes."""
    reduces: bool
    """Whether gradients are reduced beside backward passes."""


class JobObserver:
    """Watches one rank's job and writes what it saw.

    Args:
        path: JSON lines file of this rank, appended to; its directory exists.
        begin: called by all ranks together when training starts, with the model's chunks.
    """

    def __init__(self, path: Path, begin: Callable[[list[Any]], ObservedParts]) -> None:
        self._path = path
        self._begin = begin
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
            given = signature.bind(*args, **kwargs).arguments
            model = given["model"]
            self._start(training, model if isinstance(model, list) else [model], given["optimizer"])
            try:
                return original(*args, **kwargs)
            finally:
                self._stop()

        setattr(training, SEAM, train)

    def _start(self, training: ModuleType, chunks: list[Any], optimizer: Any) -> None:
        found = self._begin(chunks)
        if not self._write([found.header]):
            return
        self._on_gpu = next(chunks[0].parameters()).is_cuda
        numbers = count()
        forwards = [ChunkForward(chunk.module) for chunk in found.chunks]
        parts = [
            part
            for chunk, forward in zip(found.chunks, forwards, strict=True)
            for part in self._watched(chunk, forward, {"on_gpu": self._on_gpu, "numbers": numbers})
        ]
        steps = []
        if not found.optimizer["left_out"]:
            steps.append(WatchedOptimizer(found.optimizer, chunks, optimizer, self._on_gpu))
        train_step = getattr(training, STEP_SEAM)

        def take() -> list[dict[str, Any]]:
            seen = take_step(parts, gathers=found.gathers, reduces=found.reduces)
            entries = [{"record": "part", **entry} for entry in seen]
            optimizers = [step.take() for step in steps] or [found.optimizer]
            return entries + [{"record": "optimizer", **entry} for entry in optimizers]

        @wraps(train_step)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = Mark.now(self._on_gpu)
            result = train_step(*args, **kwargs)
            if parts:
                self._step_ended(begin, Mark.now(self._on_gpu), take)
            return result

        def stop() -> None:
            for watched in (*forwards, *parts, *steps):
                watched.remove()
            parts.clear()
            if getattr(training, STEP_SEAM) is timed:
                setattr(training, STEP_SEAM, train_step)

        setattr(training, STEP_SEAM, timed)
        self._stop = stop

    @staticmethod
    def _watched(chunk: ObservedChunk, forward: ChunkForward, common: dict[str, Any]) -> list[WatchedPart]:
        parts: list[WatchedPart] = []
        if chunk.embedding is not None:
            if chunk.embedding["left_out"]:
                parts.append(WatchedPart(about=chunk.embedding, **common))
            else:
                parts.append(WatchedEmbedding(about=chunk.embedding, module=chunk.module, **common))
        parts += [
            WatchedLayer(module=module, about=about, chunk=forward, **common) for module, about in chunk.layers
        ]
        if chunk.head is not None:
            if chunk.head["left_out"] or chunk.norm is None:
                parts.append(WatchedPart(about=chunk.head, **common))
            else:
                parts.append(WatchedHead(about=chunk.head, module=chunk.module, norm=chunk.norm, **common))
        return parts

    def _step_ended(self, begin: Mark, end: Mark, take: Callable[[], list[dict[str, Any]]]) -> None:
        if end.event is not None:
            end.event.synchronize()
        seen = take()
        self._step += 1
        if self._step <= WARM_UP_STEPS:
            return
        step = {
            "record": "step",
            "step": self._step,
            "seconds": begin.seconds_until(end),
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
        records = [step, *({**entry, "step": self._step} for entry in seen)]
        if not self._write(records) or self._step == WARM_UP_STEPS + OBSERVED_STEPS:
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
