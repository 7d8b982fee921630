"""The kinds of layer a model is a sequence of."""

from enum import StrEnum


class LayerKind(StrEnum):
    """What one plannable layer contains; embedding and head are not layers, they run in the base layout."""

    BLOCK = "block"
    """A GPT transformer block: attention and a dense MLP."""
    MOE_BLOCK = "moe_block"
    """A GPT transformer block whose MLP is a mixture of experts."""
    ATTENTION = "attention"
    """A hybrid model's attention layer (``*`` in ``--hybrid-layer-pattern``)."""
    MLP = "mlp"
    """A hybrid model's dense MLP layer (``-``)."""
    MOE = "moe"
    """A hybrid model's mixture-of-experts layer (``E``)."""
    MAMBA = "mamba"
    """A hybrid model's Mamba layer (``M``)."""

    @property
    def has_attention(self) -> bool:
        """True where the layer has a core attention, which selective recomputation drops."""
        return self in (LayerKind.BLOCK, LayerKind.MOE_BLOCK, LayerKind.ATTENTION)

    @property
    def has_experts(self) -> bool:
        """True where the layer has experts, which expert parallelism shares out."""
        return self in (LayerKind.MOE_BLOCK, LayerKind.MOE)
