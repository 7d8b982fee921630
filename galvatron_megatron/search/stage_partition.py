"""The best partition of the layers into pipeline stages, exact for the whole objective.

The step time of stages with times t_p and synchronisation y_p is (``cost.objective``)

    T = (m - 1/v) * max(t) + sum(t) / v + max(y)

For caps tau >= t_p and Y >= y_p the best plan minimises sum(t) alone, which is a shortest path over
(position, layers
so far). The search is a branch and bound over boxes of (tau, Y): one shortest path per box gives a lower
bound, a plan
and thereby tighter caps. Stage times enter the path as Lagrangian lower bounds first and are replaced by
exact ones
(``layer_dp``) only where a best path uses them: when every stage of a best path is exact, so is the path.
"""

from dataclasses import replace
from heapq import heappop, heappush
from itertools import count, pairwise

import numpy as np

from galvatron_megatron.search.chain import BOUNDARY, BYTES_ROW, SYNC_ROW, Chain
from galvatron_megatron.search.host_room import least_host
from galvatron_megatron.search.layer_dp import Assignment, StageSearch
from galvatron_megatron.search.options import Options
from galvatron_megatron.search.positions import Partition, Positions
from galvatron_megatron.search.spans import Spans
from galvatron_megatron.search.stage_answers import ROUNDING, Limits, StageAnswers

_NEAR = 2e-3


