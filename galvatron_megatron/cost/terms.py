"""The parts of a price by name, so that an estimate can be read term by term."""

from dataclasses import dataclass

from galvatron_megatron.cost.protocol import LayerCost
from galvatron_megatron.cost.sharded_states import SentCollective

SOURCES = ("measured", "traced", "modelled")


@dataclass(kw_only=True, frozen=True, slots=True)
class Term:
    """One named part of a price."""

    name: str
    value: float
    """Seconds or bytes."""
    source: str = "modelled"
    """One of ``SOURCES``."""


@dataclass(kw_only=True, frozen=True, slots=True)
class PricedLayer:
    """A layer's cost, with the terms that it sums."""

    cost: LayerCost
    forward_seconds: float
    """Forward part of ``cost.micro_batch_seconds``."""
    backward_seconds: float
    """The rest of it, recomputation included."""
    micro_batch_terms: tuple[Term, ...]
    """Seconds; they add up to ``cost.micro_batch_seconds``."""
    sync_terms: tuple[Term, ...]
    """Seconds; they add up to ``cost.sync_seconds``."""
    state_terms: tuple[Term, ...]
    """Bytes; they add up to ``cost.state_bytes``."""
    activation_terms: tuple[Term, ...]
    """Bytes per live micro-batch; they add up to ``cost.activation_bytes`` without slack."""
    slack_bytes: int = 0
    """Part of ``cost.activation_bytes`` that is allocator rounding and fragmentation."""
    collectives: tuple[SentCollective, ...] = ()
    """Of its states, as they are priced; empty where prices are measured, which follow the analytic ones."""

    @property
    def host_bytes(self) -> int:
        """States that a rank keeps in host memory."""
        return self.cost.host_bytes
