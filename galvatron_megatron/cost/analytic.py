"""The analytic cost model: prices layers from counts, a device's constants and the links of a cluster."""

from dataclasses import replace
from functools import cached_property, lru_cache

from galvatron_megatron.cost.communication import collective_seconds
from galvatron_megatron.cost.compute import (
    BACKWARD_PHASES,
    FORWARD_PHASES,
    element_bytes,
    operator_seconds,
)
from galvatron_megatron.cost.count_source import ClosedForms, CountSource, counted_strategy
from galvatron_megatron.cost.counts_values import LayerCounts
from galvatron_megatron.cost.memory import held_bytes, parameter_bytes, parameter_shares
from galvatron_megatron.cost.offload import (
    host_bytes,
    host_traffic,
    link_seconds,
    link_source,
)
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.overlap import exposed_seconds
from galvatron_megatron.cost.phase_work import PhaseWork, exchanges, phase_work
from galvatron_megatron.cost.protocol import LayerCost, Setting
from galvatron_megatron.cost.resharding import reshard_transfer
from galvatron_megatron.cost.sharded_states import (
    EMBEDDING_AT_USE,
    HEAD_AT_USE,
    AtUse,
    layer_at_use,
    micro_batch_seconds,
    partial_sum,
    sent_collectives,
    sent_seconds,
    tied_sum,
    transient_bytes,
)
from galvatron_megatron.cost.sharding import embedding_modules, gathered_modules, whole_parameters
from galvatron_megatron.cost.step_terms import step_terms
from galvatron_megatron.cost.terms import PricedLayer, Term
from galvatron_megatron.describe.cluster import MICROSECOND, Cluster
from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.describe.profile import EMBEDDING, HEAD
from galvatron_megatron.plan.strategy import Offload, SequenceParallel, Strategy

_SETTINGS = 2
"""Matrices decay, vectors do not; the embedding has no vectors."""


