"""What a plan keeps in the memory of a node."""

from dataclasses import dataclass

from galvatron_megatron.cost.estimate import TermCostModel
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.describe.cluster import Cluster
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload

_GIB = 2**30


@dataclass(kw_only=True, frozen=True, slots=True)
class HostUse:
    """What a plan keeps in host memory beside what there is of it."""

    kept_bytes: int
    """Offloaded states on the node that has the most of them."""
    node_bytes: int
    """Memory of a node; 0 where it is not known."""

    @property
    def fits(self) -> bool:
        """Whether it fits; an unknown memory holds everything."""
        return not self.node_bytes or self.kept_bytes <= self.node_bytes

    @staticmethod
    def of(plan: Plan, cost_model: TermCostModel, cluster: Cluster) -> "HostUse":
        """What a plan keeps on the nodes of a cluster.

        Args:
            plan: the plan.
            cost_model: prices of its model.
            cluster: that it is made for.
        """
        kept = node_host_bytes(plan, cost_model, cluster.devices_per_node)
        return HostUse(kept_bytes=kept, node_bytes=host_memory_bytes(cluster))


def host_memory_bytes(cluster: Cluster) -> int:
    """Host memory of a node in bytes, 0 where the cluster does not say it."""
    return 0 if cluster.host is None else int(cluster.host.memory_gib * _GIB)


def free_host_bytes(cluster: Cluster, profile: Profile | None, device_bytes: int) -> int | None:
    """What a node has for offloaded states, None where that is not known.

    CPU ranks have no memory but the node's: what a plan may use as that of devices is not there any more.

    Args:
        cluster: the nodes.
        profile: measured on them, where they are live ranks.
        device_bytes: that a plan may use on one device.
    """
    known = host_memory_bytes(cluster)
    if not known:
        return None
    if profile is None or profile.provenance.backend != "gloo":
        return known
    # Shares of a node are rounded: less than a MiB is none.
    return max(0, known - cluster.devices_per_node * device_bytes) // 2**20 * 2**20


def stage_host_bytes(plan: Plan, cost_model: TermCostModel) -> tuple[int, ...]:
    """Bytes of offloaded states that a rank of each pipeline stage keeps, [pp].

    Args:
        plan: the plan.
        cost_model: prices of its model.
    """
    kept = [0] * plan.pp
    if all(each.offload is Offload.NONE for each in (plan.base, *plan.strategies)):
        return tuple(kept)
    setting = Setting.of(plan)
    index = 0
    for number, stage in enumerate(plan.stages):
        for layer in stage.layers:
            kept[number % plan.pp] += cost_model.priced_layer(index, layer.strategy, setting).host_bytes
            index += 1
    kept[0] += cost_model.priced_embedding(setting).host_bytes
    kept[-1] += cost_model.priced_head(setting).host_bytes
    return tuple(kept)


def node_host_bytes(plan: Plan, cost_model: TermCostModel, devices_per_node: int) -> int:
    """Bytes of offloaded states on the node that has the most of them.

    Args:
        plan: the plan.
        cost_model: prices of its model.
        devices_per_node: ranks that share a node; consecutive ones do.
    """
    by_rank = [size for size in stage_host_bytes(plan, cost_model) for _ in range(plan.base.ranks)]
    return max(sum(by_rank[i : i + devices_per_node]) for i in range(0, len(by_rank), devices_per_node))
