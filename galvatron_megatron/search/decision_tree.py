"""The space of plans as a tree of decisions, with named rules that cut branches.

From the root: global batch, pipeline degree, micro-batches, virtual stages, base layout; then, for every
layer on its own, tp, sequence parallelism, cp, dp, ZeRO stage, the two degrees of its experts and
recomputation. Degrees are all divisors, not powers of two only. Every rule is a function with a name and a
reason; ``Space.cuts`` counts what each one removed.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product

from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.describe.model import Experts, Layer, Model
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.strategy import LEAST_ZERO, Offload, Recompute, SequenceParallel, Strategy
from galvatron_megatron.search.request import SearchRequest

RULES = {
    "pp_layers": "a pipeline has at most one virtual stage per layer",
    "pp_fixed": "the pipeline degree is fixed by hand",
    "virtual_pp": "virtual stages need a pipeline",
    "virtual_micro_batches": "the interleaved schedule runs micro-batches in groups of pp: pp divides "
    "their number",
    "virtual_layers": "every virtual stage holds a layer",
    "virtual_fixed": "the number of virtual stages is fixed by hand",
    "batch": "micro-batches x micro-batch size x base dp is the global batch exactly",
    "micro_batch_fixed": "the micro-batch size is fixed by hand",
    "tp_node": "a tp group stays inside a node (unless tp_across_nodes)",
    "tp_heads": "tp divides the attention (or Mamba) heads, and the query groups or is a multiple of them",
    "tp_width": "tp divides the feed-forward width of the layer (of its shared experts)",
    "tp_fixed": "tp is fixed by hand",
    "sp_allowed": "this kind of sequence parallelism is switched off or another one is fixed by hand",
    "sp_experts": "experts under tp need the sequence split over the tp group (Megatron refuses them "
    "otherwise)",
    "ulysses_heads": "Ulysses gives every rank whole heads: tp divides heads and query groups",
    "ulysses_kind": "Ulysses is for attention layers; a Mamba layer scans the whole sequence",
    "ulysses_base": "the base layout is what Megatron's own arguments can say: Ulysses is for layers",
    "sequence": "a split sequence has equal parts (2 x cp of them for cp) of at least "
    "min_tokens_per_rank tokens",
    "cp_allowed": "context parallelism is switched off",
    "cp_fixed": "cp is fixed by hand",
    "cp_kind": "a Mamba layer scans the whole sequence",
    "dp_samples": "dp divides the samples of a micro-batch",
    "ep_experts": "expert parallelism divides the experts of the layer (layers without experts have none)",
    "ep_ranks": "expert parallelism x expert tensor parallelism divides the ranks of a stage",
    "ep_width": "expert tensor parallelism divides the feed-forward width of one expert",
    "ep_allowed": "expert parallelism is switched off",
    "ep_fixed": "expert parallelism is fixed by hand",
    "etp_fixed": "expert tensor parallelism is fixed by hand",
    "zero_replicas": "ZeRO needs several ranks that hold the same weights",
    "zero_allowed": "the ZeRO stage is above max_zero or another one is fixed by hand",
    "offload_allowed": "states stay on the device unless offloading is asked for",
    "offload_experts": "states of layers with experts stay on the device",
    "offload_zero": "the host keeps what ZeRO shards: optimizer states need stage 1, weights stage 3",
    "recompute_allowed": "this recomputation is switched off or another one is fixed by hand",
    "recompute_attention": "selective recomputation computes attention again: the layer needs attention",
    "recompute_fused": "fused attention keeps no score matrix, so selective recomputation would save nothing",
}


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


@dataclass(kw_only=True, frozen=True, slots=True)
class Outer:
    """Decisions that fix how every layer is priced."""

    global_batch_size: int
    pp: int
    ranks: int
    """Ranks of a stage."""
    micro_batches: int

    @property
    def samples(self) -> int:
        """Samples of one micro-batch over all ranks of a stage."""
        return self.global_batch_size // self.micro_batches


@dataclass(kw_only=True, slots=True)
class Space:
    """The decision tree of one request."""

    request: SearchRequest
    cuts: Counter = field(default_factory=Counter)
    """Branches each rule cut, counted at the node where it was applied."""
    _strategies: dict = field(default_factory=dict)
    _bases: dict = field(default_factory=dict)

    def outers(self) -> tuple[Outer, ...]:
        """Generates pipeline degrees and micro-batch counts.

        Raises:
            SearchError: no branch is left; names the rule that cut the last ones.
        """
        found = tuple(self._outers())
        if not found:
            raise SearchError(self._empty_message())
        return found

    def _outers(self) -> Iterator[Outer]:
        for batch in self.request.batch_sizes:
            for pp in self._pipeline_degrees():
                ranks = self.request.world_size // pp
                if not self._layouts(ranks):
                    continue
                for micro_batches in divisors(batch):
                    outer = Outer(global_batch_size=batch, pp=pp, ranks=ranks, micro_batches=micro_batches)
                    if self.bases(outer):
                        yield outer

    def _empty_message(self) -> str:
        last = ", ".join(f"{RULES[name]} ({count} cut)" for name, count in self.cuts.most_common(3))
        smallest = self.smallest_batch()
        hint = f"; nearest valid: a batch that is a multiple of {smallest}" if smallest else ""
        freed = self.remedies_by_hand()
        if freed:
            hint += f"; {'or' if hint else 'valid:'} {' or '.join(freed)}"
        return (
            f"search space: empty for {self.request.world_size} devices and global batch "
            f"{self.request.batch_sizes[0]}: {last or 'no degrees'}{hint}"
        )

    def remedies_by_hand(self) -> list[str]:
        """Single decisions made by hand without which the space is not empty, with the values they may take."""
        found = []
        fixed = self.request.constraints
        for name in (entry.name for entry in fields(fixed)):
            if getattr(fixed, name) is None:
                continue
            freed = replace(self.request, constraints=replace(fixed, **{name: None}))
            space = Space(request=freed)
            values: set = set()
            outers = tuple(space._outers())
            for outer in outers:
                for base in space.bases(outer):
                    if name == "pp":
                        values.add(outer.pp)
                    elif name == "micro_batch_size":
                        values.add(outer.samples // base.dp)
                    elif name in ("tp", "cp", "zero"):
                        values.add(getattr(base, name))
            if outers:
                shown = ", ".join(map(str, sorted(values)))
                found.append(
                    f"{name} {shown} instead of {getattr(fixed, name)}" if shown else f"{name} left free"
                )
        return found

    def smallest_batch(self) -> int | None:
        """The smallest data-parallel degree of any base layout: the batch must be a multiple of one."""
        degrees = [
            base.dp
            for pp in self._pipeline_degrees()
            for base in self._all_bases(self.request.world_size // pp)
        ]
        size = self.request.constraints.micro_batch_size or 1
        return min(degrees) * size if degrees else None

    def _pipeline_degrees(self) -> Iterator[int]:
        request = self.request
        fixed = request.constraints.pp
        if fixed is None and request.constraints.stage_layers is not None:
            fixed = len(request.constraints.stage_layers) // (request.constraints.virtual_stages or 1)
        for pp in divisors(request.world_size):
            if pp > len(request.model.layers):
                self.cuts["pp_layers"] += 1
            elif fixed is not None and pp != fixed:
                self.cuts["pp_fixed"] += 1
            else:
                yield pp

    def virtual_stages(self, outer: Outer) -> tuple[int, ...]:
        """Numbers of virtual stages per rank that the schedule allows."""
        request = self.request
        fixed = request.constraints.virtual_stages
        layers = len(request.model.layers)
        found = []
        limit = request.max_virtual_stages if request.allow_interleaving or fixed else 1
        for count in range(1, max(limit, fixed or 1) + 1):
            if fixed is not None and count != fixed:
                self.cuts["virtual_fixed"] += 1
            elif count == 1:
                found.append(count)
            elif outer.pp == 1:
                self.cuts["virtual_pp"] += 1
            elif outer.micro_batches % outer.pp:
                self.cuts["virtual_micro_batches"] += 1
            elif outer.pp * count > layers:
                self.cuts["virtual_layers"] += 1
            else:
                found.append(count)
        return tuple(found)

    def _layouts(self, ranks: int) -> tuple[tuple[int, SequenceParallel, int, int], ...]:
        """(tp, sequence parallelism, cp, dp) that no layer rules out by itself."""
        request = self.request
        fixed = request.constraints
        found = []
        for tp in divisors(ranks):
            if not request.tp_across_nodes and request.devices_per_node % tp:
                self.cuts["tp_node"] += 1
                continue
            if fixed.tp is not None and tp != fixed.tp:
                self.cuts["tp_fixed"] += 1
                continue
            for cp in divisors(ranks // tp):
                if cp > 1 and not request.allow_cp and fixed.cp is None:
                    self.cuts["cp_allowed"] += 1
                    continue
                if fixed.cp is not None and cp != fixed.cp:
                    self.cuts["cp_fixed"] += 1
                    continue
                for kind in SequenceParallel:
                    if tp == 1 and kind is not SequenceParallel.NONE:
                        continue
                    if not self._sequence_parallel_allowed(kind, tp):
                        self.cuts["sp_allowed"] += 1
                    elif not self._sequence_fits(kind, tp, cp):
                        self.cuts["sequence"] += 1
                    else:
                        found.append((tp, kind, cp, ranks // tp // cp))
        return tuple(found)

    def ulysses_degrees(self) -> tuple[int, ...]:
        """Degrees with which some layer may run under Ulysses, rising; none where all layers run alike."""
        request = self.request
        if not request.layerwise:
            return ()
        found = {
            tp
            for pp in self._pipeline_degrees()
            for tp, kind, _, _ in self._layouts(request.world_size // pp)
            if kind is SequenceParallel.ULYSSES
        }
        return tuple(
            tp
            for tp in sorted(found)
            if any(
                tp_rule(layer, request.model, tp, SequenceParallel.ULYSSES) is None
                for layer in set(request.model.layers)
            )
        )

    def _sequence_parallel_allowed(self, kind: SequenceParallel, tp: int) -> bool:
        fixed = self.request.constraints.sequence_parallel
        if fixed is not None and tp > 1:
            return kind is fixed
        if kind is SequenceParallel.MEGATRON:
            return self.request.allow_sequence_parallel
        if kind is SequenceParallel.ULYSSES:
            return self.request.allow_ulysses
        return tp == 1 or self.request.allow_plain_tp

    def _sequence_fits(self, kind: SequenceParallel, tp: int, cp: int) -> bool:
        parts = cp * (tp if kind is not SequenceParallel.NONE else 1)
        length = self.request.model.seq_length
        if parts == 1:
            return True
        chunks = parts * 2 if cp > 1 else parts
        fixed = self.request.constraints
        by_hand = fixed.tp is not None or fixed.cp is not None
        return length % chunks == 0 and (by_hand or length // parts >= self.request.min_tokens_per_rank)

    def _zero_allowed(self, zero: int) -> bool:
        fixed = self.request.constraints.zero
        return zero <= self.request.max_zero if fixed is None else zero == fixed

    def _zero_stages(self, replicas: int) -> Iterator[int]:
        fixed = self.request.constraints.zero
        for zero in range(4):
            if not self._zero_allowed(zero):
                self.cuts["zero_allowed"] += 1
            elif zero and replicas == 1 and fixed is None:
                self.cuts["zero_replicas"] += 1
            else:
                yield zero

    def _shardings(self, replicas: int, offloads: tuple[Offload, ...]) -> Iterator[tuple[int, Offload]]:
        """ZeRO stages with what each may keep on the host.

        A rank that shards with nobody still needs DeepSpeed's classes to offload: the lowest stage will do.

        Args:
            replicas: ranks that hold the same weights.
            offloads: what may be kept on the host.
        """
        self.cuts["offload_allowed"] += sum(kind not in offloads for kind in Offload)
        for zero in self._zero_stages(replicas):
            for offload in offloads:
                least = LEAST_ZERO[offload]
                if zero >= least:
                    yield zero, offload
                elif replicas == 1 and zero == 0 and self._zero_allowed(least):
                    yield least, offload
                else:
                    self.cuts["offload_zero"] += 1

    def recompute_kinds(self, layer: Layer, forced: bool | None = None) -> tuple[Recompute, ...]:
        """Recomputations of a layer.

        Args:
            layer: the layer.
            forced: True where a hand-made decision recomputes this layer, False where it exempts it, None where
                there is none for single layers.
        """
        fixed = self.request.constraints.recompute
        if forced is False:
            return (Recompute.NONE,)
        if fixed is not None:
            return (fixed,)
        found = []
        for kind in Recompute:
            if kind not in self.request.recompute_kinds:
                self.cuts["recompute_allowed"] += 1
            elif kind is Recompute.SELECTIVE and layer.attention is None:
                self.cuts["recompute_attention"] += 1
            elif kind is Recompute.SELECTIVE and self.request.model.fused_attention:
                self.cuts["recompute_fused"] += 1
            else:
                found.append(kind)
        return tuple(found)

    def strategies(
        self, layer: Layer, outer: Outer, forced: bool | None = None, *, on_device: bool = False
    ) -> tuple[Strategy, ...]:
        """All strategies of a layer, the simplest first.

        Args:
            layer: the layer.
            outer: decisions above it.
            forced: see ``recompute_kinds``.
            on_device: the layer keeps nothing in host memory.
        """
        key = (layer, outer.ranks, forced, on_device)
        if key not in self._strategies:
            self._strategies[key] = tuple(self._generate(layer, outer.ranks, forced, on_device))
        found = []
        for strategy in self._strategies[key]:
            if outer.samples % strategy.dp:
                self.cuts["dp_samples"] += 1
            else:
                found.append(strategy)
        return tuple(found)

    def _generate(self, layer: Layer, ranks: int, forced: bool | None, on_device: bool) -> Iterator[Strategy]:
        kinds = self.recompute_kinds(layer, forced)
        offloads = (Offload.NONE,) if on_device else self.request.offloads
        if layer.experts is not None:
            self.cuts["offload_experts"] += len(offloads) - (Offload.NONE in offloads)
            offloads = (Offload.NONE,)
        for tp, kind, cp, dp in self._layouts(ranks):
            rule = tp_rule(layer, self.request.model, tp, kind) or cp_rule(layer, cp)
            if rule is not None:
                self.cuts[rule] += 1
                continue
            replicas = ranks if kind is SequenceParallel.ULYSSES else cp * dp
            shards = 1 if kind is SequenceParallel.ULYSSES else tp
            for (zero, offload), experts in product(
                self._shardings(replicas, offloads),
                self._expert_degrees(layer.experts, shards, ranks),
            ):
                for recompute in kinds:
                    plain = Strategy(
                        tp=tp,
                        sequence_parallel=kind,
                        cp=cp,
                        dp=dp,
                        zero=zero,
                        recompute=recompute,
                        offload=offload,
                    )
                    yield plain if layer.experts is None else replace(plain, **experts)

    def _expert_degrees(self, experts: Experts | None, shards: int, ranks: int) -> tuple[dict[str, int], ...]:
        """Expert parallelism and expert tensor parallelism of a layer whose other weights are in so many parts.

        Each expert is split like the rest of the layer, or whole.
        """
        if experts is None:
            return ({},)
        fixed = self.request.constraints
        found = []
        by_hand = fixed.expert_tensor_parallel
        splits = {1, shards} if self.request.allow_expert_parallel else {shards}
        for split in sorted(splits if by_hand is None else {1, shards, by_hand}):
            if by_hand is not None and split != by_hand:
                self.cuts["etp_fixed"] += 1
                continue
            if experts.ffn_hidden_size % split:
                self.cuts["ep_width"] += 1
                continue
            for degree in divisors(experts.count):
                if fixed.expert_parallel is not None and degree != fixed.expert_parallel:
                    self.cuts["ep_fixed"] += 1
                elif fixed.expert_parallel is None and degree > 1 and not self.request.allow_expert_parallel:
                    self.cuts["ep_allowed"] += 1
                elif ranks % (degree * split):
                    self.cuts["ep_ranks"] += 1
                else:
                    found.append({"expert_parallel": degree, "expert_tensor_parallel": split})
        if fixed.expert_parallel is not None and experts.count % fixed.expert_parallel:
            self.cuts["ep_experts"] += 1
        return tuple(found)

    def _all_bases(self, ranks: int) -> tuple[Strategy, ...]:
        if ranks not in self._bases:
            found = []
            offloads = (Offload.NONE,) if self.request.on_device_ends else self.request.offloads
            for tp, kind, cp, dp in self._layouts(ranks):
                if kind is SequenceParallel.ULYSSES:
                    self.cuts["ulysses_base"] += 1
                    continue
                rules = {
                    tp_rule(layer, self.request.model, tp, kind) or cp_rule(layer, cp)
                    for layer in set(self.request.model.layers)
                }
                rules -= {None}
                if rules:
                    self.cuts[min(rules)] += 1
                    continue
                for zero, offload in self._shardings(cp * dp, offloads):
                    found.append(
                        Strategy(tp=tp, sequence_parallel=kind, cp=cp, dp=dp, zero=zero, offload=offload)
                    )
            self._bases[ranks] = tuple(found)
        return self._bases[ranks]

    def bases(self, outer: Outer) -> tuple[Strategy, ...]:
        """Base layouts (with a ZeRO stage for embedding and head) whose dp divides the batch exactly."""
        found = []
        size = self.request.constraints.micro_batch_size
        for base in self._all_bases(outer.ranks):
            if outer.samples % base.dp:
                self.cuts["batch"] += 1
            elif size is not None and outer.samples != size * base.dp:
                self.cuts["micro_batch_fixed"] += 1
            else:
                found.append(base)
        return tuple(found)


def setting_of(outer: Outer, virtual_stages: int, base: Strategy) -> Setting:
    """The setting in which a cost model prices a branch of the tree."""
    return Setting(
        pp=outer.pp,
        virtual_stages=virtual_stages,
        micro_batch_size=outer.samples // base.dp,
        micro_batches=outer.micro_batches,
        base=base,
    )


def tp_rule(layer: Layer, model: Model, tp: int, kind: SequenceParallel) -> str | None:
    """Names the rule that forbids a layer this tp degree and sequence parallelism; None where it is allowed."""
    if tp == 1:
        return None
    ulysses = kind is SequenceParallel.ULYSSES
    if layer.attention is not None:
        heads, groups = layer.attention.heads, layer.attention.query_groups
        if ulysses:
            return "ulysses_heads" if heads % tp or groups % tp else None
        if heads % tp or (groups % tp and tp % groups):
            return "tp_heads"
    if layer.mamba is not None:
        if ulysses:
            return "ulysses_kind"
        heads = layer.mamba.heads or model.hidden_size * layer.mamba.expand // layer.mamba.head_dim
        if heads % tp or layer.mamba.groups % tp:
            return "tp_heads"
    if ulysses:
        return None
    if layer.mlp is not None and layer.mlp.ffn_hidden_size % tp:
        return "tp_width"
    if layer.experts is not None:
        if kind is SequenceParallel.NONE:
            return "sp_experts"
        if layer.experts.shared_ffn_hidden_size % tp:
            return "tp_width"
    return None


def cp_rule(layer: Layer, cp: int) -> str | None:
    """Names the rule that forbids a layer this degree of context parallelism; None where it is allowed."""
    return "cp_kind" if cp > 1 and layer.mamba is not None else None
