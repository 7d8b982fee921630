"""What a plan keeps in the memory of a node."""

from galvatron_megatron.cost.estimate import TermCostModel
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload


def node_host_bytes(plan: Plan, cost_model: TermCostModel, devices_per_node: int) -> int:
    """Bytes of offloaded states on the node that has the most of them.

    Args:
        plan: the plan.
        cost_model: prices of its model.
        devices_per_node: ranks that share a node; consecutive ones do.
    """
    if all(each.offload is Offload.NONE for each in (plan.base, *plan.strategies)):
        return 0
    setting = Setting.of(plan)
    kept = [0] * plan.pp
    index = 0
    for number, stage in enumerate(plan.stages):
        for layer in stage.layers:
            kept[number % plan.pp] += cost_model.priced_layer(index, layer.strategy, setting).host_bytes
            index += 1
    kept[0] += cost_model.priced_embedding(setting).host_bytes
    kept[-1] += cost_model.priced_head(setting).host_bytes
    by_rank = [size for size in kept for _ in range(plan.base.ranks)]
    return max(sum(by_rank[i : i + devices_per_node]) for i in range(0, len(by_rank), devices_per_node))
