"""Stand-ins under which Megatron's layers keep what a GPU run keeps."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.overrides import TorchFunctionMode

from galvatron_megatron.integration.local_hybrid_spec import attention_layer
from galvatron_megatron.profiler.trace_kernels import compiled

KERNELS = ("gpu", "cpu")


class FusedCoreAttention(torch.nn.Module):
    """Core attention by torch's scaled_dot_product_attention: no score matrix is kept.

    Takes the constructor and call arguments of Megatron's ``DotProductAttention``. Dropout inside a fused
    kernel is drawn again in the backward pass and keeps nothing, so it is left out.
    """

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        scale = kwargs.get("softmax_scale")
        self.softmax_scale = scale
        self.layer_number = layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of [seq, batch, heads, head_dim] tensors; returns [seq, batch, heads * v_head_dim]."""
        head_dim, v_head_dim = query.shape[-1], value.shape[-1]
        if v_head_dim != head_dim:
            # Flash attention wants one head size; it is how Megatron calls it for multi-latent attention.
            value = torch.nn.functional.pad(value, [0, head_dim - v_head_dim])
        context = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
            is_causal=True,
            scale=self.softmax_scale or 1 / math.sqrt(head_dim),
            enable_gqa=True,
        )
        context = context.permute(2, 0, 1, 3)[..., :v_head_dim]
        return context.reshape(*context.shape[:2], -1)


@contextmanager
def fused_attention() -> Iterator[None]:
    """While active, Megatron's local specs are made with fused attention."""
    before = LocalSpecProvider.core_attention
    LocalSpecProvider.core_attention = lambda self: FusedCoreAttention
    hybrid = attention_layer.submodules.self_attention.submodules
    hybrid.core_attention = FusedCoreAttention
    try:
        yield
    finally:
        LocalSpecProvider.core_attention = before
        hybrid.core_attention = DotProductAttention


class _EvenSplit(list):
    """Token counts that stand in for a tensor: the experts ask for them as a list."""

    def tolist(self) -> list[int]:
        return self


@contextmanager
def balanced_experts() -> Iterator[None]:
    """While active, experts share their tokens evenly without reading the router's counts.

    With inputs padded to an expert's capacity the counts are equal anyway; a fake tensor cannot tell them.
    """
    original = SequentialMLP.forward

    def forward(self: Any, tokens: torch.Tensor, counts: Any, probabilities: torch.Tensor) -> Any:
        experts = len(self.local_experts)
        return original(self, tokens, _EvenSplit([tokens.shape[0] // experts] * experts), probabilities)

    SequentialMLP.forward = forward
    try:
        yield
    finally:
        SequentialMLP.forward = original


class _LayerNorm(torch.autograd.Function):
    """Layer norm that keeps its statistics in fp32, as CUDA's kernel does whatever the input's type."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> torch.Tensor:
        result, mean, deviation = torch.ops.aten.native_layer_norm(tensor, shape, weight, bias, eps)
        ctx.shape = shape
        ctx.save_for_backward(tensor, weight, bias, mean.float(), deviation.float())
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        tensor, weight, bias, mean, deviation = ctx.saved_tensors
        types = (mean.to(tensor.dtype), deviation.to(tensor.dtype))
        gradients = torch.ops.aten.native_layer_norm_backward(
            gradient, tensor, ctx.shape, *types, weight, bias, [True, True, True]
        )
        return gradients[0], None, gradients[1], gradients[2], None


@compiled
def rms_norm_forward(
    tensor: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm and the inverse root mean squares in fp32, one number a row."""
    inverse = torch.rsqrt(tensor.float().pow(2).mean(-1, keepdim=True) + eps)
    return (tensor * inverse).to(tensor.dtype) * weight, inverse


@compiled
def rms_norm_backward(
    gradient: torch.Tensor, tensor: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and weight."""
    normed = tensor * inverse
    weighted = gradient * weight
    of_weight = (gradient * normed).sum(tuple(range(gradient.dim() - 1))).to(weight.dtype)
    of_input = inverse * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return of_input.to(tensor.dtype), of_weight


class _RmsNorm(torch.autograd.Function):
    """RMS norm in one kernel, which keeps its input and one fp32 number per row, as CUDA's does."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        result, inverse = rms_norm_forward(tensor, weight, eps)
        ctx.save_for_backward(tensor, weight, inverse)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return *rms_norm_backward(gradient, *ctx.saved_tensors), None


def _layer_norm(
    tensor: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> torch.Tensor:
    return _LayerNorm.apply(tensor, shape, weight, bias, eps)


def _rms_norm(tensor: torch.Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> torch.Tensor:
    return _RmsNorm.apply(tensor, weight, eps or torch.finfo(tensor.dtype).eps)


def _dropout(
    tensor: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    if not training or p == 0:
        return tensor
    # The CUDA kernel: its mask has one byte an element, where the CPU keeps one of the input's type.
    return torch.native_dropout(tensor, p, True)[0]


class GpuKernels(TorchFunctionMode):
    """Takes the functions whose CPU kernels keep other tensors than CUDA's, and keeps what CUDA's keep."""

    REPLACED: Mapping[Callable[..., Any], Callable[..., Any]] = {
        torch.nn.functional.layer_norm: _layer_norm,
        torch.nn.functional.rms_norm: _rms_norm,
        torch.nn.functional.dropout: _dropout,
        torch.layer_norm: _layer_norm,
        torch.rms_norm: _rms_norm,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.REPLACED.get(func, func)(*args, **(kwargs or {}))
