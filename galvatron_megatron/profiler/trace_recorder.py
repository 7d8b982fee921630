"""Records what one forward and backward does: operators, collectives, tensors kept, peak memory."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from galvatron_megatron.cost.counts_values import Collective, Operator
from galvatron_megatron.profiler import trace_kernels

_MATMULS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
"""Where the two factors stand among the arguments."""
_COLLECTIVES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
}
_SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
"""Operators that move no bytes."""


def storage_of(tensor: torch.Tensor) -> int:
    """Identity of the tensor's storage while it lives."""
    return tensor.untyped_storage()._cdata


def _tensors(values: object) -> list[torch.Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Recorder(TorchDispatchMode):
    """Sees every operator below autograd.

    Args:
        parameters: the model's parameters; a product with one of them in the backward pass is an input
            gradient, another matrix product a weight gradient.
        groups: process group name -> ``tp``, ``ep``, ...
        kept: what autograd saves; gathering such a tensor in the backward pass serves the weight gradient.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], groups: Mapping[str, str], kept: "KeptTensors"
    ) -> None:
        super().__init__()
        self._kept = kept
        self._recomputing = False
        self._inside_kernel = False
        self._parameters = {storage_of(parameter) for parameter in parameters}
        self._groups = groups
        self._backward = False
        self.operators: Counter[Operator] = Counter()
        self.collectives: Counter[Collective] = Counter()
        self.live_bytes = 0
        """Of storages made while recording."""
        self.peak_bytes = 0
        self._known: dict[int, int] = {}

    def __enter__(self) -> "Recorder":
        trace_kernels.run_kernel = self.run_as_kernel
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        trace_kernels.run_kernel = trace_kernels.run_plainly
        super().__exit__(*exception)

    def run_as_kernel(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs what a compiler would make one kernel of: its temporaries neither live nor move."""
        if self._inside_kernel:
            return function(*args, **kwargs)
        self._inside_kernel = True
        try:
            result = function(*args, **kwargs)
        finally:
            self._inside_kernel = False
        moved = _bytes([*_tensors((args, kwargs)), *_tensors(result)])
        name = getattr(function, "__name__", "kernel")
        self._add_memory_operator(name, self._phase(), moved)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def start_backward(self) -> None:
        """From here on the backward pass runs, and a new peak begins."""
        self._backward = True
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if func.namespace == "c10d":
            self._record_collective(func, args)
        else:
            self._record_operator(func, args, inputs, outputs)
            self._follow(inputs, outputs)
        return result

    @contextmanager
    def noticing_recomputation(self) -> Iterator[None]:
        """While active, what Megatron's checkpoint function computes again is told from the backward pass.

        It detaches its inputs, runs the forward function again and starts a backward pass of its own.
        """
        detach, backward = megatron_random.detach_variable, torch.autograd.backward

        def detach_first(*args: Any) -> Any:
            self._recomputing = True
            return detach(*args)

        def backward_after(*args: Any, **kwargs: Any) -> None:
            self._recomputing = False
            backward(*args, **kwargs)

        megatron_random.detach_variable, torch.autograd.backward = detach_first, backward_after
        try:
            yield
        finally:
            megatron_random.detach_variable, torch.autograd.backward = detach, backward

    def _phase(self) -> str:
        if not self._backward:
            return "forward"
        return "recompute" if self._recomputing else "backward"

    def _follow(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        old = {storage_of(tensor) for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            identity = storage._cdata
            if identity in old or identity in self._known or identity in self._parameters:
                continue
            self._known[identity] = storage.nbytes()
            self.live_bytes += storage.nbytes()
            weakref.finalize(storage, self._freed, identity)
        if not self._inside_kernel:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _freed(self, identity: int) -> None:
        self.live_bytes -= self._known.pop(identity, 0)

    def _record_collective(self, func: Any, args: Any) -> None:
        name = func._schema.name.split("::")[1]
        group = next((item for item in args if isinstance(item, torch.ScriptObject)), None)
        if group is None:
            return
        process_group = dist.ProcessGroup.unbox(group)
        if process_group.size() == 1:
            return
        if name not in _COLLECTIVES:
            raise NotImplementedError(f"trace: collective {name} is not known")
        kind = _COLLECTIVES[name]
        # c10d's operators take (output, input, ...), an all-reduce its tensors alone.
        whole = args[0] if kind in ("all_reduce", "all_gather") else args[1]
        phase = self._phase()
        if (
            phase == "backward"
            and kind == "all_gather"
            and any(part in self._kept for part in _tensors(args[1]))
        ):
            phase = "weight_gradient"
        self.collectives[
            Collective(
                kind=kind,
                group=self._groups[process_group.group_name],
                phase=phase,
                bytes=_bytes(_tensors(whole)),
            )
        ] += 1

    def _record_operator(
        self, func: Any, args: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        name = func._schema.name.split("::")[1]
        phase = self._phase()
        if name in _MATMULS:
            left, right = (args[position] for position in _MATMULS[name])
            self.operators[self._matmul(name, phase, left, right)] += 1
            return
        if "scaled_dot_product" in name:
            self.operators[_attention(name, phase, inputs)] += 1
            return
        if name in _SILENT or not outputs or self._inside_kernel:
            return
        if func.is_view or (
            not func._schema.is_mutable
            and {storage_of(tensor) for tensor in outputs} <= {storage_of(tensor) for tensor in inputs}
        ):
            return
        moved = inputs if func._schema.is_mutable else [*inputs, *outputs]
        self._add_memory_operator(name, phase, _bytes(moved))

    def _add_memory_operator(self, name: str, phase: str, moved: int) -> None:
        self.operators[Operator(name=name, kind="memory", phase=phase, flops=0, bytes=moved, shape=())] += 1

    def _matmul(self, name: str, phase: str, left: torch.Tensor, right: torch.Tensor) -> Operator:
        batch = left.shape[0] if left.dim() == 3 else 1
        m, k = left.shape[-2:]
        n = right.shape[-1]
        if phase == "backward" and left.dim() == 2:
            of_weight = {storage_of(left), storage_of(right)} & self._parameters
            phase = "input_gradient" if of_weight else "weight_gradient"
        return Operator(
            name=name,
            kind="gemm",
            phase=phase,
            flops=2 * batch * m * n * k,
            bytes=batch * (m * k + k * n + m * n) * left.element_size(),
            shape=(batch, m, n, k),
        )


def _attention(name: str, phase: str, inputs: list[torch.Tensor]) -> Operator:
    backward = "backward" in name
    query, key, value = inputs[1:4] if backward else inputs[:3]
    batch, heads, seq_q, head_dim = query.shape
    pairs = 2 * batch * heads * seq_q * key.shape[2]
    scores, contexts = (3, 2) if backward else (1, 1)
    traffic = _bytes((query, key, value)) + query.numel() // head_dim * value.shape[3] * query.element_size()
    return Operator(
        name="core attention",
        kind="attention",
        phase=phase,
        flops=pairs * (scores * head_dim + contexts * value.shape[3]),
        bytes=traffic * (2 if backward else 1),
        shape=(batch, heads, key.shape[1], seq_q, key.shape[2], head_dim),
    )


class KeptTensors:
    """What autograd saves for the backward pass, every storage once.

    Args:
        excluded: storages that are not activations: parameters, tensors all layers share.
    """

    def __init__(self, excluded: Callable[[int], bool]) -> None:
        self._excluded = excluded
        self._kept: dict[int, tuple[str, int]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While active, what is saved is noted; in the backward pass, what recomputation saves again."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity not in self._kept and not self._excluded(identity):
            shape = "x".join(map(str, tensor.shape))
            self._kept[identity] = (f"{str(tensor.dtype).removeprefix('torch.')} {shape}", storage.nbytes())
            weakref.finalize(storage, self._kept.pop, identity, None)
        return tensor

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return storage_of(tensor) in self._kept

    def terms(self) -> tuple[tuple[str, int], ...]:
        """Bytes by type and shape of the saved tensor, of the storages alive now."""
        totals: Counter[str] = Counter()
        for name, size in self._kept.values():
            totals[name] += size
        return tuple(totals.items())
