"""What a rank knows while it runs a plan: its place, its groups and how each layer runs."""

import copy
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan
from galvatron_megatron.plan.strategy import Offload, SequenceParallel, Strategy
from galvatron_megatron.runtime.groups import (
    GroupRegistry,
    block_sets,
    context_sets,
    expert_sets,
    megatron_sets,
    planned_sets,
    replica_group,
    replica_sets,
    tensor_group,
)
from galvatron_megatron.runtime.layout import Layout, block_ranks
from galvatron_megatron.runtime.random_streams import RandomStreams
from galvatron_megatron.runtime.resharding import Resharder, TrafficCounter
from galvatron_megatron.runtime.zero import zero_backend


@dataclass(kw_only=True, frozen=True, slots=True)
class StateClass:
    """Parameters whose gradients and optimizer states are kept alike: one DDP and one optimizer each."""

    weight_shards: int
    """In how many parts tensor parallelism splits the weights of a stage."""
    zero: int
    """ZeRO stage of gradients and optimizer states."""
    expert_shards: int | None = None
    """In how many of these parts tensor parallelism splits one expert; None where no experts are shared out."""
    offload: Offload = Offload.NONE
    """What of them lies in host memory."""

    @classmethod
    def of(cls, strategy: Strategy) -> "StateClass":
        """The class of a layer's parameters."""
        return cls(weight_shards=strategy.weight_shards, zero=strategy.zero, offload=strategy.offload)

    @classmethod
    def of_experts(cls, strategy: Strategy) -> "StateClass":
        """The class of the experts in a layer."""
        shards = strategy.expert_shards if strategy.expert_parallel > 1 else None
        return cls(weight_shards=strategy.expert_ranks, zero=strategy.zero, expert_shards=shards)


@dataclass(kw_only=True, frozen=True)
class LayerContext:
    """How one layer of this rank's stage runs."""

    index: int
    """Of the layer in the model, from 0."""
    kind: LayerKind
    strategy: Strategy
    layout: Layout
    base: Layout
    reshard_input: Resharder
    """From the layout in which the layer in front (or the base layout) leaves the activations."""
    reshard_output: Resharder
    """To the base layout behind the last layer of a virtual stage; nothing to do elsewhere."""
    groups: ProcessGroupCollection
    """Megatron's collection with this layer's own tensor- and data-parallel groups."""
    sequence_group: dist.ProcessGroup
    """Ranks that split the sequence or the weights: the tp group, or under Ulysses its sequence group."""
    rank: int
    """Of this process inside its stage."""
    streams: RandomStreams
    draws_experts: bool
    """Experts are split otherwise than Megatron's arguments say, and so need random numbers of their own."""

    @property
    def own_positions(self) -> Layout:
        """Layout whose positions are those of queries and keys where the attention rotates them.

        Megatron's sequence parallelism has gathered its slices by then, Ulysses has not. The base's, which has
        all positions, where nothing splits them.
        """
        if self.strategy.sequence_parallel is SequenceParallel.ULYSSES:
            return self.layout
        return replace(self.layout, split=False) if self.layout.cp > 1 else self.base


