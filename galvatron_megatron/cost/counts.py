"""Closed-form counts of the standard layer kinds: what a trace would read off, without torch.

Activation bytes follow arXiv 2205.05198 where dropout is on, and the kernels that keep the tensors:
``transformer_engine`` counts what a GPU run with Transformer Engine and fused attention keeps, ``local``
what Megatron's local layers keep, tensor by tensor as autograd saves them.
"""

from dataclasses import replace

from galvatron_megatron.cost.counts_attention import attention
from galvatron_megatron.cost.counts_builder import Builder, Shapes
from galvatron_megatron.cost.counts_ends import embedding, head
from galvatron_megatron.cost.counts_experts import mixture_of_experts
from galvatron_megatron.cost.counts_latent import latent_attention
from galvatron_megatron.cost.counts_mamba import mamba
from galvatron_megatron.cost.counts_mlp import mlp
from galvatron_megatron.cost.counts_values import Collective, LayerCounts, Operator
from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.plan.strategy import Recompute, Strategy

__all__ = ["Collective", "LayerCounts", "Operator", "embedding_counts", "head_counts", "layer_counts"]


def layer_counts(
    model: Model,
    layer: Layer,
    strategy: Strategy,
    samples: int,
    implementation: str = "transformer_engine",
) -> LayerCounts:
    """Counts one layer on one rank for one micro-batch.

    Args:
        model: sizes that all layers share.
        layer: the layer.
        strategy: how it runs.
        samples: samples of the micro-batch on this rank's data-parallel slice.
        implementation: ``transformer_engine`` or ``local``.

    Raises:
        DescriptionError: a size is not divisible by a degree, or the layer cannot run so.
    """
    builder = Builder(Shapes(model=model, strategy=strategy, samples=samples, implementation=implementation))
    if layer.attention is not None:
        (latent_attention if layer.attention.is_latent else attention)(builder, layer.attention)
    if layer.mlp is not None:
        mlp(builder, layer.mlp)
    if layer.experts is not None:
        mixture_of_experts(builder, layer.experts)
    if layer.mamba is not None:
        mamba(builder, layer.mamba)
    return builder.counts(input_name=next(iter(builder.kept)))


def embedding_counts(
    model: Model, base: Strategy, samples: int, implementation: str = "transformer_engine"
) -> LayerCounts:
    """Counts the embedding in the base layout, never recomputed; arguments as in :func:`layer_counts`."""
    plain = replace(base, recompute=Recompute.NONE)
    builder = Builder(Shapes(model=model, strategy=plain, samples=samples, implementation=implementation))
    embedding(builder)
    return builder.counts(input_name="embedding input")


def head_counts(
    model: Model, base: Strategy, samples: int, implementation: str = "transformer_engine"
) -> LayerCounts:
    """Counts final norm, output layer and loss in the base layout; arguments as in :func:`layer_counts`.

    The output layer's weight is counted here even where it is tied to the word embedding: on one rank with
    the embedding it is then the same memory.
    """
    plain = replace(base, recompute=Recompute.NONE)
    builder = Builder(Shapes(model=model, strategy=plain, samples=samples, implementation=implementation))
    head(builder)
    return builder.counts(input_name="head input")