class AnalyticCostModel:
    """Prices every layer under every strategy without a device; implements the ``CostModel`` protocol.

    Args:
        model: what to train.
        cluster: on what.
        options: switches of the job; Megatron's defaults where not given.
        counts: of operators, collectives and kept bytes; closed forms where not given.
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        options: RunOptions | None = None,
        counts: CountSource | None = None,
    ) -> None:
        self.model = model
        self.cluster = cluster
        self.options = options or RunOptions()
        self._closed = ClosedForms(model, self.options.implementation)
        self._counts: CountSource = counts or self._closed
        self._factors = {(flops, size, sent): factor for flops, size, sent, factor in cluster.layer_factors}
        self._phases: dict[tuple, tuple[LayerCounts, PhaseWork]] = {}
        self._priced = lru_cache(maxsize=None)(self._price_layer)
        self._embedding = lru_cache(maxsize=None)(self._price_embedding)
        self._head = lru_cache(maxsize=None)(self._price_head)
        self._moved = lru_cache(maxsize=None)(self._price_move)

    # The protocol.

    def layer_cost(self, layer: int, strategy: Strategy, setting: Setting) -> LayerCost:
        """Prices a layer; see :class:`~galvatron_megatron.cost.protocol.CostModel`."""
        return self.priced_layer(layer, strategy, setting).cost

    def embedding_cost(self, setting: Setting) -> LayerCost:
        """Prices the embedding in the base layout."""
        return self._embedding(setting).cost

    def head_cost(self, setting: Setting) -> LayerCost:
        """Prices final norm, output layer and loss in the base layout."""
        return self._head(setting).cost

    def reshard_seconds(self, layer: int, before: Strategy, after: Strategy, setting: Setting) -> float:
        """Time to move one micro-batch's activations between two layouts, forward and backward."""
        if before.layout == after.layout:
            return 0.0
        return self._moved(before.layout, after.layout, setting.micro_batch_samples)

    def reshard_source(self, before: Strategy, after: Strategy) -> str:
        """Where the price of a change of layout comes from."""
        return "modelled"

    @property
    def send_source(self) -> str:
        """Where the price of a pipeline send comes from."""
        return "modelled"

    def send_seconds(self, setting: Setting) -> float:
        """Pipeline send of one micro-batch's activation and of its gradient over one boundary.

        Every rank sends its own tile; a boundary counts as one between nodes where any boundary of the
        pipeline is.
        """
        if setting.pp == 1:
            return 0.0
        base = setting.base
        spread = base.tp if base.sequence_parallel is not SequenceParallel.NONE else 1
        tokens = setting.micro_batch_size * self.model.seq_length // (base.cp * spread)
        message = tokens * self.model.hidden_size * element_bytes(self.model.precision)
        stride = base.ranks
        if setting.pp * stride > self.cluster.devices_per_node:
            stride = max(stride, self.cluster.devices_per_node)
        gathered = 0.0
        if self.options.scatter_gather_sends and spread < base.tp:
            gathered = collective_seconds("all_gather", message, base.tp, 1, self.cluster)
            message //= base.tp
        return 2 * (gathered + collective_seconds("send", message, 2, stride, self.cluster))

    def overhead_bytes(self, setting: Setting, position: int) -> int:
        """Library workspaces, driver context and communication libraries of a rank."""
        return self.workspace_bytes() + self.context_bytes()

    def slack_share(self) -> float:
        """Part of a transient's bytes that is allocator slack."""
        slack = self.cluster.constants.memory_slack
        return slack / (1 + slack)

    def workspace_bytes(self) -> int:
        """Library workspaces inside the allocator."""
        return int(self.cluster.constants.workspace_mib * 2**20)

    def context_bytes(self) -> int:
        """Driver context and communication libraries, outside the allocator."""
        return int(self.cluster.constants.context_gib * 2**30)

    # Prices with their terms.

    def priced_layer(self, layer: int, strategy: Strategy, setting: Setting) -> PricedLayer:
        """Prices a layer term by term."""
        # With how many others a layer shares a stage counts only where others have its parameters as well.
        pp = setting.pp if strategy.ranks > 1 else 1
        return self._priced(self.model.layers[layer], strategy, setting.micro_batch_samples, pp)

    def priced_embedding(self, setting: Setting) -> PricedLayer:
        """Prices the embedding term by term."""
        return self._embedding(setting)

    def priced_head(self, setting: Setting) -> PricedLayer:
        """Prices the head term by term."""
        return self._head(setting)

    def step_overhead_seconds(self) -> float:
        """Time per step outside all layers: data, logging, synchronisation with the host."""
        return self.cluster.constants.step_ms * 1e-3

    def operator_seconds(
        self, layer: int, strategy: Strategy, setting: Setting
    ) -> dict[str, tuple[float, float]]:
        """Seconds of every operator of a layer for one micro-batch: name -> (forward, backward).

        Tensor-parallel collectives count with the operator they follow (forward) or precede (backward).
        """
        samples = setting.micro_batch_samples // strategy.dp
        counts = self._counts.layer(self.model.layers[layer], strategy, samples)
        seconds: dict[str, list[float]] = {}
        for operator in counts.operators:
            side = 0 if operator.phase in FORWARD_PHASES else 1
            each = operator_seconds(operator, self.cluster.device, self.cluster.constants, self.model.precision)
            seconds.setdefault(operator.name, [0.0, 0.0])[side] += operator.count * each
        for side, phases in enumerate((FORWARD_PHASES, BACKWARD_PHASES)):
            exposed, _ = exchanges(counts, strategy, phases, self.cluster)
            linears = [name for name in seconds if "projection" in name or "linear" in name]
            for name in linears:
                seconds[name][side] += exposed / len(linears)
        return {name: (pair[0], pair[1]) for name, pair in seconds.items()}

    def layer_work(self, layer: int, strategy: Strategy, setting: Setting) -> tuple[int, int, int]:
        """What ``Cluster.layer_factors`` know a layer's micro-batch by: see ``LayerCounts.work``."""
        samples = setting.micro_batch_samples // strategy.dp
        return self._counts.layer(self.model.layers[layer], strategy, samples).work

    def head_work(self, setting: Setting) -> tuple[int, int, int]:
        """The same of the head."""
        return self._counts.head(setting.base, setting.micro_batch_size).work

    def sharded_modules(self, part: int | str, *, norms: bool = True) -> int:
        """How many modules of a part of the model gather parameters; see ``gathered_modules``.

        Args:
            part: the number of a layer, ``embedding`` or ``head``.
            norms: norms are gathered too.
        """
        if part == EMBEDDING:
            return embedding_modules(self.model)
        if part == HEAD:
            counts = self._closed.head(Strategy(), 1)
        else:
            counts = self._closed.layer(self.model.layers[part], Strategy(), 1)
        return gathered_modules(counts, self.options, norms=norms)

    def whole_parameters(self, layer: Layer, parameters: int, strategy: Strategy) -> int:
        """Parameters of a layer that ZeRO 3 keeps whole; see ``sharding.whole_parameters``.

        Args:
            layer: of the model.
            parameters: of it on a rank.
            strategy: how it runs.
        """
        if strategy.zero < 3:
            return 0
        alone = Strategy(tp=strategy.weight_shards)
        return whole_parameters(self._closed.layer(layer, alone, 1), parameters, strategy, self.options)

    def flops_per_sample(self) -> float:
        """Useful operations of one training sample: no recomputation, causal attention counted half."""
        return self._sample_flops

    # How prices come about.

    @cached_property
    def _sample_flops(self) -> float:
        alone, count = Strategy(), self._closed
        counted = [(count.layer(layer, alone, 1), times) for layer, times in self.model.layer_runs()]
        counted += [(count.embedding(alone, 1), 1), (count.head(alone, 1), 1)]
        return sum(
            times * operator.count * operator.flops * (0.5 if operator.kind == "attention" else 1.0)
            for counts, times in counted
            for operator in counts.operators
        )

    @cached_property
    def _element(self):
        return parameter_bytes(self.model.precision, self.options)

    def _price_layer(self, layer: Layer, strategy: Strategy, samples: int, pp: int) -> PricedLayer:
        counts = self._counts.layer(layer, strategy, samples // strategy.dp)
        whole = self.whole_parameters(layer, counts.parameters, strategy)
        modules = self._gathered(counts, strategy, norms=not whole)
        at_use = layer_at_use(len(self.model.layers), pp)
        heads = layer.attention.head_norm_parameter_count(self.model.normalization) if layer.attention else 0
        partial = _partial_gradients(counts, strategy, heads)
        return self._price(
            counts,
            strategy,
            modules,
            at_use,
            whole=whole,
            partial_gradients=partial,
            together=max(1, len(self.model.layers) // pp),
            settings=_SETTINGS,
        )

    def _price_embedding(self, setting: Setting) -> PricedLayer:
        counts = self._counts.embedding(setting.base, setting.micro_batch_size)
        modules = embedding_modules(self.model)
        return self._price(counts, setting.base, modules, EMBEDDING_AT_USE, before=self._beside_end(setting, 0))

    def _beside_end(self, setting: Setting, layer: int) -> dict[str, float] | None:
        """Seconds of the passes of the layer beside embedding or head, where those gather."""
        if setting.base.zero < 3:
            return None
        found = self.priced_layer(layer, replace(setting.base, zero=0, offload=Offload.NONE), setting)
        return {"forward": found.forward_seconds, "backward": found.backward_seconds}

    def _gathered(self, counts: LayerCounts, strategy: Strategy, *, norms: bool = True) -> int:
        return gathered_modules(counts, self.options, norms=norms) if strategy.zero == 3 else 1

    def _price_head(self, setting: Setting) -> PricedLayer:
        counts = self._counts.head(setting.base, setting.micro_batch_size)
        tied = self.model.tied_embeddings
        return self._price(
            counts,
            setting.base,
            self._gathered(counts, setting.base),
            HEAD_AT_USE,
            before=self._beside_end(setting, len(self.model.layers) - 1),
            shared_weight=counts.parameters_sharded if tied and setting.pp == 1 else 0,
            copied_weight=counts.parameters_sharded if tied and setting.pp > 1 else 0,
            copy_stride=setting.base.ranks * (setting.pp - 1),
            partial_gradients=_partial_gradients(counts, setting.base),
            settings=_SETTINGS,
        )

    def _price(
        self,
        counts: LayerCounts,
        strategy: Strategy,
        modules: int,
        at_use: AtUse,
        *,
        before: dict[str, float] | None = None,
        shared_weight: int = 0,
        copied_weight: int = 0,
        copy_stride: int = 1,
        whole: int = 0,
        partial_gradients: int = 0,
        together: int = 1,
        settings: int = 1,
    ) -> PricedLayer:
        """Prices counts.

        Args:
            counts: of one micro-batch on one rank.
            strategy: how the layer runs.
            modules: that gather parameters under ZeRO 3.
            at_use: which of these are not gathered ahead.
            before: seconds of the passes of what computes while the others are; its own where not given.
            shared_weight: parameters that are the embedding's own (tied, same rank): no state of their own.
            copied_weight: parameters kept equal with the first stage's by one more all-reduce.
            copy_stride: distance between the first and the last stage's ranks.
            whole: parameters that ZeRO 3 keeps whole.
            partial_gradients: parameters whose gradients tp ranks compute in part.
            together: how many parts of the stage are reduced and updated at once; embedding and head, whose
                classes no layer may share, are charged with messages of their own.
            settings: groups of its parameters with optimizer settings of their own.
        """
        cluster, constants = self.cluster, self.cluster.constants
        parameters = counts.parameters - shared_weight
        instances = self.options.optimizer_instances if strategy.zero else 1
        shares = parameter_shares(parameters, counts.parameters_expert, strategy, instances)
        element = self._element
        traffic = host_traffic(shares, strategy, element)
        sharding = sent_collectives(
            shares,
            strategy,
            element,
            self.options,
            modules=modules,
            borrowed=shared_weight,
            whole=whole,
            together=together,
            settings=settings,
        )
        partial = partial_sum(partial_gradients, shares[0], strategy, element, self.options, together)
        tied = tied_sum(copied_weight, copy_stride, shares[0], strategy, element, self.options)
        sent = sent_seconds(sharding, self._collective_seconds)

        factor = self._factors.get(counts.work, 1.0) if self._factors else 1.0
        phases, terms = {}, []
        for name, wanted in (("forward", FORWARD_PHASES), ("backward", BACKWARD_PHASES)):
            done = self._phase_work(counts, strategy, wanted)
            work, exchanged, hidden, dispatch = done.work, done.exchanged, done.hidden, done.dispatch
            issued, busy = done.issued, work.device
            if self.options.overlap_tensor_parallel:
                exchanged, hidden = dispatch, hidden + exchanged - dispatch
            communication = exchanged + exposed_seconds(hidden, work.gemm, constants.overlap_slowdown)
            waiting = max(0.0, issued - busy - communication)
            correction = (factor - 1) * (busy + communication + waiting)
            total = busy + communication + waiting + correction
            computing = total if before is None else before[name]
            sharded = micro_batch_seconds(
                name, computing, sent, self.options, constants.overlap_slowdown, at_use
            )
            terms += [
                Term(name=f"{name} GEMM", value=work.gemm, source=counts.source),
                Term(name=f"{name} attention", value=work.attention, source=counts.source),
                Term(name=f"{name} memory-bound", value=work.memory, source=counts.source),
                Term(
                    name=f"{name} tensor and context parallel",
                    value=communication - dispatch,
                    source=counts.source,
                ),
                Term(name=f"{name} expert parallel", value=dispatch, source=counts.source),
                Term(name=f"{name} host issue", value=waiting, source=counts.source),
                Term(name=f"{name} measured beside the constants", value=correction, source="measured"),
                Term(name=f"{name} sharded parameters", value=sharded),
            ]
            phases[name] = total + sharded
        fetched = link_seconds(traffic.fetched_per_pass, cluster)
        for name in phases:
            terms.append(Term(name=f"{name} offloading", value=fetched, source=link_source(cluster)))
            phases[name] += fetched
        summed = sum(entry.seconds(self._collective_seconds) for entry in partial)
        sync = step_terms(shares, strategy, sent, phases, element, self.options, cluster, summed)
        sync += [
            Term(name="tied embedding gradient", value=entry.seconds(self._collective_seconds))
            for entry in tied
        ]
        state = held_bytes(shares, strategy, element, self.options, whole=whole)
        state_terms = (
            Term(name="weights", value=state.weights),
            Term(name="gradients", value=state.gradients),
            Term(name="optimizer states", value=state.optimizer),
        )
        kept = tuple(
            Term(name=f"activations: {name}", value=size, source=counts.source)
            for name, size in counts.activation_terms
        )
        slack = int(counts.activation_bytes * constants.memory_slack)
        transient = counts.transient_bytes
        transient += transient_bytes(
            shares, strategy, element, self.options, len(self.model.layers), borrowed=shared_weight, whole=whole
        )
        cost = LayerCost(
            micro_batch_seconds=phases["forward"] + phases["backward"],
            sync_seconds=sum(term.value for term in sync),
            state_bytes=state.total,
            activation_bytes=counts.activation_bytes + slack,
            transient_bytes=int(transient * (1 + constants.memory_slack)),
            host_bytes=host_bytes(shares, strategy, element),
        )
        return PricedLayer(
            cost=cost,
            forward_seconds=phases["forward"],
            backward_seconds=phases["backward"],
            micro_batch_terms=tuple(term for term in terms if term.value),
            sync_terms=tuple(term for term in sync if term.value),
            state_terms=state_terms,
            activation_terms=kept,
            slack_bytes=slack,
            collectives=(*sharding, *partial, *tied),
        )

    def _phase_work(self, counts: LayerCounts, strategy: Strategy, phases: tuple[str, ...]) -> PhaseWork:
        """Computation and collectives of some phases; the same for every ZeRO stage and number of
        micro-batches."""
        key = (id(counts), counted_strategy(strategy), phases)
        known = self._phases.get(key)
        if known is not None:
            return known[1]
        found = phase_work(counts, strategy, phases, self.cluster, self.model.precision)
        self._phases[key] = (counts, found)  # counts are kept, so that no other object gets their id
        return found

    def _collective_seconds(self, kind: str, message_bytes: float, ranks: int, stride: int) -> float:
        return collective_seconds(kind, message_bytes, ranks, stride, self.cluster)

    def _price_move(self, before: tuple, after: tuple, samples: int) -> float:
        total = samples * self.model.seq_length * self.model.hidden_size * element_bytes(self.model.precision)
        seconds = 0.0
        for source, target in ((before, after), (after, before)):
            transfer = reshard_transfer(source, target)
            inside = transfer.group_ranks <= self.cluster.devices_per_node
            link = self.cluster.intra_node if inside else self.cluster.inter_node
            rate = link.bandwidth(transfer.group_ranks)
            seconds += transfer.fraction * total / rate + (link.base_us + link.latency_us) * MICROSECOND
        return seconds


def _partial_gradients(counts: LayerCounts, strategy: Strategy, head_norms: int = 0) -> int:
    """Parameters that every tp rank has whole but applies to its slice of the sequence, or its heads."""
    if strategy.weight_shards == 1:
        return 0
    split = strategy.sequence_parallel is SequenceParallel.MEGATRON
    return counts.parameters_replicated if split else head_norms
