"""Every process group a plan needs: one communicator per distinct set of ranks, created once."""

from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import pairwise

import torch.distributed as dist

from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Strategy
from galvatron_megatron.runtime.layout import Layout, block_ranks

RankSet = tuple[int, ...]


def tensor_sets(size: int, stage_ranks: int, world_size: int) -> Iterator[RankSet]:
    """Sets of ``size`` consecutive ranks, over all stages: tensor-parallel (or Ulysses) groups."""
    if stage_ranks % size:
        raise ValueError(f"groups of {size} do not fit a stage of {stage_ranks} ranks")
    for first in range(0, world_size, size):
        yield tuple(range(first, first + size))


def replica_sets(weight_shards: int, stage_ranks: int, world_size: int) -> Iterator[RankSet]:
    """Sets of ranks of a stage that hold the same weight shard: gradients are summed over them."""
    for first in range(0, world_size, stage_ranks):
        for shard in range(weight_shards):
            yield tuple(range(first + shard, first + stage_ranks, weight_shards))


def context_sets(strategy: Strategy, world_size: int) -> Iterator[RankSet]:
    """Sets of ranks that split the sequence of a layer by context parallelism, over all stages."""
    size = strategy.tp * strategy.cp
    for first in range(0, world_size, size):
        for place in range(strategy.tp):
            yield tuple(range(first + place, first + size, strategy.tp))


def expert_sets(strategy: Strategy, world_size: int) -> Iterator[RankSet]:
    """Sets of ranks that share out the experts of a layer, over all stages: expert-parallel groups.

    Expert tensor parallelism is innermost, as in Megatron's own numbering.
    """
    for first in range(0, world_size, strategy.expert_ranks):
        for shard in range(strategy.expert_shards):
            yield tuple(range(first + shard, first + strategy.expert_ranks, strategy.expert_shards))


def block_sets(source: Layout, target: Layout, world_size: int) -> Iterator[RankSet]:
    """Sets of ranks inside which activations move between two layouts, over all stages."""
    for first in range(0, world_size, source.ranks):
        start = 0
        while start < source.ranks:
            block = block_ranks(source, target, start)
            yield tuple(first + rank for rank in block)
            start += len(block)


def layout_changes(plan: Plan) -> tuple[tuple[Layout, Layout], ...]:
    """The distinct layout changes of a plan's forward pass, in order of first use."""
    changes = {}
    base = Layout.of(plan.base)
    for stage in plan.stages:
        layouts = [base, *(Layout.of(layer.strategy) for layer in stage.layers), base]
        for before, after in pairwise(layouts):
            if before != after:
                changes[(before, after)] = None
    return tuple(changes)


def planned_sets(plan: Plan) -> tuple[RankSet, ...]:
    """Every set of ranks the plan communicates in, without repetition, in an order all ranks agree on."""
    stage_ranks, world_size = plan.base.ranks, plan.world_size
    sets: dict[RankSet, None] = {}
    for strategy in (plan.base, *plan.strategies):
        for size in dict.fromkeys((strategy.tp, strategy.weight_shards)):
            sets.update(dict.fromkeys(tensor_sets(size, stage_ranks, world_size)))
        sets.update(dict.fromkeys(replica_sets(strategy.weight_shards, stage_ranks, world_size)))
        if strategy.cp > 1:
            sets.update(dict.fromkeys(context_sets(strategy, world_size)))
            sets.update(dict.fromkeys(tensor_sets(strategy.tp * strategy.cp, stage_ranks, world_size)))
    for strategy in dict.fromkeys(layer.strategy for layer in plan.layers if layer.kind.has_experts):
        for size in (strategy.expert_shards, strategy.expert_ranks):
            sets.update(dict.fromkeys(tensor_sets(size, stage_ranks, world_size)))
        sets.update(dict.fromkeys(expert_sets(strategy, world_size)))
        for shards in (strategy.expert_ranks, 1):  # replicas of experts, and the whole stage for metrics
            sets.update(dict.fromkeys(replica_sets(shards, stage_ranks, world_size)))
    for source, target in layout_changes(plan):
        sets.update(dict.fromkeys(block_sets(source, target, world_size)))
    return tuple(sets)


