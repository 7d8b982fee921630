"""How a job's states are really kept, read from its live engines and buffers; imported on ranks only."""

from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.runtime.zero import ZeroPart, is_deepspeed

Kept = tuple[str, int, int, int, bool]
"""Back end, ZeRO stage, parts of the weights, ranks that share the states, whether these are in host memory."""


def planned_states(plan: Plan, backend: str) -> set[Kept]:
    """What a plan says.

    Args:
        plan: of a model without experts.
        backend: who runs ZeRO 1.
    """
    return {
        (
            "deepspeed" if is_deepspeed(strategy, backend) else "megatron",
            strategy.zero,
            strategy.weight_shards,
            strategy.state_replicas,
            strategy.offload is not Offload.NONE,
        )
        for strategy in (plan.base, *plan.strategies)
    }


def kept_states(chunks) -> set[Kept]:
    """What this rank does.

    Args:
        chunks: the wrapped model chunks, with their optimizers built.
    """
    found = set()
    for chunk in chunks:
        for part in chunk.parts.values():
            shards, ranks = part.tp_group.size(), part.dp_cp_group.size()
            if isinstance(part, ZeroPart):
                found |= {
                    ("deepspeed", _stage(engine), shards, ranks, engine.offloads) for engine in part.engines
                }
            elif part.buffers:
                sharded = part.ddp_config.use_distributed_optimizer
                found.add(("megatron", int(sharded), shards, ranks, False))
    return found


def _stage(engine) -> int:
    """Of an engine, by what it keeps; its partitions are as small as the group says."""
    parameters = engine.all_parameters
    whole = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    # Padding: of every parameter under ZeRO 3, else of a flat group to twice the ranks.
    ranks = engine.dp_process_group.size()
    least = sum(partition.numel() for partition in engine.partitions) * ranks
    assert whole <= least <= whole + 2 * ranks * len(parameters)
    if all(hasattr(parameter, "ds_tensor") for parameter in parameters):
        assert sum(parameter.ds_tensor.numel() for parameter in parameters) * ranks == least
        return 3
    return 2 if engine.partition_gradients else 1
