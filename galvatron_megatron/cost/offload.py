"""Host memory: what a layer's states cost where DeepSpeed keeps them there.

Source: ZeRO-Offload (arXiv 2101.06840, sections 3 and 4), and where the copies stand in the classes
``DeepSpeedZeroOptimizer`` and ``DeepSpeedZeroOptimizer_Stage3`` of DeepSpeed 0.19.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from galvatron_megatron.cost.memory import ElementBytes, Share
from galvatron_megatron.describe.cluster import GB, Cluster, Host
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Offload, Strategy

_FP32_BYTES = 4


@dataclass(kw_only=True, frozen=True, slots=True)
class HostTraffic:
    """Bytes of one rank over its link to the host, and inside host memory."""

    fetched_per_pass: float = 0.0
    """Weight shards to the device, in every forward and every backward pass of a micro-batch."""
    stored_per_step: float = 0.0
    """Gradient shards to the host, in fp32: they add up on the device."""
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
    weights = parameters * element.weight
    master = element.optimizer if element.weight < 4 else element.optimizer + element.weight
    fetches = strategy.offload is Offload.PARAMETERS
    return HostTraffic(
        fetched_per_pass=weights if fetches else 0.0,
        stored_per_step=parameters * _FP32_BYTES,
        returned_per_step=0.0 if fetches else weights,
        updated_per_step=parameters * (2 * master + _FP32_BYTES + element.weight),
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


def link_source(cluster: Cluster) -> str:
    """How the time of copies is known, as terms are tagged."""
    return "measured" if cluster.host is not None and cluster.host.source == "measured" else "modelled"


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


def host_bytes(shares: Iterable[Share], strategy: Strategy, element: ElementBytes) -> int:
    """What a rank keeps in host memory for a layer.

    fp32 main weights, gradient and both moments; stages 1 and 2 keep a copy of the new weights in the width the
    layers compute in, stage 3 keeps those where weights are offloaded (fp32 ones are their own main weights).

    Args:
        shares: parameters of the rank by who replicates them.
        strategy: of the layer.
        element: bytes of one parameter by purpose.
    """
    if strategy.offload is Offload.NONE:
        return 0
    parameters = sum(-(-share.parameters // share.sharding) for share in shares)
    own_weights = strategy.offload is Offload.PARAMETERS and element.weight < _FP32_BYTES
    weights = element.weight if strategy.zero < 3 or own_weights else 0
    return parameters * (4 * _FP32_BYTES + weights)