def megatron_sets(base: Strategy, world_size: int) -> dict[str, tuple[RankSet, ...]]:
    """Sets of ranks for which Megatron has a communicator that a plan can use, by names of its collections.

    Those inside a stage: no layer needs any other. Megatron has several for some of these sets; the first name
    stands for them (without base context and expert parallelism ``tp_cp`` has the sets of ``tp``, ``dp`` those
    of ``dp_cp``, ``ep`` and ``gtp_remat`` those of ``cp``, ``tp_ep`` those of ``expt_tp``).

    Args:
        base: the base layout, whose experts are shared out as Megatron's arguments say.
        world_size: ranks of the job.
    """
    stage = base.ranks
    return {
        "tp": tuple(tensor_sets(base.tp, stage, world_size)),
        "dp_cp": tuple(replica_sets(base.tp, stage, world_size)),
        "tp_dp_cp": tuple(replica_sets(1, stage, world_size)),
        "cp": tuple(tensor_sets(1, stage, world_size)),
        "expt_tp": tuple(tensor_sets(base.expert_shards, stage, world_size)),
        "expt_dp": tuple(replica_sets(base.expert_ranks, stage, world_size)),
    }


class GroupRegistry:
    """Communicators by rank set.

    All ranks create the communicators they do not share with Megatron in the same order, also those they
    are not part of, as ``torch.distributed.new_group`` demands.
    """

    def __init__(self, *, timeout: timedelta | None = None) -> None:
        """Starts with the world's communicator only.

        Args:
            timeout: of collectives in the groups created here; torch's default if None.
        """
        self._timeout = timeout
        self._rank = dist.get_rank()
        self._groups: dict[RankSet, dist.ProcessGroup | None] = {}
        self.created: list[RankSet] = []
        """Rank sets for which a communicator was created, in order."""
        self._groups[tuple(range(dist.get_world_size()))] = dist.group.WORLD

    def adopt(self, sets: Iterable[RankSet], group: dist.ProcessGroup) -> None:
        """Reuses a communicator that exists on every rank, instead of creating another.

        Args:
            sets: the rank sets of this kind of group over the whole world.
            group: this rank's communicator of that kind.

        Raises:
            RuntimeError: Megatron's group is not where the layout of the plan says.
        """
        actual = tuple(dist.get_process_group_ranks(group))
        known = list(sets)
        if actual not in known:
            raise RuntimeError(f"Megatron built a group of ranks {actual}, which is none of {known}")
        for ranks in known:
            self._groups.setdefault(ranks, group if self._rank in ranks else None)

    def create(self, sets: Iterable[RankSet]) -> None:
        """Creates the communicators that are missing; every rank calls this with the same sets in order."""
        for ranks in sets:
            if ranks in self._groups:
                continue
            member = self._rank in ranks
            alone = len(ranks) == 1
            self._groups[ranks] = None
            if member or not alone:  # a rank alone need not make the whole world wait
                group = dist.new_group(
                    list(ranks),
                    timeout=self._timeout,
                    group_desc="GALVATRON",
                    use_local_synchronization=alone,
                )
                self._groups[ranks] = group if member else None
            self.created.append(ranks)

    def get(self, ranks: RankSet) -> dist.ProcessGroup:
        """The communicator of a rank set that this rank belongs to.

        Raises:
            KeyError: the set was never created, or this rank is not in it.
        """
        group = self._groups.get(ranks)
        if group is None:
            raise KeyError(f"rank {self._rank} has no communicator over ranks {ranks}")
        return group

    def of(self, sets: Iterable[RankSet]) -> dist.ProcessGroup:
        """The communicator of the one set among ``sets`` that holds this rank."""
        return self.get(next(ranks for ranks in sets if self._rank in ranks))

    def destroy(self) -> None:
        """Destroys the communicators created here (not those adopted)."""
        for ranks in reversed(self.created):
            group = self._groups.pop(ranks)
            if group is not None:
                dist.destroy_process_group(group)
        self.created.clear()


def tensor_group(registry: GroupRegistry, size: int, plan: Plan) -> dist.ProcessGroup:
    """This rank's group of ``size`` consecutive ranks."""
    return registry.of(tensor_sets(size, plan.base.ranks, plan.world_size))


def replica_group(registry: GroupRegistry, strategy: Strategy, plan: Plan) -> dist.ProcessGroup:
    """This rank's group over which gradients of a layer with this strategy are summed."""
    return registry.of(replica_sets(strategy.weight_shards, plan.base.ranks, plan.world_size))
