"""The measured cost model: prices layers from a profile of the live ranks."""

from functools import cached_property, lru_cache

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.compute import element_bytes
from galvatron_megatron.cost.measured_points import NOT_MEASURED, CurveTable, PartCost, PartTable
from galvatron_megatron.cost.measured_states import StatePrices
from galvatron_megatron.cost.memory import parameter_bytes
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.protocol import LayerCost, Setting
from galvatron_megatron.cost.resharding import Layout, reshard_transfer
from galvatron_megatron.cost.sharded_states import (
    EMBEDDING_AT_USE,
    HEAD_AT_USE,
    AtUse,
    Sent,
    layer_at_use,
)
from galvatron_megatron.cost.sharding import BACKWARD, FORWARD
from galvatron_megatron.cost.terms import PricedLayer, Term
from galvatron_megatron.describe.cluster import Cluster
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.profile import EMBEDDING, HEAD, Profile
from galvatron_megatron.describe.profile_key import layer_digest
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy

UNAVAILABLE_BYTES = 2**49
"""Transient bytes of a setting that cannot run or was not measured: more than any device has, so that no plan
with it ever fits, whatever its time."""


_STEP_REDUCTIONS = 3
_STEP_REDUCTION_BYTES = 8


class MeasuredCostModel:
    """Prices what a profile has measured; implements the ``CostModel`` protocol.

    A strategy that was not measured (context parallelism), that Megatron refused or that ran out of memory
    never fits; ``refusals`` tells which ones were asked for and why. ZeRO 2 and 3 compute what was measured and
    send what the runtime sends. Terms are tagged ``measured``, or ``modelled`` where a micro-batch is larger
    than any measured one and where another strategy's measurement stands for this one's.

    Args:
        model: what to train.
        cluster: of the live ranks.
        profile: measured for the model's shape.
        options: switches of the job; Megatron's defaults where not given.

    Raises:
        DescriptionError: the profile lacks the optimizer or a device's speeds.
    """

    def __init__(
        self, model: Model, cluster: Cluster, profile: Profile, options: RunOptions | None = None
    ) -> None:
        if not profile.steps:
            raise DescriptionError("profile: no optimizer step was measured; valid: a complete profile")
        self.model = model
        self.cluster = cluster
        self.profile = profile
        self.options = options or RunOptions()
        self.refusals: dict[str, str] = {}
        """Setting that cannot be priced -> why."""
        self._parts = PartTable(profile)
        self._curves = CurveTable(profile)
        self._element = parameter_bytes(model.precision, self.options)
        self._digests = tuple(layer_digest(layer) for layer in model.layers)
        self._layer = lru_cache(maxsize=None)(self._price_layer)
        self._moved = lru_cache(maxsize=None)(self._price_move)
        self._ends = lru_cache(maxsize=None)(self._price_end)
        self._states = StatePrices(profile, self._curves, self._element, self.options, cluster)

    # The protocol.

    def layer_cost(self, layer: int, strategy: Strategy, setting: Setting) -> LayerCost:
        """Prices a layer; see :class:`~galvatron_megatron.cost.protocol.CostModel`."""
        return self.priced_layer(layer, strategy, setting).cost

    def embedding_cost(self, setting: Setting) -> LayerCost:
        """Prices the embedding in the base layout."""
        return self.priced_embedding(setting).cost

    def head_cost(self, setting: Setting) -> LayerCost:
        """Prices final norm, output layer and loss in the base layout."""
        return self.priced_head(setting).cost

    def reshard_seconds(self, layer: int, before: Strategy, after: Strategy, setting: Setting) -> float:
        """Time to move one micro-batch's activations between two layouts, forward and backward.

        The runtime moves them in one all-to-all of the smallest group of consecutive ranks that holds both
        layouts, so that is the curve it is read off. Where the profile has none, its links say it.
        """
        if before.layout == after.layout:
            return 0.0
        if self.reshard_source(before, after) == "modelled":
            return self._analytic.reshard_seconds(layer, before, after, setting)
        return self._moved(before.layout, after.layout, setting.micro_batch_samples)

    def reshard_source(self, before: Strategy, after: Strategy) -> str:
        """``measured`` where the profile has the all-to-all of the move, else ``modelled``."""
        moves = ((before.layout, after.layout), (after.layout, before.layout))
        groups = {reshard_transfer(*move).group_ranks for move in moves}
        known = all(ranks == 1 or self._curves.find("all_to_all", ranks, 1) for ranks in groups)
        return "measured" if known else "modelled"

    def has_optimizer(self, zero: int) -> bool:
        """Whether an optimizer was measured that tells the time of a ZeRO stage."""
        return self._states.has_step(Strategy(zero=zero))

    @property
    def prices_ulysses(self) -> bool:
        """Whether layers under Ulysses were measured."""
        return self._parts.has_exchanges

    @property
    def prices_offloading(self) -> bool:
        """Whether a step over states in host memory was measured, and the way there."""
        return self._states.has_step(Strategy(zero=1, offload=Offload.OPTIMIZER))

    @property
    def send_source(self) -> str:
        """Where the price of a pipeline send comes from."""
        return "measured"

    def send_seconds(self, setting: Setting) -> float:
        """Pipeline send of one micro-batch's activation and of its gradient over one boundary."""
        if setting.pp == 1:
            return 0.0
        base = setting.base
        spread = base.tp if base.sequence_parallel is not SequenceParallel.NONE else 1
        tokens = setting.micro_batch_size * self.model.seq_length // (base.cp * spread)
        message = tokens * self.model.hidden_size * element_bytes(self.model.precision)
        return 2 * self._curves.seconds("send", message, 2, base.ranks)

    def overhead_bytes(self, setting: Setting, position: int) -> int:
        """Driver context and communication libraries of a rank."""
        return self._analytic.overhead_bytes(setting, position)

    def slack_share(self) -> float:
        """Part of a transient's bytes that is allocator slack."""
        return self._analytic.slack_share()

    def workspace_bytes(self) -> int:
        """Library workspaces inside the allocator."""
        return self._analytic.workspace_bytes()

    def context_bytes(self) -> int:
        """Driver context and communication libraries, outside the allocator."""
        return self._analytic.context_bytes()

    # Prices with their terms.

    def priced_layer(self, layer: int, strategy: Strategy, setting: Setting) -> PricedLayer:
        """Prices a layer term by term."""
        samples = setting.micro_batch_samples // strategy.dp
        return self._layer(self._digests[layer], strategy, samples, setting.pp, self._share(setting))

    def priced_embedding(self, setting: Setting) -> PricedLayer:
        """Prices the embedding term by term."""
        share = self._share(setting)
        return self._ends(EMBEDDING, setting.base, setting.micro_batch_size, setting.pp, share)

    def priced_head(self, setting: Setting) -> PricedLayer:
        """Prices the head term by term."""
        return self._ends(HEAD, setting.base, setting.micro_batch_size, setting.pp, self._share(setting))

    def step_overhead_seconds(self) -> float:
        """Time per step outside all layers: the small all-reduces of Megatron's ``train_step``.

        It reduces the loss over data-parallel ranks and, over model-parallel ranks, whether the update
        succeeded and the gradient norm; the widest all-reduce that was measured stands for each of them.
        """
        curves = [c for c in self.profile.collectives if c.collective == "all_reduce" and c.contention]
        if not curves:
            return 0.0
        widest = max(curves, key=lambda curve: curve.ranks)
        return _STEP_REDUCTIONS * widest.seconds(_STEP_REDUCTION_BYTES)

    def flops_per_sample(self) -> float:
        """Useful operations of one training sample: no recomputation, causal attention counted half."""
        return self._analytic.flops_per_sample()

    # How prices come about.

    @cached_property
    def _analytic(self) -> AnalyticCostModel:
        return AnalyticCostModel(self.model, self.cluster, self.options)

    def _share(self, setting: Setting) -> float:
        """Part of a measured time that CPU ranks take which share processors, while a pipeline runs.

        Layers are measured with all ranks at work. Where o ranks share one processor, a stage that waits in the
        pipeline's fill leaves its time to the others: the step cannot be shorter than its work on all
        processors, m t, nor than its longest path at full speed, (m + P - 1) t / o. The objective charges
        (m + P - 1) t, so a time t is scaled by the larger of m / (m + P - 1) and 1 / o.
        """
        place = self.profile.provenance
        crowd = place.ranks_per_node / place.processors_per_node
        if place.backend != "gloo" or crowd <= 1 or setting.pp == 1:
            return 1.0
        fill = (setting.pp - 1) / setting.virtual_stages
        return max(setting.micro_batches / (setting.micro_batches + fill), 1 / crowd)

    def _find(self, part: str, strategy: Strategy, recompute: Recompute, samples: int) -> PartCost | str:
        kind = strategy.sequence_parallel
        if strategy.cp > 1:
            return NOT_MEASURED
        if strategy != strategy.without_experts:
            return NOT_MEASURED
        if not self._states.has_step(strategy):
            return NOT_MEASURED
        return self._parts.lookup(part, strategy.tp, kind, recompute, samples)

    def _price_move(self, before: Layout, after: Layout, samples: int) -> float:
        total = samples * self.model.seq_length * self.model.hidden_size * element_bytes(self.model.precision)
        seconds = 0.0
        for source, target in ((before, after), (after, before)):
            transfer = reshard_transfer(source, target)
            ranks = transfer.group_ranks
            if transfer.fraction:
                # In a measured all-to-all a rank gets the shares of the others; its own stays where it is.
                message = transfer.fraction * total * ranks / (ranks - 1)
                seconds += self._curves.seconds("all_to_all", message, ranks, 1)
        return seconds

    def _refuse(self, what: str, strategy: Strategy, samples: int, reason: str) -> PricedLayer:
        self.refusals[f"{what}, {strategy}, {samples} samples"] = reason
        cost = LayerCost(
            micro_batch_seconds=0.0,
            sync_seconds=0.0,
            state_bytes=0,
            activation_bytes=0,
            transient_bytes=UNAVAILABLE_BYTES,
        )
        return PricedLayer(
            cost=cost,
            forward_seconds=0.0,
            backward_seconds=0.0,
            micro_batch_terms=(),
            sync_terms=(),
            state_terms=(),
            activation_terms=(),
        )

    def _price_layer(self, digest: str, strategy: Strategy, samples: int, pp: int, share: float) -> PricedLayer:
        found = self._find(digest, strategy, strategy.recompute, samples)
        if isinstance(found, str):
            return self._refuse(f"layer {digest}", strategy, samples, found)
        # A rank reduces and updates all its layers at once: each pays its part of what they pay together.
        together = max(1, len(self._digests) // pp)
        layer = self.model.layers[self._digests.index(digest)]
        whole = self._analytic.whole_parameters(layer, found.parameters, strategy)
        modules = self._modules(digest, strategy, norms=not whole)
        sent = self._states.sent(
            found.parameters * together, strategy, modules=modules * together, whole=whole * together
        )
        sync = [
            Term(name=term.name, value=term.value / together, source=term.source)
            for term in self._sync(found, strategy, together, sent)
        ]
        each = {key: seconds / together for key, seconds in sent.items()}
        at_use = layer_at_use(len(self._digests), pp)
        return self._priced(digest, found, strategy, found.parameters, each, sync, share, at_use, whole=whole)

    def _price_end(self, part: str, base: Strategy, samples: int, pp: int, share: float) -> PricedLayer:
        found = self._find(part, base, Recompute.NONE, samples)
        beside = self._find(self._digests[0], base, Recompute.NONE, samples)
        if isinstance(found, str) or isinstance(beside, str):
            reason = found if isinstance(found, str) else beside
            return self._refuse(part, base, samples, reason)
        parameters, tensors = found.parameters, found.tensors
        copied = borrowed = 0
        if part == HEAD and self.model.tied_embeddings:
            shared = self.model.padded_vocab_size(base.tp) // base.weight_shards * self.model.hidden_size
            if pp > 1:
                # The last stage has the word embedding once more, kept equal by an all-reduce of its gradient.
                copied = shared
                parameters, tensors = parameters + copied, tensors + 1
            else:
                borrowed = shared
        layers = max(1, len(self._digests) // pp)
        own = self._states.sent(parameters, base, modules=self._modules(part, base), borrowed=borrowed)
        others = (beside.parameters * layers, beside.tensors * layers)
        sent, sync = self._states.added(parameters, tensors, others, base, own)
        if copied:
            seconds = self._states.tied_seconds(copied, base.ranks * (pp - 1), base)
            sync.append(Term(name="tied embedding gradient", value=seconds, source="measured"))
        at_use = EMBEDDING_AT_USE if part == EMBEDDING else HEAD_AT_USE
        return self._priced(
            part, found, base, parameters, sent, sync, share, at_use, beside=beside, borrowed=borrowed
        )

    def _priced(
        self,
        part: str,
        found: PartCost,
        strategy: Strategy,
        parameters: int,
        sent: Sent,
        sync: list[Term],
        share: float,
        at_use: AtUse,
        *,
        beside: PartCost | None = None,
        borrowed: int = 0,
        whole: int = 0,
    ) -> PricedLayer:
        what = part if part in (EMBEDDING, HEAD) else "layer"
        computing = (found.forward_seconds, found.backward_seconds)
        # What computes while this part's parameters are gathered.
        before = beside or found
        sharding = [
            Term(name=term.name, value=term.value * share, source=term.source)
            for term in self._states.micro_batch_terms(
                sent, before.forward_seconds, before.backward_seconds, at_use
            )
        ]
        terms = [
            Term(name=f"{what} {phase}", value=seconds * share, source=found.source)
            for phase, seconds in zip((FORWARD, BACKWARD), computing, strict=True)
        ]
        fetching, source = self._states.fetching(parameters, strategy)
        fetching *= share
        engine = [
            Term(name=term.name, value=term.value * share, source=term.source)
            for term in self._states.engine_terms(part, strategy)
        ]
        forward, backward = (
            sum(term.value for term in of_phase) + fetching
            for of_phase in zip(terms, sharding, engine, strict=True)
        )
        sharding += engine
        sharding += [
            Term(name=f"{phase} offloading", value=fetching, source=source) for phase in (FORWARD, BACKWARD)
        ]
        transient = found.transient_bytes + self._states.transient_bytes(
            parameters, strategy, len(self.model.layers), borrowed=borrowed, whole=whole
        )
        slack = 1 + self.cluster.constants.memory_slack
        state = self._states.held_bytes(parameters, strategy, whole=whole)
        kept = round(found.activation_bytes * slack)
        cost = LayerCost(
            micro_batch_seconds=forward + backward,
            sync_seconds=sum(term.value for term in sync),
            state_bytes=state.total,
            activation_bytes=kept,
            transient_bytes=round(transient * slack),
            host_bytes=self._states.host_bytes(parameters, strategy),
        )
        return PricedLayer(
            cost=cost,
            forward_seconds=forward,
            backward_seconds=backward,
            micro_batch_terms=(*terms, *(term for term in sharding if term.value)),
            sync_terms=tuple(term for term in sync if term.value),
            state_terms=(
                Term(name="weights", value=state.weights),
                Term(name="gradients", value=state.gradients),
                Term(name="optimizer states", value=state.optimizer),
            ),
            activation_terms=(Term(name=f"{what} activations", value=kept, source=found.source),),
        )

    def _modules(self, part: str, strategy: Strategy, *, norms: bool = True) -> int:
        """Modules of a part that gather their parameters by themselves."""
        if strategy.zero < 3:
            return 1
        number = part if part in (EMBEDDING, HEAD) else self._digests.index(part)
        return self._analytic.sharded_modules(number, norms=norms)

    def _sync(self, found: PartCost, strategy: Strategy, count: int, sent: Sent) -> list[Term]:
        """Once-per-step terms of ``count`` layers together."""
        terms = self._states.overlapped(
            self._states.once_per_step(found.parameters * count, found.tensors * count, strategy, sent),
            found.forward_seconds * count,
            found.backward_seconds * count,
        )
        if strategy.sequence_parallel is SequenceParallel.MEGATRON:
            replicated = self._replicated(found.parameters, strategy.tp) * count
            seconds = self._states.partial_seconds(replicated, strategy)
            terms.append(Term(name="replicated gradients over tp", value=seconds, source="measured"))
        return terms

    def _replicated(self, parameters: int, tp: int) -> int:
        """Parameters of a layer that every rank of the tp group holds.

        With s split and r replicated ones, P(1) = s + r and P(tp) = s / tp + r.
        """
        whole = next((p.parameters for p in self._same_layer(parameters, tp) if p.tp == 1), None)
        if whole is None:
            return 0
        return max(0, round((tp * parameters - whole) / (tp - 1)))

    def _same_layer(self, parameters: int, tp: int) -> list:
        parts = {p.part for p in self.profile.parts if p.tp == tp and p.parameters == parameters}
        return [p for p in self.profile.parts if p.part in parts and not p.failure]
