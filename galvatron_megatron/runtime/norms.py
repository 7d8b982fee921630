"""Norms of Megatron's local layer specs that also work on sequence slices."""

import copy
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm


class SequenceParallelTorchNorm:
    """Builds what ``WrappedTorchNorm`` builds, also under sequence parallelism.

    A norm works on each position alone, so a slice of the sequence changes nothing but the gradient of its
    weights: it is a part of the sum over the tp group. The weights are marked ``sequence_parallel`` for that.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **options: Any) -> torch.nn.Module:
        """Builds the norm.

        Args:
            config: Megatron's transformer config.
            hidden_size: size of the normalised dimension.
            eps: added to the variance.
            **options: passed on to ``WrappedTorchNorm``.
        """
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = WrappedTorchNorm(config=plain, hidden_size=hidden_size, eps=eps, **options)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def allow_sequence_parallel(builder: Any) -> Any:
    """The same norm builder, or one that allows sequence parallelism in place of the one that does not."""
    return SequenceParallelTorchNorm if builder is WrappedTorchNorm else builder
