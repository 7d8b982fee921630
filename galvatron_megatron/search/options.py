"""Prices of all strategies of one kind of layer, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from galvatron_megatron.cost.protocol import CostModel, Setting
from galvatron_megatron.plan.strategy import Strategy
from galvatron_megatron.search.checked_costs import checked
from galvatron_megatron.search.host_units import counted_in_units

HOST_ROW = 5


@dataclass(kw_only=True, frozen=True, slots=True)
class Options:
    """The strategies one layer may take and their prices; entry i of every array belongs to strategies[i].

    Bytes are whole numbers held in 64-bit floats, exact below 2**53: nothing is rounded.
    """

    strategies: tuple[Strategy, ...]
    layouts: np.ndarray
    """Index of the layout of every strategy, [S] int."""
    prices: np.ndarray
    """[6, S] float64: the rows below."""

    @property
    def seconds(self) -> np.ndarray:
        """Micro-batch seconds, [S]."""
        return self.prices[0]

    @property
    def sync(self) -> np.ndarray:
        """Once-per-step seconds, [S]."""
        return self.prices[1]

    @property
    def state(self) -> np.ndarray:
        """State bytes, [S]."""
        return self.prices[2]

    @property
    def activation(self) -> np.ndarray:
        """Activation bytes per live micro-batch, [S]."""
        return self.prices[3]

    @property
    def transient(self) -> np.ndarray:
        """Transient bytes, [S]."""
        return self.prices[4]

    @property
    def host(self) -> np.ndarray:
        """Bytes in host memory, [S]; zeros where that is no limit."""
        return self.prices[HOST_ROW]

    def take(self, chosen: np.ndarray) -> "Options":
        """Keeps the strategies at the given indices, in their order."""
        return Options(
            strategies=tuple(self.strategies[i] for i in chosen),
            layouts=self.layouts[chosen],
            prices=self.prices[:, chosen],
        )

    def with_one_layout(self) -> "Options":
        """The same prices as if moving between layouts were free: a relaxation for bounds."""
        return Options(
            strategies=self.strategies,
            layouts=np.zeros(len(self.strategies), dtype=np.intp),
            prices=self.prices,
        )

    def undominated(self) -> "Options":
        """Drops every strategy that another one of the same layout beats or equals in all prices.

        Exact for every pipeline position, since time and memory are monotone in all of them; of equals the
        first, the simplest, stays.
        """
        prices = self.prices
        better = (self.layouts[:, None] == self.layouts[None, :]) & (
            prices[:, :, None] <= prices[:, None, :]
        ).all(0)
        equal = better & better.T
        count = len(self.strategies)
        earlier = np.tri(count, count, -1, dtype=bool).T  # [i, j]: i comes before j
        drop = (better & (~equal | earlier)).any(0)
        return self.take(np.flatnonzero(~drop))


def price_options(
    cost_model: CostModel,
    layer: int,
    strategies: Sequence[Strategy],
    setting: Setting,
    layout_ids: dict[tuple, int],
    *,
    limits_host: bool = False,
) -> Options:
    """Prices all strategies of one layer.

    Args:
        cost_model: who knows the prices.
        layer: index of the layer (of the first of its kind).
        strategies: the simplest first.
        setting: outer decisions; only pp, micro-batches and samples may matter (see ``CostModel``).
        layout_ids: numbers of the layouts seen so far; extended here.
        limits_host: host memory is limited, so that what is kept there counts.

    Raises:
        SearchError: a price is not a number one can plan with.
    """
    price = cost_model.layer_cost
    rows = [checked(price(layer, s, setting), "layer {} under {}", layer, s) for s in strategies]
    layouts = [layout_ids.setdefault(s.layout, len(layout_ids)) for s in strategies]
    prices = np.ascontiguousarray(np.array(rows, dtype=np.float64).reshape(len(rows), HOST_ROW + 1).T)
    prices[HOST_ROW] = counted_in_units(prices[HOST_ROW]) if limits_host else 0.0
    return Options(strategies=tuple(strategies), layouts=np.array(layouts, dtype=np.intp), prices=prices)
