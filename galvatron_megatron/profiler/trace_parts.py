"""Runs one part of a Megatron model forward and backward and counts what it does."""

import contextlib
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from torch._subclasses.fake_tensor import FakeTensorMode

from galvatron_megatron.cost.counts_values import Collective, LayerCounts, Operator
from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.describe.profile import EMBEDDING, HEAD
from galvatron_megatron.describe.profile_key import layer_digest
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.profiler.few_layers import arguments_for, bare_model
from galvatron_megatron.profiler.trace_modules import GpuKernels, balanced_experts, fused_attention
from galvatron_megatron.profiler.trace_recorder import KeptTensors, Recorder, storage_of

_EXPERTS = ".experts."
"""In the name of a parameter that belongs to one expert."""


@dataclass(kw_only=True)
class _Batch:
    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    hidden: torch.Tensor


class PartTracer:
    """Traces embedding, layers and head under one (tp, sequence parallelism).

    The parallel state must be that of ``tp``.

    Args:
        arguments: Megatron's, parsed.
        model: what they describe.
        tp: tensor-parallel degree.
        sequence_parallel: ``none`` or ``megatron``.
        world_size: ranks of the (fake) job.
        fake: tensors without data.
        kernels: ``gpu`` keeps what CUDA kernels keep, ``cpu`` what the CPU's keep.
        fuse: fused instead of Megatron's local core attention.
    """

    def __init__(
        self,
        arguments: Namespace,
        model: Model,
        *,
        tp: int,
        sequence_parallel: SequenceParallel,
        world_size: int,
        fake: bool,
        kernels: str,
        fuse: bool,
    ) -> None:
        self._arguments = arguments
        self._model = model
        self._tp = tp
        self._sequence_parallel = sequence_parallel
        self._world_size = world_size
        self._fake = fake
        self._kernels = kernels
        self._fuse = fuse

    def rows(self, settings: list[tuple[str, int]]) -> Iterator[tuple[str, str, int, LayerCounts]]:
        """Traces every part.

        Args:
            settings: (recompute, samples).

        Yields:
            part (``embedding``, ``head`` or a layer's digest), recompute, samples, counts. Embedding and head
            come without recomputation, which does not touch them.
        """
        # The kernels of Mamba layers exist for CUDA alone.
        layers = [layer for layer in dict.fromkeys(self._model.layers) if layer.kind is not LayerKind.MAMBA]
        for index, layer in enumerate(layers):
            for recompute in dict.fromkeys(setting[0] for setting in settings):
                with self._built(layer, Recompute(recompute)) as module:
                    for samples in dict.fromkeys(s[1] for s in settings if s[0] == recompute):
                        yield layer_digest(layer), recompute, samples, self._trace(module, "layer", samples)
            if index == 0:
                with self._built(layer, Recompute.NONE) as module:
                    for samples in dict.fromkeys(setting[1] for setting in settings):
                        for part in (EMBEDDING, HEAD):
                            yield part, Recompute.NONE.value, samples, self._trace(module, part, samples)

    @contextlib.contextmanager
    def _built(self, layer: Layer, recompute: Recompute) -> Iterator[torch.nn.Module]:
        """A Megatron model with one such layer, inside the modes that tracing needs."""
        arguments = arguments_for(
            self._arguments,
            self._model,
            layer,
            layers=1,
            tp=self._tp,
            sequence_parallel=self._sequence_parallel,
            zero=0,
            world_size=self._world_size,
        )
        if recompute is Recompute.FULL:
            arguments.recompute_granularity = "full"
            arguments.recompute_method, arguments.recompute_num_layers = "uniform", 1
        elif recompute is Recompute.SELECTIVE:
            arguments.recompute_granularity = "selective"
            arguments.recompute_modules = ["core_attn"]
        with contextlib.ExitStack() as stack:
            if self._fake:
                stack.enter_context(_no_random_state())
                stack.enter_context(balanced_experts())
                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            if self._kernels == "gpu":
                stack.enter_context(GpuKernels())
            if self._fuse:
                stack.enter_context(fused_attention())
            with _default_type(arguments.params_dtype):
                module = bare_model(arguments)
            module.train()
            yield module
            parallel_state.get_global_memory_buffer().buffer.clear()

    def _batch(self, module: torch.nn.Module, samples: int) -> _Batch:
        seq = self._model.seq_length
        shard = self._tp if self._sequence_parallel is SequenceParallel.MEGATRON else 1
        hidden = torch.empty(
            (seq // shard, samples, self._model.hidden_size), dtype=module.config.params_dtype
        ).normal_()
        tokens = torch.zeros((samples, seq), dtype=torch.long)
        return _Batch(
            tokens=tokens,
            positions=torch.arange(seq).expand(samples, seq).contiguous(),
            mask=torch.ones((1, 1, seq, seq), dtype=torch.bool).triu(1),
            hidden=hidden.requires_grad_(),
        )

    def _trace(self, module: torch.nn.Module, part: str, samples: int) -> LayerCounts:
        batch = self._batch(module, samples)
        run, owner = _part(module, part, batch)
        parameters = list(owner)
        shared: set[int] = {storage_of(batch.mask)}
        of_experts = {id(p) for name, p in module.named_parameters() if _EXPERTS in name}
        stored = {storage_of(parameter) for parameter in module.parameters()}
        kept = KeptTensors(lambda identity: identity in shared or identity in stored)
        recorder = Recorder(module.parameters(), _group_names(), kept)
        handle = module.decoder.register_forward_pre_hook(_noting_shared(shared, batch), with_kwargs=True)
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in module.parameters()]
        try:
            with recorder, recorder.noticing_recomputation(), kept.recording():
                output = run()
                terms = kept.terms()
                own = sum(size for _, size in terms)
                new = own - (_size(batch.hidden) if batch.hidden in kept else 0)
                forward = recorder.peak_bytes - new
                held = 0 if output in kept else _size(output)
                gradient = torch.ones_like(output)
                recorder.start_backward()
                torch.autograd.backward(output, gradient)
                backward = recorder.peak_bytes - new - held
        finally:
            for hook in (handle, *hooks):
                hook.remove()
        dense = [p for p in parameters if id(p) not in of_experts]
        return LayerCounts(
            parameters_sharded=sum(p.numel() for p in dense if _is_sharded(p)),
            parameters_replicated=sum(p.numel() for p in dense if not _is_sharded(p)),
            parameters_expert=sum(p.numel() for p in parameters if id(p) in of_experts),
            parameter_tensors=len(parameters),
            operators=_summed(recorder.operators),
            collectives=_summed(recorder.collectives),
            activation_bytes=own,
            transient_bytes=max(0, forward, backward),
            activation_terms=terms,
            source="traced",
        )


