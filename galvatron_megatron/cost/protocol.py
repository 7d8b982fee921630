"""What the search asks of a cost model."""

from dataclasses import dataclass
from typing import Protocol

from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Strategy


@dataclass(kw_only=True, frozen=True, slots=True)
class Setting:
    """The outer decisions under which a layer is priced."""

    pp: int
    virtual_stages: int
    micro_batch_size: int
    """Samples in one micro-batch of one base data-parallel rank."""
    micro_batches: int
    base: Strategy
    """The base layout of embedding and head; base.ranks is the number of ranks of a stage."""

    @classmethod
    def of(cls, plan: Plan) -> "Setting":
        """The setting in which the layers of a plan are priced."""
        return cls(
            pp=plan.pp,
            virtual_stages=plan.virtual_stages,
            micro_batch_size=plan.micro_batch_size,
            micro_batches=plan.micro_batches,
            base=plan.base,
        )

    @property
    def micro_batch_samples(self) -> int:
        """Samples of one micro-batch over all base data-parallel ranks; every layer's dp divides it."""
        return self.micro_batch_size * self.base.dp


@dataclass(kw_only=True, frozen=True, slots=True)
class LayerCost:
    """Price of one layer (or of the embedding or head) under one strategy in one setting.

    A stage with layers L at pipeline position p, holding live(c) micro-batches of each of its chunks c::

        stage_seconds = sum(micro_batch_seconds) + resharding + pipeline sends
        sync_seconds  = sum(sync_seconds)
        stage_bytes   = sum(state_bytes) + sum(live * activation_bytes) + max(transient_bytes) + overhead_bytes
    """

    micro_batch_seconds: float
    """Forward + backward of one micro-batch, with recomputation and non-overlapped communication."""
    sync_seconds: float
    """Exposed gradient reduction, parameter gathering and optimizer step, once per training step."""
    state_bytes: int
    """Weights, gradients and optimizer states that a rank keeps all the time."""
    activation_bytes: int
    """Activations kept per live micro-batch."""
    transient_bytes: int
    """Memory needed on top while this layer computes (workspaces, gathered parameters, fp32 logits)."""
    host_bytes: int = 0
    """Offloaded states that a rank keeps in the memory of its node."""


class CostModel(Protocol):
    """Prices layers; a table, a profile or a formula. All methods are pure: equal arguments, equal answers.

    The search prices nothing twice and therefore relies on what a price may depend on:

    * ``layer_cost``: the layer (equal layers of the model have equal prices, whatever their index), the
      strategy and, of the setting, ``pp``, ``micro_batches`` and ``micro_batch_samples``. The base layout and
      the number of virtual stages change no layer's price.
    * ``reshard_seconds``: the two ``Strategy.layout`` values and the setting's ``pp`` and
      ``micro_batch_samples``. All layers of a model exchange activations of one shape, so the answer is the
      same in front of every layer; no triangle inequality is assumed.
    * ``embedding_cost``, ``head_cost``, ``send_seconds`` and ``overhead_bytes``: the whole setting.
    """

    def layer_cost(self, layer: int, strategy: Strategy, setting: Setting) -> LayerCost:
        """Prices layer ``layer`` (index in the model, from 0, embedding and head not counted)."""
        ...

    def embedding_cost(self, setting: Setting) -> LayerCost:
        """Prices the embedding, in the base layout, on the first stage."""
        ...

    def head_cost(self, setting: Setting) -> LayerCost:
        """Prices final norm, output layer and loss, in the base layout, on the last stage."""
        ...

    def reshard_seconds(self, layer: int, before: Strategy, after: Strategy, setting: Setting) -> float:
        """Time to move one micro-batch's activations in front of ``layer``, forward and backward together.

        ``before`` or ``after`` is ``setting.base`` at the ends of a stage. Zero where the layouts are equal.
        """
        ...

    def send_seconds(self, setting: Setting) -> float:
        """Exposed pipeline send/receive of one micro-batch over one stage boundary, both directions.

        Charged to the stage in front of the boundary, once per virtual stage that has a successor.
        """
        ...

    def overhead_bytes(self, setting: Setting, position: int) -> int:
        """Bytes on a rank that no layer causes: communication buffers, context, allocator slack."""
        ...