@dataclass(kw_only=True)
class RuntimeContext:
    """A plan on this rank."""

    plan: Plan
    registry: GroupRegistry
    groups: ProcessGroupCollection
    """Megatron's own groups: the base layout."""
    rank: int
    """Of this process inside its stage."""
    streams: RandomStreams
    zero_backend: str = "megatron"
    """Who runs ZeRO 1."""
    traffic: TrafficCounter = field(default_factory=TrafficCounter)
    _resharders: dict[tuple[Layout, Layout], Resharder] = field(default_factory=dict)
    _collections: dict[tuple[int, int], ProcessGroupCollection] = field(default_factory=dict)

    @classmethod
    def create(cls, plan: Plan, args: Any) -> "RuntimeContext":
        """Creates every group of the plan; all ranks call this together, after Megatron created its groups.

        Args:
            plan: the plan.
            args: Megatron's arguments.
        """
        stage_ranks, world_size = plan.base.ranks, plan.world_size
        if dist.get_world_size() != world_size:
            raise RuntimeError(f"the plan needs {world_size} ranks; this job has {dist.get_world_size()}")
        megatron = ProcessGroupCollection.use_mpu_process_groups()
        minutes = getattr(args, "distributed_timeout_minutes", None)
        registry = GroupRegistry(timeout=timedelta(minutes=minutes) if minutes else None)
        experts = {"expert_parallel": megatron.ep.size(), "expert_tensor_parallel": megatron.expt_tp.size()}
        base = replace(plan.base, **experts)
        for name, sets in megatron_sets(base, world_size).items():
            registry.adopt(sets, getattr(megatron, name))
        registry.create(planned_sets(plan))
        rank = dist.get_rank() % stage_ranks
        stage = parallel_state.get_pipeline_model_parallel_rank()
        streams = RandomStreams(seed=args.seed + 100 * stage, rank=rank, base=Layout.of(plan.base))
        return cls(
            plan=plan,
            registry=registry,
            groups=megatron,
            rank=rank,
            streams=streams,
            zero_backend=zero_backend(args),
        )

    def layer(self, index: int) -> LayerContext:
        """How layer ``index`` of the model runs on this rank.

        Args:
            index: of the layer, from 0, embedding and head not counted.
        """
        before, layer, is_last = self._position(index)
        base = Layout.of(self.plan.base)
        layout = Layout.of(layer.strategy)
        return LayerContext(
            index=index,
            kind=layer.kind,
            strategy=layer.strategy,
            layout=layout,
            base=base,
            reshard_input=self.resharder(before, layout),
            reshard_output=self.resharder(layout, base if is_last else layout),
            groups=self._layer_groups(layer),
            sequence_group=tensor_group(self.registry, layer.strategy.tp, self.plan),
            rank=self.rank,
            streams=self.streams,
            draws_experts=layer.kind.has_experts and not self._experts_as_megatron(layer.strategy),
        )

    def _layer_groups(self, layer: LayerPlan) -> ProcessGroupCollection:
        """Megatron's collection for one layer."""
        strategy, plan = layer.strategy, self.plan
        groups = copy.copy(self.collection(StateClass.of(strategy)))
        groups.tp_cp = tensor_group(self.registry, strategy.tp * strategy.cp, plan)
        if strategy.cp > 1:
            groups.cp = self.registry.of(context_sets(strategy, plan.world_size))
        if not layer.kind.has_experts:
            return groups
        groups.tp_dp_cp = self.registry.of(replica_sets(1, plan.base.ranks, plan.world_size))
        groups.expt_tp = tensor_group(self.registry, strategy.expert_shards, plan)
        groups.tp_ep = tensor_group(self.registry, strategy.expert_ranks, plan)
        groups.ep = self.registry.of(expert_sets(strategy, plan.world_size))
        replicas = self.registry.of(replica_sets(strategy.expert_ranks, plan.base.ranks, plan.world_size))
        groups.expt_dp = groups.expt_dp_gtp_remat = groups.intra_expt_dp = replicas
        return groups

    def _experts_as_megatron(self, strategy: Strategy) -> bool:
        """Whether this rank has the same part of the experts as under Megatron's own arguments."""
        degrees = (self.groups.ep.size(), self.groups.expt_tp.size())
        return degrees == (strategy.expert_parallel, strategy.expert_shards)

    def _position(self, index: int) -> tuple[Layout, Any, bool]:
        """Layout in front of a layer, its plan, and whether it is the last of its virtual stage."""
        first = 0
        for stage in self.plan.stages:
            inside = index - first
            if inside < len(stage.layers):
                before = stage.layers[inside - 1].strategy if inside else self.plan.base
                return Layout.of(before), stage.layers[inside], inside == len(stage.layers) - 1
            first += len(stage.layers)
        raise IndexError(f"layer {index} is not among the {first} layers of the plan")

    def resharder(self, source: Layout, target: Layout) -> Resharder:
        """Moves activations from one layout to another inside this rank's stage."""
        key = (source, target)
        if key not in self._resharders:
            group = None
            if source != target and len(block_ranks(source, target, self.rank)) > 1:
                group = self.registry.of(block_sets(source, target, self.plan.world_size))
            self._resharders[key] = Resharder(
                source=source, target=target, rank=self.rank, group=group, counter=self.traffic
            )
        return self._resharders[key]

    def collection(self, state_class: StateClass) -> ProcessGroupCollection:
        """Megatron's groups with those of a class of parameters in place of the base layout's."""
        shards = state_class.weight_shards
        key = (shards, state_class.expert_shards or shards)
        if key not in self._collections:
            groups = copy.copy(self.groups)
            groups.tp = tensor_group(self.registry, key[1], self.plan)
            replicas = replica_group(
                self.registry, Strategy(tp=shards, dp=self.plan.base.ranks // shards), self.plan
            )
            groups.dp = groups.dp_cp = groups.dp_cp_gtp_remat = groups.intra_dp_cp = replicas
            groups.intra_dist_opt = dist.group.WORLD
            self._collections[key] = groups
        return self._collections[key]

    @property
    def state_classes(self) -> tuple[StateClass, ...]:
        """The classes of all parameters of the model, the base's first; the same on every rank."""
        strategies = (self.plan.base, *self.plan.strategies)
        classes = dict.fromkeys(StateClass.of(strategy) for strategy in strategies)
        layers = [layer for layer in self.plan.layers if layer.kind.has_experts]
        classes.update(dict.fromkeys(StateClass.of_experts(layer.strategy) for layer in layers))
        return tuple(classes)

    def destroy(self) -> None:
        """Destroys the groups created for the plan."""
        self.registry.destroy()
