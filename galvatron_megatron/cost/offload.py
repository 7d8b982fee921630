"""Host memory: what a layer's states cost where DeepSpeed keeps them there.

Source: ZeRO-Offload (arXiv 2101.06840, sections 3 and 4), and where the copies stand in the classes
``DeepSpeedZeroOptimizer`` and ``DeepSpeedZeroOptimizer_Stage3`` of DeepSpeed 0.19.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from galvatron_megatron.cost.memory import ElementBytes, Share, StateBytes
from galvatron_megatron.describe.cluster import GB, Cluster, Host
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Offload, Strategy


@dataclass(kw_only=True, frozen=True, slots=True)
class HostTraffic:
    """Bytes of one rank over its link to the host, and inside host memory."""

    fetched_per_pass: float = 0.0
    """Weight shards to the device, in every forward and every backward pass of a micro-batch."""
    stored_per_micro_batch: float = 0.0
    """Gradient shards to the host."""
    stored_per_step: float = 0.0
    """Gradient shards to the host where they are complete only at the end of the step."""
    returned_per_step: float = 0.0
    """Updated weight shards to the device."""
    updated_per_step: float = 0.0
    """Moved through host memory by the optimizer."""


def host_traffic(shares: Iterable[Share], strategy: Strategy, element: ElementBytes) -> HostTraffic:
    """Bytes that offloading moves for one layer.

    The host keeps fp32 master weights, both moments and the gradient shard: Adam reads all four and writes the
    first three; the weights go back in the width the layers compute in, unless they stay on the host.

    Args:
        shares: parameters of the rank by who replicates them.
        strategy: of the layer.
        element: bytes of one parameter by purpose.
    """
    if strategy.offload is Offload.NONE:
        return HostTraffic()
    parameters = sum(-(-share.parameters // share.sharding) for share in shares)
    gradient = parameters * element.gradient
    weights = parameters * element.weight
    master = element.optimizer if element.weight < 4 else element.optimizer + element.weight
    fetches = strategy.offload is Offload.PARAMETERS
    early = strategy.zero >= 2
    return HostTraffic(
        fetched_per_pass=weights if fetches else 0.0,
        stored_per_micro_batch=gradient if early else 0.0,
        stored_per_step=0.0 if early else gradient,
        returned_per_step=0.0 if fetches else weights,
        updated_per_step=parameters * (2 * master + 4 + element.weight),
    )


def link_seconds(size: float, cluster: Cluster) -> float:
    """Time to move bytes between a device and its host while all devices of the node do so.

    Raises:
        DescriptionError: the cluster says nothing of its hosts.
    """
    if not size:
        return 0.0
    host = _host(cluster)
    return size / (host.gb_per_second * GB * host.efficiency)


def update_seconds(size: float, cluster: Cluster) -> float:
    """Time in which the optimizer moves bytes through the host's memory, of which a device has its share.

    Raises:
        DescriptionError: the cluster says nothing of its hosts.
    """
    return size / (_host(cluster).memory_gb_per_second * GB) if size else 0.0


def _host(cluster: Cluster) -> Host:
    if cluster.host is None:
        raise DescriptionError(
            f"cluster {cluster.name}: no host, which offloading needs; valid: host: {{gb_per_second: ..., "
            "memory_gb_per_second: ...} in the cluster file, or no --offload"
        )
    return cluster.host


def kept_on_device(state: StateBytes, strategy: Strategy) -> StateBytes:
    """What is left of a layer's states on the device.

    Optimizer states go; gradients go where ZeRO shards them; weights go with ``parameters``.

    Args:
        state: without offloading.
        strategy: of the layer.
    """
    if strategy.offload is Offload.NONE:
        return state
    gradients = 0 if strategy.zero >= 2 else state.gradients
    weights = 0 if strategy.offload is Offload.PARAMETERS else state.weights
    return replace(state, weights=weights, gradients=gradients, optimizer=0)
