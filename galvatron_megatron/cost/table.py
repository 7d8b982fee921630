"""A cost model that looks prices up: for tests, for sharing measured prices, and for timing the search
alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from galvatron_megatron.cost.protocol import CostModel, LayerCost, Setting
from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Strategy

_FIELDS = tuple(entry.name for entry in fields(LayerCost))


def check_price(cost: LayerCost, where: str) -> None:
    """Makes sure that a price is one.

    Raises:
        DescriptionError: a number is NaN, infinite or negative, or bytes are not whole; names it.
    """
    for name in _FIELDS:
        value = getattr(cost, name)
        if not math.isfinite(value) or value < 0 or (name.endswith("bytes") and value != int(value)):
            raise DescriptionError(
                f"{where}: {name} is {value!r}; valid: a finite number >= 0, whole for bytes"
            )


@dataclass(kw_only=True, frozen=True, slots=True)
class TableCostModel:
    """Prices in tables; implements the ``CostModel`` protocol.

    Every number is checked when the table is made, so that a search never meets a bad one.
    """

    model: Model
    layers: Mapping[tuple[Layer, Strategy, int, int, int], LayerCost]
    """By layer, strategy, pp, micro-batches and samples of a micro-batch."""
    ends: Mapping[Setting, tuple[LayerCost, LayerCost]]
    """Embedding and head by setting."""
    reshards: Mapping[tuple[tuple, tuple, int, int], float] = field(default_factory=dict)
    """Seconds by both layouts, pp and samples; equal layouts cost nothing."""
    sends: Mapping[Setting, float] = field(default_factory=dict)
    overheads: Mapping[Setting, tuple[int, ...]] = field(default_factory=dict)
    """Bytes of every pipeline rank; none where absent."""
    outside_seconds: float = 0.0
    """Per step, outside all layers."""

    def __post_init__(self) -> None:
        for (layer, strategy, *_), cost in self.layers.items():
            check_price(cost, f"price of a {layer.kind.value} under {strategy}")
        for setting, pair in self.ends.items():
            for name, cost in zip(("embedding", "head"), pair, strict=True):
                check_price(cost, f"price of the {name} under {setting.base}")
        for name, table in (("reshards", self.reshards), ("sends", self.sends)):
            for key, seconds in table.items():
                if not math.isfinite(seconds) or seconds < 0:
                    raise DescriptionError(
                        f"price table {name}: {seconds!r} at {key}; valid: a finite number >= 0"
                    )
        for key, amounts in self.overheads.items():
            if any(amount < 0 or amount != int(amount) for amount in amounts):
                raise DescriptionError(
                    f"price table overheads: {amounts!r} at {key}; valid: whole numbers >= 0"
                )

    def layer_cost(self, layer: int, strategy: Strategy, setting: Setting) -> LayerCost:
        """Looks a layer up; see :class:`~galvatron_megatron.cost.protocol.CostModel`."""
        key = (
            self.model.layers[layer],
            strategy,
            setting.pp,
            setting.micro_batches,
            setting.micro_batch_samples,
        )
        found = self.layers.get(key)
        if found is None:
            raise DescriptionError(
                f"price table: no price of layer {layer} under {strategy} at pp {setting.pp} with "
                f"{setting.micro_batches} micro-batches of {setting.micro_batch_samples} samples; "
                f"valid: price it, or "
                "limit the space to what is priced"
            )
        return found

    def _end(self, setting: Setting, index: int) -> LayerCost:
        found = self.ends.get(setting)
        if found is None:
            raise DescriptionError(
                f"price table: no price of embedding and head under {setting}; valid: price them"
            )
        return found[index]

    def embedding_cost(self, setting: Setting) -> LayerCost:
        """Looks the embedding up."""
        return self._end(setting, 0)

    def head_cost(self, setting: Setting) -> LayerCost:
        """Looks the head up."""
        return self._end(setting, 1)

    def reshard_seconds(self, layer: int, before: Strategy, after: Strategy, setting: Setting) -> float:
        """Looks a resharding up."""
        if before.layout == after.layout:
            return 0.0
        key = (before.layout, after.layout, setting.pp, setting.micro_batch_samples)
        if key not in self.reshards:
            raise DescriptionError(f"price table: no resharding from {before} to {after}; valid: price it")
        return self.reshards[key]

    def send_seconds(self, setting: Setting) -> float:
        """Looks a pipeline send up; free where absent."""
        return self.sends.get(setting, 0.0)

    def overhead_bytes(self, setting: Setting, position: int) -> int:
        """Looks the overhead of a rank up; none where absent."""
        amounts = self.overheads.get(setting)
        return 0 if amounts is None else amounts[position]

    def step_overhead_seconds(self) -> float:
        """Seconds per step outside all layers."""
        return self.outside_seconds


class Recorder:
    """Asks another cost model and remembers, so that everything a search asked becomes a table."""

    def __init__(self, cost_model: CostModel, model: Model) -> None:
        self._source, self._model = cost_model, model
        self._layers: dict = {}
        self._ends: dict = {}
        self._reshards: dict = {}
        self._sends: dict = {}
        self._overheads: dict = {}

    def layer_cost(self, layer: int, strategy: Strategy, setting: Setting) -> LayerCost:
        """Prices a layer and remembers it."""
        cost = self._source.layer_cost(layer, strategy, setting)
        key = (self._model.layers[layer], strategy, setting.pp, setting.micro_batches)
        self._layers[(*key, setting.micro_batch_samples)] = cost
        return cost

    def _end(self, setting: Setting) -> tuple[LayerCost, LayerCost]:
        if setting not in self._ends:
            self._ends[setting] = (self._source.embedding_cost(setting), self._source.head_cost(setting))
        return self._ends[setting]

    def embedding_cost(self, setting: Setting) -> LayerCost:
        """Prices the embedding and remembers it."""
        return self._end(setting)[0]

    def head_cost(self, setting: Setting) -> LayerCost:
        """Prices the head and remembers it."""
        return self._end(setting)[1]

    def reshard_seconds(self, layer: int, before: Strategy, after: Strategy, setting: Setting) -> float:
        """Prices a resharding and remembers it."""
        seconds = self._source.reshard_seconds(layer, before, after, setting)
        self._reshards[before.layout, after.layout, setting.pp, setting.micro_batch_samples] = seconds
        return seconds

    def send_seconds(self, setting: Setting) -> float:
        """Prices a pipeline send and remembers it."""
        return self._sends.setdefault(setting, self._source.send_seconds(setting))

    def overhead_bytes(self, setting: Setting, position: int) -> int:
        """Asks for the overhead of all ranks and remembers them."""
        if setting not in self._overheads:
            self._overheads[setting] = tuple(
                self._source.overhead_bytes(setting, rank) for rank in range(setting.pp)
            )
        return self._overheads[setting][position]

    def step_overhead_seconds(self) -> float:
        """Seconds per step outside all layers."""
        outside = getattr(self._source, "step_overhead_seconds", None)
        return 0.0 if outside is None else float(outside())

    def table(self) -> TableCostModel:
        """Everything asked so far."""
        return TableCostModel(
            model=self._model,
            layers=dict(self._layers),
            ends=dict(self._ends),
            reshards=dict(self._reshards),
            sends=dict(self._sends),
            overheads=dict(self._overheads),
            outside_seconds=self.step_overhead_seconds(),
        )
