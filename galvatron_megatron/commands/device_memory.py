"""The memory of a device that a command line allows."""

from galvatron_megatron.describe.cluster import Cluster
from galvatron_megatron.errors import DescriptionError

_GIB = 2**30


def usable_memory_bytes(cluster: Cluster, memory_gb: float | None) -> int:
    """Bytes of one device that a plan may use.

    Args:
        cluster: the devices.
        memory_gb: ``--memory-gb``, in GB of 2**30 bytes; None for what the cluster says.

    Raises:
        DescriptionError: the number is not one that a device can have.
    """
    memory_bytes = cluster.memory_bytes if memory_gb is None else memory_gb * _GIB
    if not 1 <= memory_bytes < 2**50:
        raise DescriptionError(f"--memory-gb: {memory_gb}; valid: a number of GB above 0")
    return int(memory_bytes)
