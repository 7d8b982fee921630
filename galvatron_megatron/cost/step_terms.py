"""What a layer costs once per step, whatever the number of micro-batches."""

from collections.abc import Collection

from galvatron_megatron.cost.memory import ElementBytes, Share, optimizer_traffic_bytes
from galvatron_megatron.cost.offload import host_traffic, link_seconds, link_source, update_seconds
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.overlap import added_seconds
from galvatron_megatron.cost.sharded_states import GATHER, REDUCE, Sent
from galvatron_megatron.cost.sharding import REDUCTION, UPDATE
from galvatron_megatron.cost.terms import Term
from galvatron_megatron.describe.cluster import GB, Cluster
from galvatron_megatron.plan.strategy import Offload, Strategy


def step_terms(
    shares: Collection[Share],
    strategy: Strategy,
    sent: Sent,
    phases: dict[str, float],
    element: ElementBytes,
    options: RunOptions,
    cluster: Cluster,
    partial_seconds: float,
) -> list[Term]:
    """What is paid once per step: gradients, parameters, replicated gradients over tp, optimizer.

    Args:
        shares: of the parameters.
        strategy: how the layer runs.
        sent: seconds of what sharding sends.
        phases: seconds of the passes of one micro-batch, by name.
        element: bytes of a parameter's states.
        options: switches of the job.
        cluster: devices and links.
        partial_seconds: in which gradients that tp ranks compute in part are summed.

    Returns:
        Terms in seconds.
    """
    constants = cluster.constants
    terms = []
    for what, name, phase, overlaps in (
        ((REDUCTION, REDUCE), "gradient reduction", "backward", options.overlap_gradients),
        ((UPDATE, GATHER), "parameter gathering", "forward", options.overlap_parameters),
    ):
        if what in sent:
            added = added_seconds(sent[what], phases[phase], constants.overlap_slowdown, overlaps=overlaps)
            terms.append(Term(name=name, value=added))
    if partial_seconds:
        terms.append(Term(name="replicated gradients over tp", value=partial_seconds))
    if options.optimizer_in_step and strategy.offload is not Offload.NONE:
        moved = host_traffic(shares, strategy, element)
        terms += [
            Term(
                name="offloading gradients and weights",
                value=link_seconds(moved.stored_per_step + moved.returned_per_step, cluster),
                source=link_source(cluster),
            ),
            Term(name="optimizer on the host", value=update_seconds(moved.updated_per_step, cluster)),
        ]
    elif options.optimizer_in_step:
        traffic = sum(optimizer_traffic_bytes(s.parameters, strategy.zero, s.sharding, element) for s in shares)
        rate = cluster.device.memory_gb_per_second * GB * constants.memory_efficiency
        terms.append(Term(name="optimizer", value=traffic / rate))
    return terms
