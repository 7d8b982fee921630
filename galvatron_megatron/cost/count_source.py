"""Where the counts of a layer come from: closed forms, each counted once, or a trace of the real layers."""

from dataclasses import replace
from functools import lru_cache
from typing import Protocol

from galvatron_megatron.cost.counts import embedding_counts, head_counts, layer_counts
from galvatron_megatron.cost.counts_values import LayerCounts
from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.plan.strategy import Offload, Strategy

_layer_counts = lru_cache(maxsize=16384)(layer_counts)
"""Counts do not depend on the cluster or its constants, so that calibration counts every layer once."""
_embedding_counts = lru_cache(maxsize=4096)(embedding_counts)
_head_counts = lru_cache(maxsize=4096)(head_counts)


@lru_cache(maxsize=4096)
def counted_strategy(strategy: Strategy) -> Strategy:
    """What of a strategy counts depend on: data parallelism enters through the samples of a rank, and where
    states lie changes no operator."""
    shared_out = (strategy.expert_parallel, strategy.expert_tensor_parallel) != (1, None)
    dp = strategy.dp if shared_out else 1
    return replace(strategy, dp=dp, zero=0, offload=Offload.NONE)


class CountSource(Protocol):
    """Where counts come from: closed forms, or a trace of the real layers."""

    def layer(self, layer: Layer, strategy: Strategy, samples: int) -> LayerCounts:
        """Counts of a layer; ``samples`` are those of the micro-batch on one data-parallel rank."""
        ...

    def embedding(self, base: Strategy, samples: int) -> LayerCounts:
        """Counts of the embedding in the base layout."""
        ...

    def head(self, base: Strategy, samples: int) -> LayerCounts:
        """Counts of final norm, output layer and loss in the base layout."""
        ...


class ClosedForms:
    """Counts without torch.

    Args:
        model: whose layers.
        implementation: of the layers: ``transformer_engine`` or ``local``.
    """

    def __init__(self, model: Model, implementation: str) -> None:
        # Counts depend on sizes, not on how many layers there are; a short model is hashed quickly.
        self._sizes = replace(model, layers=model.layers[:1])
        self._implementation = implementation

    def layer(self, layer: Layer, strategy: Strategy, samples: int) -> LayerCounts:
        """Counts of a layer."""
        return _layer_counts(self._sizes, layer, counted_strategy(strategy), samples, self._implementation)

    def embedding(self, base: Strategy, samples: int) -> LayerCounts:
        """Counts of the embedding."""
        return _embedding_counts(self._sizes, counted_strategy(base), samples, self._implementation)

    def head(self, base: Strategy, samples: int) -> LayerCounts:
        """Counts of the head."""
        return _head_counts(self._sizes, counted_strategy(base), samples, self._implementation)
