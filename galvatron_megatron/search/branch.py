"""One branch of the decision tree with its layers priced: pipeline degree, batch and micro-batches are
fixed."""

from dataclasses import replace
from functools import cached_property

import numpy as np

from galvatron_megatron.cost.objective import live_micro_batches
from galvatron_megatron.cost.protocol import CostModel, LayerCost
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Strategy
from galvatron_megatron.search.chain import Chain
from galvatron_megatron.search.decision_tree import Outer, Space, setting_of
from galvatron_megatron.search.host_shares import HostShares
from galvatron_megatron.search.layer_dp import LateError
from galvatron_megatron.search.multipliers import memory_multipliers
from galvatron_megatron.search.options import HOST_ROW, Options, checked, price_options
from galvatron_megatron.search.positions import Partition, Positions
from galvatron_megatron.search.spans import Spans, all_spans
from galvatron_megatron.search.stage_partition import PipelineProblem

_MOST_CLASSES = 8
"""Classes of positions whose multipliers are computed; the others take those of the nearest."""


class Branch:
    """Prices shared by all base layouts and all numbers of virtual stages of one ``Outer``.

    Raises:
        SearchError: a price is not a number one can plan with.
    """

    def __init__(self, space: Space, cost_model: CostModel, outer: Outer) -> None:
        """Prices every strategy of every kind of layer once."""
        self.space, self.cost_model, self.outer = space, cost_model, outer
        self.request = space.request
        model = self.request.model
        stays = self.request.on_device_layers
        entries = [(layer, index in stays) for index, layer in enumerate(model.layers)]
        first_of = {entry: index for index, entry in reversed(list(enumerate(entries)))}
        ordered = sorted(first_of, key=first_of.__getitem__)
        number = {entry: index for index, entry in enumerate(ordered)}
        self.layers = tuple(layer for layer, _ in ordered)
        """One layer of every kind."""
        self.kinds = tuple(number[entry] for entry in entries)
        self.counts = np.bincount(self.kinds, minlength=len(ordered))
        """Layers of every kind."""
        self.shares = [self.kinds.count(kind) / len(self.kinds) for kind in range(len(self.layers))]
        self.bases = space.bases(outer)
        self.any_setting = setting_of(outer, 1, self.bases[0])
        self._layout_ids: dict[tuple, int] = {}
        flags = (None,) if self.request.constraints.recomputed_layers_per_stage is None else (True, False)
        self.options: dict[tuple[int, bool | None], Options] = {}
        for kind, (layer, on_device) in enumerate(ordered):
            for forced in flags:
                self.options[kind, forced] = price_options(
                    cost_model,
                    first_of[layer, on_device],
                    space.strategies(layer, outer, forced, on_device=on_device),
                    self.any_setting,
                    self._layout_ids,
                    limits_host=self.request.host_bytes is not None,
                )
        for base in self.bases:
            self._layout_ids.setdefault(base.layout, len(self._layout_ids))
        self.is_possible = all(len(options.strategies) for options in self.options.values())
        self._live: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._relaxed_chains: dict[int, tuple[Chain, dict[tuple, int]]] = {}
        self._chains: dict[tuple[int, tuple], tuple[Chain, dict[tuple, int]]] = {}
        self._positions: dict[tuple[int, Strategy | None], tuple[np.ndarray, Positions]] = {}
        self._spans: dict[int, tuple[Spans, ...]] = {}
        self._numbered: dict = {}
        self._useful: dict[int, dict[tuple[int, bool | None], Options]] = {}
        self._ends: dict[tuple[int, Strategy], tuple[LayerCost, LayerCost]] = {}
        self.unproven = np.inf
        """Step seconds that a better plan than those found takes at least, where a search was cut short."""

    @property
    def virtual_stages(self) -> tuple[int, ...]:
        """Numbers of virtual stages to consider."""
        return self.space.virtual_stages(self.outer)

    def least_time(self) -> float:
        """Bound of the step time for ample memory and free resharding, over every number of virtual stages."""
        outer = self.outer
        per_kind = [self._least(kind, 0) for kind in range(len(self.shares))]
        total = sum(per_kind[kind] for kind in self.kinds)
        sync = sum(self._least(kind, 1) for kind in self.kinds) / outer.pp
        most = -(-len(self.kinds) // outer.pp)
        best = np.inf
        for virtual in self.virtual_stages:
            slowest = max(total / outer.pp, most * min(per_kind) if virtual == 1 else 0.0)
            best = min(best, (outer.micro_batches - 1 / virtual) * slowest + total / virtual + sync)
        return best

    def _least(self, kind: int, row: int) -> float:
        return min(float(o.prices[row].min()) for (other, _), o in self.options.items() if other == kind)

    @cached_property
    def undominated(self) -> dict[tuple[int, bool | None], Options]:
        """Options without those that another one of the same layout beats in everything."""
        return {key: options.undominated() for key, options in self.options.items()}

    @cached_property
    def relaxed(self) -> dict[tuple[int, bool | None], Options]:
        """Options as if resharding were free."""
        return {key: o.with_one_layout().undominated() for key, o in self.undominated.items()}

    @cached_property
    def reshard(self) -> np.ndarray:
        """Seconds between any two layouts, [K, K]."""
        representative = {s.layout: s for s in self.bases}
        for options in self.options.values():
            representative.update((s.layout, s) for s in options.strategies)
        by_id = [representative[layout] for layout in self._layout_ids]
        price = self.cost_model.reshard_seconds
        return np.array([[price(0, a, b, self.any_setting) for b in by_id] for a in by_id], dtype=np.float64)

    def live(self, virtual_stages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Live micro-batches of every rank and chunk [P, v], their distinct rows [D, v] and row numbers [P]."""
        found = self._live.get(virtual_stages)
        if found is None:
            outer = self.outer
            rows = [
                live_micro_batches(outer.pp, position, outer.micro_batches, virtual_stages)
                for position in range(outer.pp)
            ]
            number = {row: index for index, row in enumerate(sorted(set(rows)))}
            found = (
                np.array(rows, dtype=np.float64),
                np.array(list(number), dtype=np.float64),
                np.array([number[row] for row in rows], dtype=np.intp),
            )
            self._live[virtual_stages] = found
        return found

    def spans(self, virtual_stages: int) -> tuple[Spans, ...]:
        """Families of partitions."""
        found = self._spans.get(virtual_stages)
        if found is None:
            found = tuple(all_spans(self.kinds, self.outer.pp, virtual_stages, self.request.constraints))
            self._spans[virtual_stages] = found
        return found

    def ends(self, virtual_stages: int, base: Strategy) -> tuple[LayerCost, LayerCost]:
        """Prices of embedding and head."""
        found = self._ends.get((virtual_stages, base))
        if found is None:
            setting = setting_of(self.outer, virtual_stages, base)
            found = self.cost_model.embedding_cost(setting), self.cost_model.head_cost(setting)
            self._ends[virtual_stages, base] = found
        return found

    def positions(self, virtual_stages: int, base: Strategy | None) -> tuple[np.ndarray, Positions]:
        """Distinct rows of live micro-batches, and what differs between ranks; without a base, only memory."""
        found = self._positions.get((virtual_stages, base))
        if found is None:
            found = self._positions[virtual_stages, base] = self._priced_positions(virtual_stages, base)
        return found

    def _priced_positions(self, virtual_stages: int, base: Strategy | None) -> tuple[np.ndarray, Positions]:
        outer, pp = self.outer, self.outer.pp
        live, distinct, classes = self.live(virtual_stages)
        budget = np.full(pp, float(self.request.memory_bytes))
        seconds, sync, transient = np.zeros(pp), np.zeros(pp), np.zeros(pp)
        if base is not None:
            setting = setting_of(outer, virtual_stages, base)
            budget -= [self.cost_model.overhead_bytes(setting, position) for position in range(pp)]
            send = self.cost_model.send_seconds(setting)
            seconds += send * virtual_stages
            seconds[-1] -= send
            if pp == 1:
                seconds[-1] = 0.0
            for cost, position, chunk in zip(self.ends(virtual_stages, base), (0, -1), (0, -1), strict=True):
                seconds[position] += cost.micro_batch_seconds
                sync[position] += cost.sync_seconds
                transient[position] = max(transient[position], cost.transient_bytes)
                budget[position] -= cost.state_bytes + live[position, chunk] * cost.activation_bytes
            if pp == 1:
                seconds, sync = seconds + sync / outer.micro_batches, np.zeros(1)
        return distinct, Positions(
            classes=classes,
            budget=budget,
            seconds=seconds,
            sync=sync,
            transient=transient,
            host=np.full(pp, np.inf),
        )

    def chain(
        self,
        options: dict[tuple[int, bool | None], Options],
        virtual_stages: int,
        live: np.ndarray,
        positions: Positions,
        base: Strategy | None,
    ) -> tuple[Chain, dict[tuple, int]]:
        """Builds the shortest-path problem of all ranks.

        Args:
            options: of every kind of layer.
            virtual_stages: v.
            live: [D, v] distinct rows of live micro-batches.
            positions: the ranks of the pipeline.
            base: base layout, or None where resharding is free.
        """
        outer = self.outer
        used = sorted({int(layout) for o in options.values() for layout in o.layouts})
        home = None if base is None else self._layout_ids[base.layout]
        if home is not None and home not in used:
            used.append(home)
        if base is None or len(used) == 1:
            reshard = np.zeros((len(used), len(used)))
        else:
            reshard = self.reshard[np.ix_(used, used)]
        place = np.zeros(len(self._layout_ids), dtype=np.intp)
        place[used] = np.arange(len(used))
        elements, chunks, element_of = [], [], {}
        for chunk in range(virtual_stages):
            for (kind, forced), entry in options.items():
                element_of[kind, chunk, forced] = len(elements)
                once = self._priced_once(entry)
                elements.append(
                    Options(strategies=once.strategies, layouts=place[once.layouts], prices=once.prices)
                )
                chunks.append(chunk)
        choice = max(len(o.strategies) for o in options.values()) > 1
        kappas: tuple[float, ...] = ()
        if outer.pp > 1 and choice:
            weight = outer.micro_batches - 1 / virtual_stages
            natural = 1 / weight if weight > 0 else float(virtual_stages)
            kappas = tuple(dict.fromkeys((natural, (natural * virtual_stages) ** 0.5, float(virtual_stages))))
        beta = np.zeros((0, len(live)))
        if choice:
            beta = self._multipliers(options, virtual_stages, live, positions)
        chain = Chain(elements, chunks, reshard, 0 if home is None else place[home], live, beta, kappas)
        return chain, element_of

    def _priced_once(self, options: Options) -> Options:
        """Without a pipeline, T = m t + y: synchronisation is time spread over the micro-batches."""
        if self.outer.pp > 1:
            return options
        prices = options.prices.copy()
        prices[0] += prices[1] / self.outer.micro_batches
        prices[1] = 0.0
        return Options(strategies=options.strategies, layouts=options.layouts, prices=prices)

    def _multipliers(
        self, options: dict, virtual_stages: int, live: np.ndarray, positions: Positions
    ) -> np.ndarray:
        """Memory multipliers [J, D] for the numbers of layers that a rank is likely to hold."""
        kinds = sorted({kind for kind, _ in options})
        flag = next(iter(options))[1]
        chosen = [self._priced_once(options[kind, flag]) for kind in kinds]
        least = min(float(o.transient.min()) for o in chosen)
        spare = np.full(len(live), np.inf)
        np.minimum.at(spare, positions.classes, positions.budget - np.maximum(positions.transient, least))
        average = live.mean(1)
        layers = len(self.kinds) / self.outer.pp
        counts = sorted({max(1, int(layers)), -int(-layers // 1), int(layers) + 1, int(layers * 1.25) + 1})
        if self.outer.pp == 1:
            counts = [len(self.kinds)]
        picked = np.unique(np.linspace(0, len(average) - 1, min(_MOST_CLASSES, len(average))).astype(int))
        table = {}
        for index in picked:
            table[index] = memory_multipliers(
                [o.state + average[index] * o.activation for o in chosen],
                [o.seconds for o in chosen],
                self.shares,
                [spare[index] * share / count for count in counts for share in (1.0, 0.97)],
            )
        nearest = [picked[np.abs(average[picked] - value).argmin()] for value in average]
        return np.array([table[index] for index in nearest]).T

    def relaxed_bound(self, virtual_stages: int, cutoff: float) -> float:
        """Bound of the step time under the memory budget, for any base layout and free resharding.

        Also notes which strategies a plan faster than the cutoff may use at all.
        """
        live, positions = self.positions(virtual_stages, None)
        _, likely = self.positions(virtual_stages, self.bases[0])
        chain, element_of = self.chain(self.relaxed, virtual_stages, live, likely, None)
        self._relaxed_chains[virtual_stages] = (chain, element_of)
        keep = {key: np.zeros(len(options.strategies), dtype=bool) for key, options in self.undominated.items()}
        least = np.inf
        for spans in self.spans(virtual_stages):
            problem = PipelineProblem(
                chain,
                spans,
                positions,
                element_of,
                self.outer.micro_batches,
                cutoff / self.outer.micro_batches,
                self._numbered,
            )
            bound = problem.lower_bound()
            least = min(least, bound)
            if bound < cutoff:
                for (kind, chunk, forced), element in element_of.items():
                    candidates = self._priced_once(self.undominated[kind, forced])
                    keep[kind, forced] |= problem.useful(element, chunk, candidates, cutoff)
        self._useful[virtual_stages] = {
            key: options.take(np.flatnonzero(keep[key])) for key, options in self.undominated.items()
        }
        return least

    def useful_bases(self, virtual_stages: int) -> list[Strategy]:
        """Bases without those whose embedding and head another one of the same layout equals or beats."""
        kept: list[tuple[Strategy, np.ndarray]] = []
        for base in self.bases:
            setting = setting_of(self.outer, virtual_stages, base)
            priced = [checked(cost, "") for cost in self.ends(virtual_stages, base)]
            rows = HOST_ROW + (self.request.host_bytes is not None)
            ends = [value for row in priced for value in row[:rows]]
            rest = [self.cost_model.overhead_bytes(setting, position) for position in range(self.outer.pp)]
            price = np.array([*ends, self.cost_model.send_seconds(setting), *rest])
            if any(s.layout == base.layout and (p <= price).all() for s, p in kept):
                continue
            kept = [(s, p) for s, p in kept if s.layout != base.layout or not (price <= p).all()]
            kept.append((base, price))
        return [base for base, _ in kept]

    def base_bound(self, relaxed: float, virtual_stages: int, base: Strategy) -> float:
        """Adds to a bound without base layout what embedding, head and sends cost at least."""
        outer = self.outer
        embedding, head = self.ends(virtual_stages, base)
        seconds = embedding.micro_batch_seconds + head.micro_batch_seconds
        if outer.pp == 1:
            return relaxed + outer.micro_batches * seconds + embedding.sync_seconds + head.sync_seconds
        send = self.cost_model.send_seconds(setting_of(outer, virtual_stages, base))
        return relaxed + (seconds + send * (outer.pp * virtual_stages - 1)) / virtual_stages

    def placed_bound(self, virtual_stages: int, base: Strategy, cutoff: float) -> float:
        """Bound of the step time with everything a base layout costs but resharding; cheaper than ``solve``."""
        chain, element_of = self._relaxed_chains[virtual_stages]
        _, positions = self.positions(virtual_stages, base)
        if positions.budget.min() < 0:
            return np.inf
        micro_batches = self.outer.micro_batches
        least = np.inf
        for spans in self.spans(virtual_stages):
            problem = PipelineProblem(
                chain,
                spans,
                positions,
                element_of,
                micro_batches,
                cutoff / micro_batches,
                self._numbered,
            )
            least = min(least, problem.lower_bound())
        return least

    def solve(
        self,
        virtual_stages: int,
        base: Strategy,
        cutoff: float,
        options: dict[tuple[int, bool | None], Options] | None = None,
        deadline: float = np.inf,
    ) -> Plan | None:
        """Finds the best plan in one setting.

        Args:
            virtual_stages: v.
            base: base layout with the ZeRO stage of embedding and head.
            cutoff: only plans faster than this many seconds are wanted.
            options: strategies to choose from; by default all.
            deadline: reading of ``time.perf_counter`` behind which the best plan so far is the answer.
        """
        shared = options is None
        if shared:
            options = self._useful.get(virtual_stages, self.undominated)
        if not all(len(entry.strategies) for entry in options.values()):
            return None
        live, positions = self.positions(virtual_stages, base)
        if positions.budget.min() < 0:
            return None
        # Base layouts that differ in the ZeRO stage of embedding and head share what is known about stages.
        key = (virtual_stages, base.layout)
        if not shared:
            chain, element_of = self.chain(options, virtual_stages, live, positions, base)
        elif key in self._chains:
            chain, element_of = self._chains[key]
        else:
            chain, element_of = self._chains[key] = self.chain(options, virtual_stages, live, positions, base)
        time_limit = cutoff / self.outer.micro_batches  # T >= m * max(t)
        best: tuple[Partition, Spans] | None = None
        shares = self._host_shares(virtual_stages, base)
        for spans in self.spans(virtual_stages):

            def problem(host: np.ndarray, spans: Spans = spans) -> PipelineProblem:
                return PipelineProblem(
                    chain,
                    spans,
                    replace(positions, host=host),
                    element_of,
                    self.outer.micro_batches,
                    time_limit,
                    self._numbered,
                    deadline,
                )

            try:
                if shares is None:
                    found = problem(positions.host).solve(cutoff)
                else:
                    found = shares.solve(problem, cutoff)
            except LateError:
                break
            if found is not None:
                cutoff = found.step_seconds
                best = (found, spans)
        if shares is not None:
            self.unproven = min(self.unproven, shares.unproven)
        return None if best is None else self.plan(*best, virtual_stages, base, options)

    def _host_shares(self, virtual_stages: int, base: Strategy) -> HostShares | None:
        """The limit of host memory, None where there is none."""
        if self.request.host_bytes is None:
            return None
        ends = np.zeros(self.outer.pp)
        for position, cost in zip((0, -1), self.ends(virtual_stages, base), strict=True):
            ends[position] += cost.host_bytes
        request = self.request
        return HostShares(self.outer.ranks, request.devices_per_node, request.host_bytes, ends)

    def plan(
        self, partition: Partition, spans: Spans, virtual_stages: int, base: Strategy, options: dict
    ) -> Plan:
        """Writes a partition out as a plan."""
        pp = self.outer.pp
        layers = self.request.model.layers
        stages: list[StagePlan | None] = [None] * (pp * virtual_stages)
        for position in range(pp):
            begin, end = partition.cuts[position], partition.cuts[position + 1]
            choices = iter(partition.assignments[position].choices)
            entries = [entry for entry in spans.sequence(begin, end) if isinstance(entry, tuple)]
            chosen = [(kind, forced, next(choices)) for kind, _, forced in entries]
            at = 0
            for chunk, (first, last) in enumerate(spans.ranges(begin, end)):
                part = _grouped(chosen[at : at + last - first], options)
                at += last - first
                stages[chunk * pp + position] = StagePlan(
                    layers=tuple(
                        LayerPlan(
                            kind=layers[first + offset].kind, strategy=options[kind, forced].strategies[choice]
                        )
                        for offset, (kind, forced, choice) in enumerate(part)
                    )
                )
        return Plan(
            pp=pp,
            virtual_stages=virtual_stages,
            micro_batch_size=self.outer.samples // base.dp,
            micro_batches=self.outer.micro_batches,
            base=base,
            stages=tuple(stages),
        )


def _grouped(chosen: list[tuple], options: dict) -> list[tuple]:
    """Sorts the strategies of neighbours of one kind and one layout; the price does not change."""
    found: list[tuple] = []
    start = 0
    while start < len(chosen):
        kind, forced, choice = chosen[start]
        layouts = options[kind, forced].layouts
        end = start
        while (
            end < len(chosen)
            and chosen[end][:2] == (kind, forced)
            and layouts[chosen[end][2]] == layouts[choice]
        ):
            end += 1
        # The strategies that save memory come first, as Megatron's own block recomputation has it.
        found += sorted(chosen[start:end], key=lambda entry: entry[2], reverse=True)
        start = end
    return found
