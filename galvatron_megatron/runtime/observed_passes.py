"""Hooks that time the passes of layers, embedding and head of a model while it trains.

The boundaries are those of the profiler: a layer's own forward pass; the embedding until the first layer
begins; the head from the final norm to the model's output. A backward pass goes from the arrival of a part's
output gradient to that of its input gradient (of the embedding: until its last parameter has its gradient), and
a forward pass that recomputation repeats counts with it. Only hooks that torch documents are used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

ALL_OVERLAP = "every pass runs beside the gathering of parameters or the reduction of gradients"


@dataclass(slots=True)
class Mark:
    """A point in a device's time (on CPU ranks: this process's), and the memory allocated then."""

    event: torch.cuda.Event | None
    seconds: float
    allocated: int

    @classmethod
    def now(cls, on_gpu: bool) -> "Mark":
        """Here and now, in the device's stream of work.

        Args:
            on_gpu: whether there is a device with a stream of its own.
        """
        if not on_gpu:
            return cls(None, perf_counter(), 0)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return cls(event, 0.0, torch.cuda.memory_allocated())

    def seconds_until(self, end: "Mark") -> float:
        """Seconds to a later mark; on a GPU both must have been reached."""
        if self.event is None:
            return end.seconds - self.seconds
        return self.event.elapsed_time(end.event) / 1e3


type _Span = tuple[Mark, Mark]


@dataclass(slots=True)
class Pass:
    """One forward or backward pass of a part."""

    number: int
    """Of all passes of the rank's parts, in the order in which they began."""
    spans: tuple[_Span, ...]

    @property
    def seconds(self) -> float:
        """All its spans together."""
        return sum(begin.seconds_until(end) for begin, end in self.spans)

    @property
    def kept_bytes(self) -> int:
        """Growth of allocated memory."""
        return sum(end.allocated - begin.allocated for begin, end in self.spans)


class ChunkForward:
    """Whether a model chunk's forward pass is under way; a layer that runs outside of one is being recomputed.

    Args:
        module: the chunk, without wrappers.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.is_running = False
        self._handles = [
            module.register_forward_pre_hook(lambda module, args: self._set(True)),
            module.register_forward_hook(lambda module, args, output: self._set(False), always_call=True),
        ]

    def _set(self, running: bool) -> None:
        self.is_running = running

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()


@dataclass(kw_only=True)
class WatchedPart:
    """A part of the model, what says which, and what was seen of it in the current step.

    By itself it sees nothing: for a part that is left out. The classes below hang hooks onto modules.
    """

    about: Mapping[str, Any]
    """Fields that say which part this is and how it runs; written with its times."""
    on_gpu: bool
    numbers: Iterator[int]
    """Shared by all parts of the rank: the next pass's number."""
    forwards: list[Pass] = field(default_factory=list)
    backwards: list[Pass] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)
    _begin: tuple[int, Mark] | None = None
    _arrived: tuple[int, Mark] | None = None

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def finish(self) -> None:
        """Ends what only the end of the step ends; call it before ``take``."""

    def take(self, undisturbed: range) -> dict[str, Any]:
        """What was seen since the last call; the device must have done its work.

        Args:
            undisturbed: numbers of the passes that count.
        """
        forwards, backwards = (
            [entry for entry in seen if entry.number in undisturbed] for seen in (self.forwards, self.backwards)
        )
        found = {
            **self.about,
            "forward_seconds": [entry.seconds for entry in forwards],
            "backward_seconds": [entry.seconds for entry in backwards],
            "kept_bytes": [entry.kept_bytes for entry in forwards] if self.on_gpu else [],
        }
        if not found["left_out"] and ((self.forwards and not forwards) or (self.backwards and not backwards)):
            found["left_out"] = ALL_OVERLAP
        self.forwards.clear()
        self.backwards.clear()
        return found

    def _mark(self) -> tuple[int, Mark]:
        return next(self.numbers), Mark.now(self.on_gpu)

    def _forward_began(self) -> None:
        self._begin = self._mark()

    def _forward_ended(self) -> None:
        if self._begin is not None:
            number, begin = self._begin
            self.forwards.append(Pass(number, ((begin, Mark.now(self.on_gpu)),)))
            self._begin = None

    def _gradient_arrived(self, gradient: torch.Tensor) -> None:
        self._arrived = self._mark()

    def _gradient_left(self, gradient: torch.Tensor) -> None:
        if self._arrived is not None:
            number, begin = self._arrived
            self.backwards.append(Pass(number, ((begin, Mark.now(self.on_gpu)),)))
            self._arrived = None


