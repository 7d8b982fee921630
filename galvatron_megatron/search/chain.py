"""A run of layers as a shortest-path problem, and Lagrangian lower bounds for it.

A *sequence* is what one pipeline rank executes: a tuple of elements (kind of layer, chunk of the rank), with
``BOUNDARY`` between chunks, where activations return to the base layout. Its price is a path over layouts:
every element adds the price of the strategy taken, every change of layout the price of resharding.

Memory and synchronisation are resources. For any multipliers beta, kappa >= 0 the cheapest path under the price

    seconds + beta * bytes + kappa * sync

gives a lower bound of the time of every path with bytes <= B and sync <= Y (weak duality):

    seconds >= cheapest - beta * B - kappa * Y

These bounds are exact linear-programming duals at the right multipliers, cost one backward recursion for all
positions of a pipeline at once, and are shared by all sequences with the same tail: for identical layers one
recursion serves every number of layers. They depend on the number of bytes nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from galvatron_megatron.search.options import Options

BOUNDARY = -1
BYTES_ROW, SYNC_ROW, TIME_ROW = 0, 1, 2
SAFETY = 1e-12
"""Relative slack that keeps a bound a bound under rounding."""


@dataclass(kw_only=True, frozen=True, slots=True)
class FastestPath:
    """The path of least time through a sequence."""

    seconds: float
    sync: float
    bytes: np.ndarray
    """State and live activations in every class of positions, [D]."""
    transient: float
    host: float
    choices: tuple[int, ...]
    """Index of the strategy of every layer element."""


class Chain:
    """Layers, resharding and positions of one outer decision.

    Attributes:
        elements: Options of every element; an element is an index into it.
        chunks: chunk of the rank that every element belongs to.
        reshard: [K, K] seconds between layouts.
        base: index of the base layout.
        live: [D, v] live micro-batches of every class of positions and chunk.
        time_weight: [R] 1 for bounds on time, 0 for the two pure resource rows.
        beta: [R, D] seconds per byte.
        kappa: [R] seconds per second of synchronisation.
    """

    def __init__(
        self,
        elements: Sequence[Options],
        chunks: Sequence[int],
        reshard: np.ndarray,
        base: int,
        live: np.ndarray,
        beta: np.ndarray,
        kappas: Sequence[float],
    ) -> None:
        """Builds the chain.

        Args:
            elements: see the class.
            chunks: see the class.
            reshard: see the class.
            base: see the class.
            live: see the class.
            beta: [J, D] memory multipliers to use, beside 0.
            kappas: synchronisation multipliers to use, beside 0.
        """
        self.elements = list(elements)
        self.chunks = list(chunks)
        self.reshard = reshard
        self.base = base
        self.live = live
        classes = live.shape[0]
        zero = np.zeros((1, classes))
        with_zero = np.concatenate([zero, beta])
        copies = 1 + len(kappas)
        self.beta = np.concatenate([zero + 1.0, zero, *([with_zero] * copies)])
        per = len(with_zero)
        self.kappa = np.concatenate([[0.0, 1.0], *(np.full(per, k) for k in (0.0, *kappas))])
        self.time_weight = np.ones(len(self.kappa))
        self.time_weight[:2] = 0.0
        self.plain_rows = np.arange(TIME_ROW, TIME_ROW + per)
        self._tails: dict[tuple[int, ...], np.ndarray] = {}
        self._costs: dict[int, np.ndarray] = {}
        self._fastest: dict[tuple[int, ...], FastestPath] = {}
        self._whole: dict[object, np.ndarray] = {}
        self._joint: dict[float, Chain] = {}
        self.answers: dict = {}
        """Answers found so far, by sequence and class of positions; kept here for all who share the chain."""
        self.least_transient = min(float(options.transient.min()) for options in self.elements)
        # [R, 1, K, K]: resharding counts in the rows of time only
        # [K, K] how much further from the first layout than from the second any third one can be
        self.detour = (reshard[:, None, :] - reshard[None, :, :]).max(2)
        self._moves = self.time_weight[:, None, None, None] * reshard[None, None]

    def bytes_of(self, element: int) -> np.ndarray:
        """State and live activation bytes, [D, S]."""
        options = self.elements[element]
        return options.state + self.live[:, self.chunks[element]][:, None] * options.activation

    def cheapest(self, element: int) -> np.ndarray:
        """Cheapest price of an element in any layout, [R, D]."""
        return self._cost(element).min(2)

    def _cost(self, element: int) -> np.ndarray:
        """Cheapest price of an element in every layout, [R, D, K]."""
        found = self._costs.get(element)
        if found is None:
            options = self.elements[element]
            price = (
                self.time_weight[:, None, None] * options.seconds
                + self.beta[:, :, None] * self.bytes_of(element)
                + self.kappa[:, None, None] * options.sync
            )
            found = np.full((*price.shape[:2], len(self.reshard)), np.inf)
            for layout in np.unique(options.layouts):
                found[:, :, layout] = price[:, :, options.layouts == layout].min(2)
            self._costs[element] = found
        return found

    def tail(self, sequence: tuple[int, ...]) -> np.ndarray:
        """Cheapest price of the rest of a sequence from every layout back to base, [R, D, K]."""
        found = self._tails.get(sequence)
        if found is not None:
            return found
        # Without recursion, so that a thousand layers do not meet the interpreter's limit.
        start = 0
        while start < len(sequence) and sequence[start:] not in self._tails:
            start += 1
        found = self._tails.get(sequence[start:])
        if found is None:
            end = self._moves[:, :, :, self.base]
            found = np.broadcast_to(end, (len(self.kappa), self.live.shape[0], len(self.reshard)))
            self._tails[()] = found
        for index in range(start - 1, -1, -1):
            element = sequence[index]
            if element == BOUNDARY:
                found = self._moves[:, :, :, self.base] + found[:, :, self.base, None]
            else:
                onward = self._cost(element) + found
                found = (self._moves + onward[:, :, None, :]).min(3) if len(self.reshard) > 1 else onward
            self._tails[sequence[index:]] = found
        return found

    def joint(self, kappa: float) -> "Chain":
        """The same chain with the price seconds + kappa * sync in place of seconds, and no sync."""
        found = self._joint.get(kappa)
        if found is None:
            elements = []
            for options in self.elements:
                prices = options.prices.copy()
                prices[0] += kappa * prices[1]
                prices[1] = 0.0
                elements.append(Options(strategies=options.strategies, layouts=options.layouts, prices=prices))
            beta = self.beta[self.plain_rows[1:]]
            found = Chain(elements, self.chunks, self.reshard, self.base, self.live, beta, ())
            self._joint[kappa] = found
        return found

    def whole(self, family: object, sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Cheapest prices of whole sequences, from base to base, [R, D, C].

        Args:
            family: names the sequences; equal names, equal sequences.
            sequences: C of them.
        """
        found = self._whole.get(family)
        if found is None:
            found = np.stack([self.tail(sequence)[:, :, self.base] for sequence in sequences], axis=2)
            self._whole[family] = found
        return found

    def time_bounds(
        self, prices: np.ndarray, classes: np.ndarray, spare: np.ndarray, allowance: np.ndarray | None
    ) -> np.ndarray:
        """Lower bounds of the time of whole sequences at every position of a pipeline.

        Args:
            prices: [R, P, C] of ``tail`` from the base layout, for C sequences.
            classes: [P] class of every position.
            spare: [P] bytes for state and live activations, beside the least transient.
            allowance: [P] seconds of synchronisation that the layers may take; None where unlimited.

        Returns:
            [P, C] seconds; infinite where not even the smallest path fits.
        """
        rows = self.plain_rows if allowance is None else np.arange(TIME_ROW, len(self.kappa))
        paid = (self.beta[rows][:, classes] * spare)[:, :, None]
        cost = prices[rows]
        bound = cost - paid - SAFETY * (cost + np.abs(paid))
        misfit = prices[BYTES_ROW] > spare[:, None]
        if allowance is not None:
            bound = bound - (self.kappa[rows, None] * allowance)[:, :, None]
            misfit |= prices[SYNC_ROW] * (1 - SAFETY) > allowance[:, None]
        return np.where(misfit, np.inf, bound.max(0))

    def fastest(self, sequence: tuple[int, ...]) -> "FastestPath":
        """The fastest path where memory and synchronisation are ample; the same at every position."""
        found = self._fastest.get(sequence)
        if found is not None:
            return found
        seconds = sync = transient = host = 0.0
        layout = self.base
        bytes_ = np.zeros(self.live.shape[0])
        choices = []
        for index, element in enumerate(sequence):
            if element == BOUNDARY:
                seconds += self.reshard[layout, self.base]
                layout = self.base
                continue
            options = self.elements[element]
            rest = self.tail(sequence[index + 1 :])[TIME_ROW, 0]
            cost = self.reshard[layout, options.layouts] + options.seconds + rest[options.layouts]
            choice = int(cost.argmin())
            seconds += self.reshard[layout, options.layouts[choice]] + options.seconds[choice]
            sync += options.sync[choice]
            transient = max(transient, options.transient[choice])
            host += options.host[choice]
            bytes_ = bytes_ + self.bytes_of(element)[:, choice]
            layout = options.layouts[choice]
            choices.append(choice)
        seconds += self.reshard[layout, self.base]
        found = FastestPath(
            seconds=float(seconds),
            sync=float(sync),
            bytes=bytes_,
            transient=float(transient),
            host=float(host),
            choices=tuple(choices),
        )
        self._fastest[sequence] = found
        return found