class PipelineProblem:
    """All partitions of one family (``Spans``) in one setting."""

    def __init__(
        self,
        chain: Chain,
        spans: Spans,
        positions: Positions,
        element_of: dict[tuple, int],
        micro_batches: int,
        time_limit: float = np.inf,
        numbered: dict | None = None,
        deadline: float = np.inf,
    ) -> None:
        """Collects the sequences that can occur.

        Args:
            chain: prices and bounds.
            spans: the family of partitions.
            positions: the ranks of the pipeline.
            element_of: number in the chain of every (kind, chunk, forced recomputation).
            micro_batches: m.
            time_limit: a stage slower than this many seconds is of no use.
            numbered: sequences of problems that share ``element_of``, kept for the next one.
            deadline: reading of ``time.perf_counter`` behind which solving ends with a ``LateError``.
        """
        self._deadline = deadline
        self.chain, self.spans, self.positions = chain, spans, positions
        self.micro_batches = micro_batches
        self.slowest_weight = micro_batches - 1 / spans.virtual_stages
        self.sum_weight = 1 / spans.virtual_stages
        self.time_limit = time_limit
        self._element_of = element_of
        # Which sequences occur depends neither on prices nor on the base layout.
        key = (spans, self._longest())
        found = None if numbered is None else numbered.get(key)
        if found is None:
            self._ids: dict[tuple[int, ...], int] = {}
            self._sequences: list[tuple[int, ...]] = []
            self._collect()
            if numbered is not None:
                numbered[key] = (self._sequences, self._first, self._last, self._middle, self._begins)
        else:
            self._sequences, self._first, self._last, self._middle, self._begins = found
        self.is_possible = bool(self._sequences)
        if not self.is_possible:
            return
        self._prices = chain.whole(key, self._sequences)[:, positions.classes, :]
        self._spare = positions.budget - np.maximum(positions.transient, chain.least_transient)
        self._answers: dict[tuple[int, ...], dict[int, StageAnswers]] = chain.answers
        self._bounds: dict[float, np.ndarray] = {}
        self._low_both = 0.0
        self._is_joint = False

    # ---- sequences -------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Numbers the sequences of all stages."""
        spans, pp, width = self.spans, self.spans.pp, self.spans.width
        band = self._longest()
        self._first = np.full(width + 1, -1, dtype=np.intp)
        self._last = np.full(width + 1, -1, dtype=np.intp)
        self._middle = np.full((width + 1, band + 1), -1, dtype=np.intp)  # [end, length]
        begins = np.arange(width + 1)[:, None] - np.arange(band + 1)[None, :]
        self._begins = np.where(begins >= 0, begins, width + 1)  # one past the end where there is none
        if pp == 1:
            self._first[width] = self._number(0, 0, width)
            return
        for length in range(1, band + 1):
            self._first[length] = self._number(0, 0, length)
            self._last[width - length] = self._number(pp - 1, width - length, width)
        if pp == 2:
            return
        if spans.is_shift_invariant:
            # Away from the ends: neither exception of the first and last virtual stage is met.
            begin = spans.short_first + 1
            for length in range(1, band + 1):
                if begin + length < width - spans.short_last + 1:
                    self._middle[begin + length : width + 1, length] = self._number(1, begin, begin + length)
                    self._middle[begin + length : width + 1, length] = self._middle[begin + length, length]
            return
        for end in range(2, width):
            for length in range(1, min(band, end - 1) + 1):
                begin = end - length
                position = begin if spans.by_hand else 1
                if 0 < position < pp - 1:
                    self._middle[end, length] = self._number(position, begin, end)
        return

    def _longest(self) -> int:
        """Most of the width that a rank can own in the time limit, by the fastest strategies alone."""
        spans = self.spans
        most = max(1, spans.width - spans.pp + 1)
        least = min(float(options.seconds.min()) for options in self.chain.elements)
        if spans.by_hand or least <= 0 or not np.isfinite(self.time_limit):
            return most
        layers = self.time_limit / least + spans.short_first + spans.short_last
        return max(1, min(most, int(layers / spans.virtual_stages + 1e-6)))

    def _number(self, position: int, begin: int, end: int) -> int:
        if not self.spans.allowed(position, begin, end):
            return -1
        elements = self._element_of
        sequence = tuple(
            BOUNDARY if entry == BOUNDARY else elements[entry] for entry in self.spans.sequence(begin, end)
        )
        if sequence not in self._ids:
            self._ids[sequence] = len(self._sequences)
            self._sequences.append(sequence)
        return self._ids[sequence]

    # ---- stage times -----------------------------------------------------------------------------------------

    def _times(self, sync_limit: float) -> np.ndarray:
        """Lower bounds, exact where known, of the stage times [P, C + 1]; the last column is infinite."""
        found = self._bounds.get(sync_limit)
        if found is not None:
            return found
        positions = self.positions
        allowance = sync_limit - positions.sync if np.isfinite(sync_limit) else None
        layers = self.chain.time_bounds(self._prices, positions.classes, self._spare, allowance)
        found = np.full((layers.shape[0], layers.shape[1] + 1), np.inf)
        found[:, :-1] = layers + positions.seconds[:, None]
        self._bounds = {sync_limit: found}  # one at a time: boxes of one allowance follow each other
        if self._answers:
            for number, sequence in enumerate(self._sequences):
                known = self._answers.get(sequence)
                if known:
                    self._tighten(found, number, known, sync_limit)
        return found

    def _limits(self, position: int, sync_limit: float) -> Limits:
        positions = self.positions
        return Limits(
            budget=float(positions.budget[position]),
            transient=float(positions.transient[position]),
            sync=float(sync_limit - positions.sync[position]),
            host=float(positions.host[position]),
        )

    def _tighten(
        self, times: np.ndarray, number: int, known: dict[int, StageAnswers], sync_limit: float
    ) -> None:
        """Enters into the stage times what is known about one sequence."""
        for position, group in enumerate(self.positions.classes.tolist()):
            stage = known.get(group)
            if stage is None:
                continue
            constant = self.positions.seconds[position]
            limits = self._limits(position, sync_limit)
            exact = stage.exact(limits)
            if exact is not None:
                times[position, number] = exact.seconds + constant
            else:
                # Above a cap that was refuted, whatever rounding did to the difference and the sum.
                bound = (stage.lower_bound(limits) + constant) * (1 + ROUNDING)
                times[position, number] = max(times[position, number], bound)

    def _retighten(self, number: int, sync_limit: float) -> None:
        self._tighten(self._times(sync_limit), number, self._answers[self._sequences[number]], sync_limit)

    def _stage(self, position: int, number: int) -> StageAnswers:
        known = self._answers.setdefault(self._sequences[number], {})
        return known.setdefault(int(self.positions.classes[position]), StageAnswers())

    def _take_fastest(self, position: int, number: int, sync_limit: float) -> bool:
        """Makes a stage exact where the fastest path of all keeps every limit; False where it does not."""
        limits = self._limits(position, sync_limit)
        path = self.chain.fastest(self._sequences[number])
        used = float(path.bytes[self.positions.classes[position]])
        if path.sync > limits.sync or used + max(path.transient, limits.transient) > limits.budget:
            return False
        if path.host > limits.host:
            return False
        found = Assignment(
            seconds=path.seconds,
            sync=path.sync,
            bytes=used,
            transient=path.transient,
            choices=path.choices,
            host=path.host,
        )
        self._stage(position, number).solved.append((Limits(budget=np.inf, transient=0.0), found))
        self._retighten(number, sync_limit)
        return True

    def _learn(self, position: int, number: int, time_limit: float, sync_limit: float) -> None:
        """Learns more about a stage that is not exact: a sharper bound at first, then the answer."""
        stage = self._stage(position, number)
        limits = self._limits(position, sync_limit)
        asked = next(each for each in limits.in_turn if stage.exact(each) is None)
        limit = time_limit - self.positions.seconds[position]
        search = stage.searches.get(asked)
        if search is None:
            search = stage.searches[asked] = StageSearch(
                self.chain,
                self._sequences[number],
                int(self.positions.classes[position]),
                asked.budget,
                constant_transient=asked.transient,
                sync_limit=asked.sync,
                host_limit=asked.host,
            )
            stage.refuted.append((asked, search.lower_bound(limit) * (1 - 4 * ROUNDING)))
        else:
            found = search.fastest(limit, self._deadline)
            if found is None:
                stage.refuted.append((asked, limit))
            else:
                stage.solved.append((asked, found))
        self._retighten(number, sync_limit)

    # ---- shortest paths --------------------------------------------------------------------------------------

    def _shortest(self, times: np.ndarray, combine=np.add) -> tuple[float, list[int]]:
        """Cheapest cuts for stage prices [P, C + 1], summed or (``np.maximum``) by their largest."""
        pp, width = self.spans.pp, self.spans.width
        if pp == 1:
            return float(times[0, self._first[width]]), [0, width]
        reach = times[0, self._first]
        parents = []
        ends = np.arange(width + 1)
        padded = np.full(width + 2, np.inf)
        for position in range(1, pp - 1):
            padded[:-1] = reach
            total = combine(padded[self._begins], times[position][self._middle])
            best = total.argmin(1)
            reach = total[ends, best]
            parents.append(self._begins[ends, best])
        total = combine(reach, times[pp - 1, self._last])
        cut = int(total.argmin())
        value = float(total[cut])
        cuts = [width, cut]
        for back in reversed(parents):
            cut = int(back[cut])
            cuts.append(cut)
        return value, [*reversed([*cuts, 0])]

    def _numbers(self, cuts: list[int]) -> list[int]:
        pp, width = self.spans.pp, self.spans.width
        if pp == 1:
            return [int(self._first[width])]
        middle = [int(self._middle[e, e - b]) for b, e in pairwise(cuts[1:-1])]
        return [int(self._first[cuts[1]]), *middle, int(self._last[cuts[-2]])]

    def _oracle(
        self, low_time: float, low_sync: float, slowest: float, sync_limit: float, cutoff: float
    ) -> tuple[float, list[int], list[Assignment]] | None:
        """Finds the least sum of stage times, exactly, under both caps.

        Args:
            low_time: seconds that the slowest stage takes at least.
            low_sync: seconds that the largest synchronisation takes at least.
            slowest: cap on every stage time.
            sync_limit: cap on every synchronisation.
            cutoff: only plans faster than this many seconds are wanted.

        Returns:
            The sum, the cuts and the stages; None where no plan is below the cutoff.
        """
        weight = self.slowest_weight
        while True:
            times = self._times(sync_limit)
            capped = np.where(times <= slowest, times, np.inf)
            total, cuts = self._shortest(capped)
            if not np.isfinite(total):
                return None
            least, _ = self._shortest(capped, np.maximum)
            rest = total * self.sum_weight
            if max(weight * max(least, low_time) + low_sync, self._low_both) + rest > cutoff:
                return None
            stages = list(enumerate(self._numbers(cuts)))
            if weight > 0:
                slowest = min(slowest, (cutoff - rest - low_sync) / weight)
                if max(times[stage] for stage in stages) > slowest:
                    continue
            exact = [self._stage(*stage).exact(self._limits(stage[0], sync_limit)) for stage in stages]
            if None not in exact:
                return total, cuts, exact
            unknown = [stage for stage, answer in zip(stages, exact, strict=True) if answer is None]
            taken = [self._take_fastest(*stage, sync_limit) for stage in unknown]
            if any(taken):
                continue
            # One at a time, the slowest first: as a rule it tells that no plan is left.
            worst = max(unknown, key=lambda stage: times[stage])
            if not self._is_joint and self._needs_sync(*worst, sync_limit):
                self._sharpen_both(cutoff, rest)
            else:
                self._learn(*worst, slowest, sync_limit)

    def _needs_sync(self, position: int, number: int, sync_limit: float) -> bool:
        """True where a stage is known without a limit on sync, so that only one with a limit is left to ask."""
        loose = replace(self._limits(position, sync_limit), sync=np.inf)
        return self._stage(position, number).exact(loose) is not None

    def _sharpen_both(self, cutoff: float, rest: float) -> None:
        """Raises the bound of weight * time + sync to what the best stages take exactly.

        Time and sync are one price there, so that this costs far less than limiting sync, and often tells
        that no trade of the one for the other is worth it.
        """
        self._is_joint = True
        weight, positions = self.slowest_weight, self.positions
        if weight <= 0:
            return
        joint = PipelineProblem(
            self.chain.joint(1 / weight),
            self.spans,
            replace(
                positions, seconds=positions.seconds + positions.sync / weight, sync=np.zeros(self.spans.pp)
            ),
            self._element_of,
            self.micro_batches,
            cutoff / weight,
        )
        least = joint.least_slowest((cutoff - rest) / weight)
        self._low_both = max(self._low_both, weight * least * (1 - ROUNDING))

    def least_slowest(self, enough: float) -> float:
        """Least time of the slowest stage, exactly; or a bound of it above ``enough`` seconds."""
        while True:
            times = self._times(np.inf)
            least, cuts = self._shortest(times, np.maximum)
            if least > enough:
                return least
            worst = max(enumerate(self._numbers(cuts)), key=lambda stage: times[stage])
            if self._stage(*worst).exact(self._limits(worst[0], np.inf)) is not None:
                return least
            if not self._take_fastest(*worst, np.inf):
                self._learn(*worst, enough, np.inf)

    def least_host(self) -> np.ndarray:
        """Bytes in host memory [P, C + 1] that stages keep there at least."""
        found = np.full((self.spans.pp, len(self._sequences) + 1), np.inf)
        found[:, :-1] = least_host(self.chain, self._sequences, self.positions.classes, self._spare)
        return found

    def least_together(self, needed: np.ndarray, slowest: float) -> float:
        """The least sum of ``needed`` [P, C + 1] over stages of which none takes longer than ``slowest``."""
        return self._shortest(np.where(self._times(np.inf) <= slowest, needed, np.inf))[0]

    # ---- branch and bound ------------------------------------------------------------------------------------

    def lower_bound(self) -> float:
        """Bound of the step time from Lagrangian stage times alone."""
        if not self.is_possible:
            return np.inf
        low_slowest, low_sync, low_both = self._least()
        total, _ = self._shortest(self._times(np.inf))
        return max(self.slowest_weight * low_slowest + low_sync, low_both) + total * self.sum_weight

    def least_full(self) -> list[int] | None:
        """Cuts for which the stage that overfills its budget most does so least, whatever the time."""
        over = np.full((self.spans.pp, len(self._sequences) + 1), np.inf)
        over[:, :-1] = self._prices[BYTES_ROW] - self._spare[:, None]
        value, cuts = self._shortest(over, np.maximum)
        return cuts if np.isfinite(value) else None

    def useful(self, element: int, chunk: int, candidates: Options, cutoff: float) -> np.ndarray:
        """Marks the strategies of an element that a plan faster than the cutoff may contain.

        A rank that uses a strategy once pays at least its reduced price on top of its Lagrangian bound.
        With all
        other ranks as full as the cutoff lets them be, it must still hold the remaining layers in time.

        Args:
            element: number of the element in the (relaxed) chain of this problem.
            chunk: chunk of the element.
            candidates: strategies in question, which need not be those of the chain.
            cutoff: seconds.

        Returns:
            Mask over the candidates.
        """
        chain, positions = self.chain, self.positions
        everything = np.ones(len(candidates.strategies), dtype=bool)
        if not np.isfinite(cutoff):
            return everything
        times = self._times(np.inf)[:, :-1]
        if self.spans.pp == 1:
            cap = cutoff / (self.slowest_weight + self.sum_weight)
        else:
            if self.slowest_weight <= 0:
                return everything
            total, _ = self._shortest(self._times(np.inf))
            _, low_sync, _ = self._least()
            cap = (cutoff - total * self.sum_weight - low_sync) / self.slowest_weight
        lengths = np.array([sum(e != BOUNDARY for e in sequence) for sequence in self._sequences])
        most = np.where(times <= cap, lengths, 0).max(1)
        need = len(self.spans.kinds) - (most.sum() - most)
        rows = chain.plain_rows
        beta = chain.beta[rows][:, positions.classes]  # [J, P]
        price = np.where(lengths >= need[:, None], self._prices[rows], np.inf).min(2) - beta * self._spare
        held = candidates.state + chain.live[:, chunk][:, None] * candidates.activation  # [D, S]
        own = candidates.seconds + beta[:, :, None] * held[positions.classes]
        cheapest = chain.cheapest(element)[rows][:, positions.classes]
        bound = (price[:, :, None] + own - cheapest[:, :, None]).max(0) + positions.seconds[:, None]
        return (bound * (1 - 1e-9) <= cap).any(0)

    def _least(self) -> tuple[float, float, float]:
        """Least slowest stage, least largest sync, and least largest (weight * time + sync), each by itself."""
        slowest, _ = self._shortest(self._times(np.inf), np.maximum)
        padded = np.full(self._times(np.inf).shape, np.inf)
        padded[:, :-1] = self._prices[SYNC_ROW] * (1 - ROUNDING) + self.positions.sync[:, None]
        sync, _ = self._shortest(padded, np.maximum)
        both = 0.0
        weight = self.slowest_weight
        if weight > 0:
            rows = np.flatnonzero(np.isclose(self.chain.kappa * weight, 1.0) & (self.chain.time_weight > 0))
            if len(rows):
                paid = self.chain.beta[rows][:, self.positions.classes] * self._spare
                price = self._prices[rows]
                bound = (price - paid[:, :, None] - ROUNDING * (price + np.abs(paid)[:, :, None])).max(0)
                padded[:, :-1] = (
                    weight * (bound + self.positions.seconds[:, None]) + self.positions.sync[:, None]
                )
                both, _ = self._shortest(padded, np.maximum)
        return slowest, sync, both

    def solve(self, cutoff: float = np.inf) -> Partition | None:
        """Finds the best partition.

        Args:
            cutoff: only a plan faster than this many seconds is wanted.

        Returns:
            The best partition, exactly; None where none is below the cutoff.
        """
        if not self.is_possible:
            return None
        low_slowest, low_sync, self._low_both = self._least()
        if not np.isfinite(low_slowest):
            return None
        best: Partition | None = None
        ticket = count()
        boxes: list = []
        limit = self.time_limit

        def push(low_t: float, high_t: float, low_y: float, high_y: float, known: tuple | None) -> None:
            fixed = max(self.slowest_weight * low_t + low_y, self._low_both)
            bound = fixed + (known[0] * self.sum_weight if known else 0.0)
            heappush(boxes, (bound, next(ticket), low_t, high_t, low_y, high_y, known))

        push(low_slowest, limit, low_sync, np.inf, None)
        while boxes:
            bound, _, low_t, high_t, low_y, high_y, known = heappop(boxes)
            if bound >= cutoff * (1 - ROUNDING):
                break
            if known is None:
                known = self._oracle(low_t, low_y, high_t, high_y, cutoff)
                if known is None:
                    continue
            total, cuts, found = known
            times = [a.seconds + c for a, c in zip(found, self.positions.seconds, strict=True)]
            syncs = [a.sync + c for a, c in zip(found, self.positions.sync, strict=True)]
            value = self.slowest_weight * max(times) + sum(times) * self.sum_weight + max(syncs)
            if value < cutoff * (1 - ROUNDING):
                cutoff = value
                best = Partition(step_seconds=value, cuts=tuple(cuts), assignments=tuple(found))
            gain = cutoff - (self.slowest_weight * low_t + low_y + total * self.sum_weight)
            if gain <= cutoff * 4 * ROUNDING:
                continue
            cap_t = min(high_t, low_t + gain / self.slowest_weight) if self.slowest_weight > 0 else high_t
            cap_y = min(high_y, low_y + gain)
            slow, late = max(times), max(syncs)
            # A stage keeps its limit beside what is constant, so that the sum may be off by rounding.
            if slow > cap_t * (1 + ROUNDING) or late > cap_y * (1 + ROUNDING):
                push(low_t, cap_t, low_y, cap_y, None)
                continue
            # The known path is inside the caps, so the box must be split where the path stands out most.
            if self.slowest_weight * (slow - low_t) >= late - low_y:
                middle = _split(low_t, slow)
                push(low_t, middle, low_y, cap_y, None)
                push(max(low_t, middle), cap_t, low_y, cap_y, known)
            else:
                middle = _split(low_y, late)
                push(low_t, cap_t, low_y, middle, None)
                push(low_t, cap_t, max(low_y, middle), cap_y, known)
        return best


def _split(low: float, high: float) -> float:
    """Half way; just below the upper end where the two are near, so that a discrete choice is left out
    whole."""
    if high - low > _NEAR * high:
        return (low + high) / 2
    return high * (1 - ROUNDING)