@dataclass(kw_only=True)
class WatchedLayer(WatchedPart):
    """A layer, with what recomputation repeats of it."""

    module: torch.nn.Module
    chunk: ChunkForward
    """The chunk that the layer is in."""
    _repeated: _Span | None = None
    """Forward pass that recomputation repeated, until the gradient of the input arrives."""

    def __post_init__(self) -> None:
        self._handles = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after),
        ]

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        hidden_states = _hidden_states(args, kwargs)
        # Under no_grad this is the first pass of a checkpoint; its tensors are not those of the backward pass.
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            hidden_states.register_hook(self._gradient_left)
        self._forward_began()

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not module.training or self._begin is None:
            return
        if self.chunk.is_running:
            self._forward_ended()
        else:
            self._repeated = (self._begin[1], Mark.now(self.on_gpu))
            self._begin = None
        first = _first(output)
        # The same holds here; Megatron makes outputs that require a gradient even then, and a hook from before
        # they are a node's output would keep all later ones from being called.
        if torch.is_grad_enabled() and first.requires_grad:
            first.register_hook(self._gradient_arrived)

    def _gradient_left(self, gradient: torch.Tensor) -> None:
        super()._gradient_left(gradient)
        if self._repeated is not None and self.backwards:
            last = self.backwards[-1]
            last.spans = (self._repeated, *last.spans)
            self._repeated = None


@dataclass(kw_only=True)
class WatchedEmbedding(WatchedPart):
    """Everything in front of the first layer, in the chunk that has the embedding."""

    module: torch.nn.Module
    """The chunk, without wrappers; ``decoder`` holds the layers, ``embedding`` the parameters."""
    _last: Mark | None = None
    """When the last of the parameters had its gradient."""

    def __post_init__(self) -> None:
        self._handles = [
            self.module.register_forward_pre_hook(self._before),
            self.module.decoder.register_forward_pre_hook(self._before_layers, with_kwargs=True),
        ]
        for parameter in self.module.embedding.parameters():
            if parameter.requires_grad:
                # The node that adds up gradients, on which Megatron hangs what adds them to its own buffer:
                # hung on later, this hook runs after that one.
                node = get_gradient_edge(parameter).node
                self._handles.append(_NodeHook(node, self._accumulated))

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            self._forward_began()

    def _before_layers(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or self._begin is None:
            return
        self._forward_ended()
        hidden_states = _hidden_states(args, kwargs)
        if hidden_states.requires_grad:
            hidden_states.register_hook(self._gradient_arrived)

    def _gradient_arrived(self, gradient: torch.Tensor) -> None:
        self.finish()
        super()._gradient_arrived(gradient)

    def _accumulated(self, *_: Any) -> None:
        if self._arrived is not None:
            self._last = Mark.now(self.on_gpu)

    def finish(self) -> None:
        """The last parameter that had its gradient was the last one."""
        if self._arrived is not None and self._last is not None:
            number, begin = self._arrived
            self.backwards.append(Pass(number, ((begin, self._last),)))
        self._arrived = self._last = None


@dataclass(kw_only=True)
class WatchedHead(WatchedPart):
    """Final norm, output layer and Megatron's loss per token, in the chunk that has them."""

    module: torch.nn.Module
    """The chunk, without wrappers."""
    norm: torch.nn.Module
    """The norm behind the last layer."""

    def __post_init__(self) -> None:
        self._handles = [
            self.norm.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after),
        ]

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        hidden_states = _hidden_states(args, kwargs)
        if hidden_states.requires_grad:
            hidden_states.register_hook(self._gradient_left)
        self._forward_began()

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not module.training or self._begin is None:
            return
        self._forward_ended()
        first = _first(output)
        if first.requires_grad:
            first.register_hook(self._gradient_arrived)


class _NodeHook:
    """A hook on a node of autograd, which lives as long as somebody holds it."""

    def __init__(self, node: Any, hook: Callable[..., None]) -> None:
        self._node = node
        self._handle = node.register_hook(hook)

    def remove(self) -> None:
        self._handle.remove()


def take_step(parts: Sequence[WatchedPart], *, gathers: bool, reduces: bool) -> list[dict[str, Any]]:
    """What a rank's parts saw in a step, without the passes beside collectives of the job's data parallelism.

    Parameters are gathered until every part has begun its first forward pass; gradients are reduced from where
    the first part begins its last backward pass. What computes meanwhile is slower for it, or waits.

    Args:
        parts: of the rank.
        gathers: whether the job gathers parameters beside the forward passes (``--overlap-param-gather``).
        reduces: whether it reduces gradients beside the backward passes (``--overlap-grad-reduce``).
    """
    for part in parts:
        part.finish()
    firsts = [part.forwards[0].number for part in parts if part.forwards]
    lasts = [part.backwards[-1].number for part in parts if part.backwards]
    numbers = [entry.number for part in parts for entry in (*part.forwards, *part.backwards)]
    begin = max(firsts, default=-1) + 1 if gathers else 0
    end = min(lasts, default=0) if reduces else max(numbers, default=-1) + 1
    return [part.take(range(begin, end)) for part in parts]


def _hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
