"""Refuses prices that one cannot plan with, naming what they are the price of."""

import math
from dataclasses import fields

from galvatron_megatron.cost.protocol import CostModel, LayerCost, Setting
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.strategy import Strategy

_FIELDS = tuple(entry.name for entry in fields(LayerCost))
_LARGEST = 2**50  # sums of up to 8,000 such numbers of bytes are still exact in a 64-bit float


def checked(cost: LayerCost, where: str, *values: object) -> tuple[float, ...]:
    """Reads a price as six floats.

    Args:
        cost: the price.
        where: what it is the price of, for the message, with {} for each of the values.
        values: written out where the price is refused only, which is never in most of a million calls.

    Raises:
        SearchError: a price is NaN, infinite, negative or, for bytes, not whole or beyond 2**50.
    """
    row = (
        cost.micro_batch_seconds,
        cost.sync_seconds,
        cost.state_bytes,
        cost.activation_bytes,
        cost.transient_bytes,
        cost.host_bytes,
    )
    # One comparison accepts almost every row: a NaN or negative number makes it false.
    sound = min(row) >= 0 and max(row) < _LARGEST and not math.isnan(sum(row))
    if sound and all(amount == int(amount) for amount in row[2:]):
        return row
    for name, value in zip(_FIELDS, row, strict=True):
        _number(value, name.endswith("bytes"), f"{where}: {name}", *values)
    raise AssertionError("unreachable")


def _number(value: float, whole: bool, where: str, *values: object) -> float:
    if 0 <= value < _LARGEST and (not whole or value == int(value)):
        return value
    what = "whole and below 2**50" if whole else "of seconds"
    raise SearchError(f"cost of {where.format(*values)} is {value!r}; valid: a finite number >= 0, {what}")


class CheckedCosts:
    """A cost model whose prices outside the layers are checked whenever they are asked for.

    Prices of layers pass through: :func:`checked` reads them, once for each, where they become arrays.

    Args:
        cost_model: who knows the prices.
    """

    def __init__(self, cost_model: CostModel) -> None:
        self._costs = cost_model
        self.layer_cost = cost_model.layer_cost
        if hasattr(cost_model, "step_overhead_seconds"):
            self.step_overhead_seconds = cost_model.step_overhead_seconds

    def embedding_cost(self, setting: Setting) -> LayerCost:
        """The checked price of the embedding."""
        cost = self._costs.embedding_cost(setting)
        checked(cost, "the embedding under {}", setting.base)
        return cost

    def head_cost(self, setting: Setting) -> LayerCost:
        """The checked price of the head."""
        cost = self._costs.head_cost(setting)
        checked(cost, "the head under {}", setting.base)
        return cost

    def reshard_seconds(self, layer: int, before: Strategy, after: Strategy, setting: Setting) -> float:
        """The checked price of moving activations in front of a layer."""
        seconds = self._costs.reshard_seconds(layer, before, after, setting)
        return _number(seconds, False, "resharding from {} to {}: seconds", before, after)

    def send_seconds(self, setting: Setting) -> float:
        """The checked price of a stage boundary."""
        return _number(
            self._costs.send_seconds(setting), False, "a pipeline send under {}: seconds", setting.base
        )

    def overhead_bytes(self, setting: Setting, position: int) -> int:
        """The checked bytes that no layer causes."""
        amount = self._costs.overhead_bytes(setting, position)
        return _number(amount, True, "the overhead of pipeline rank {}: bytes", position)