@contextlib.contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    """Makes modules in the model's precision; Megatron converts those that torch makes in fp32 afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _part(module: torch.nn.Module, part: str, batch: _Batch) -> tuple[Callable[[], torch.Tensor], Any]:
    """What to run for a part, and its parameters."""
    decoder = module.decoder
    norm = "final_layernorm" if hasattr(decoder, "final_layernorm") else "final_norm"
    final = getattr(decoder, norm)
    if part == EMBEDDING:
        return (lambda: module.embedding(batch.tokens, batch.positions)), module.embedding.parameters()

    def forward(*, layers: torch.nn.ModuleList, head: bool) -> torch.Tensor:
        before = decoder.layers, module.post_process, decoder.post_process, decoder.num_layers_per_pipeline_rank
        decoder.layers, module.post_process, decoder.post_process = layers, head, head
        decoder.num_layers_per_pipeline_rank = len(layers)
        if not head and norm == "final_layernorm":
            decoder.final_layernorm = None
        try:
            return module(
                batch.tokens,
                batch.positions,
                batch.mask,
                decoder_input=batch.hidden,
                labels=batch.tokens if head else None,
            )
        finally:
            decoder.layers, module.post_process, decoder.post_process = before[:3]
            decoder.num_layers_per_pipeline_rank = before[3]
            setattr(decoder, norm, final)

    if part == HEAD:
        output = module.output_layer
        weights = [module.shared_embedding_or_output_weight()] if output.weight is None else output.parameters()
        empty = torch.nn.ModuleList()
        return (lambda: forward(layers=empty, head=True)), itertools.chain(final.parameters(), weights)
    return (lambda: forward(layers=decoder.layers, head=False)), decoder.layers.parameters()


def _noting_shared(shared: set[int], batch: _Batch) -> Callable[..., None]:
    """A hook that notes the tensors which enter the decoder beside the hidden states."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for value in torch.utils._pytree.tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor) and storage_of(value) != storage_of(batch.hidden):
                shared.add(storage_of(value))

    return hook


def _drop_gradient(parameter: torch.Tensor) -> None:
    # Megatron adds it to the gradient buffer at once and lets it go.
    parameter.grad = None


def _is_sharded(parameter: torch.Tensor) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _size(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _summed[T: (Operator, Collective)](counted: dict[T, int]) -> tuple[T, ...]:
    return tuple(replace(value, count=count) for value, count in counted.items())


def _group_names() -> dict[str, str]:
    """Process group name -> the product's name for it."""
    groups = {
        "cp": parallel_state.get_context_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "tp": parallel_state.get_tensor_model_parallel_group(),
    }
    names = {group.group_name: name for name, group in groups.items()}
    names[parallel_state.get_expert_tensor_parallel_group().group_name] = "etp"
    names[parallel_state.get_expert_tensor_and_model_parallel_group().group_name] = "etp_ep"
    return names


@contextlib.contextmanager
def _no_random_state() -> Iterator[None]:
    """Random states are data, which fake tensors have not: forking and restoring them does nothing."""
    tracker = megatron_random.CudaRNGStatesTracker
    nothing = lambda *args, **kwargs: contextlib.nullcontext()  # noqa: E731
    before = tracker.fork, megatron_random._fork_rng, megatron_random._get_all_rng_states
    restore = megatron_random._set_all_rng_states
    tracker.fork, megatron_random._fork_rng = nothing, nothing
    megatron_random._get_all_rng_states = lambda: ()
    megatron_random._set_all_rng_states = lambda *states: None
    try:
        yield
    finally:
        tracker.fork, megatron_random._fork_rng, megatron_random._get_all_rng_states = before
        megatron_random._set_all_rng_states = restore
