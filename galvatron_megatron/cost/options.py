"""How a job runs beside its plan: switches of Megatron that change time or memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from galvatron_megatron.describe.megatron_flags import FLAG_OF


@dataclass(kw_only=True, frozen=True, slots=True)
class RunOptions:
    """Switches of a job that no strategy decides."""

    implementation: str = "transformer_engine"
    """Which kernels run: ``transformer_engine`` or ``local`` (``--transformer-impl``)."""
    gradients_in_fp32: bool = True
    """Gradients are accumulated and reduced in fp32 (``--accumulate-allreduce-grads-in-fp32``; Megatron sets it
    for bf16)."""
    overlap_gradients: bool = False
    """``--overlap-grad-reduce``: gradients are reduced during the last backward pass."""
    overlap_parameters: bool = False
    """``--overlap-param-gather``: updated parameters are gathered during the next forward pass."""
    overlap_tensor_parallel: bool = False
    """``--tp-comm-overlap``: tensor-parallel collectives overlap with the GEMMs they feed."""
    scatter_gather_sends: bool = False
    """Between nodes every rank of a tp group sends its share of an activation and the receivers gather it over
    the node's own links (arXiv 2104.04473, section 4.1); Megatron did so before megatron-core."""
    optimizer_instances: int = 1
    """``--num-distributed-optimizer-instances``: ZeRO 1 shards over the replicas of each instance alone."""
    deepspeed_zero_1: bool = False
    """``--galvatron-zero-backend deepspeed``: ZeRO 1 is DeepSpeed's, not Megatron's distributed optimizer."""
    bucket_elements: int | None = None
    """``--ddp-bucket-size``: gradients that ZeRO 2 and 3 reduce at once; None for what Megatron takes."""
    bucket_count: int | None = None
    """``--ddp-num-buckets``: in how many messages a rank reduces them instead."""
    optimizer_in_step: bool = True
    """False leaves out the optimizer step, where a measured time does so too."""


def run_options(arguments: Mapping[str, object]) -> RunOptions:
    """The switches of a job, from its Megatron arguments: a job and a command line read elsewhere say the same.

    Args:
        arguments: Megatron's destinations and values, before its validation: ``vars(args)`` of its namespace,
            or what ``read_command_line`` finds; with ``galvatron_zero_backend`` where that is given. A
            destination that is missing has Megatron's default.
    """

    def get(dest: str) -> object:
        return arguments[dest] if dest in arguments else FLAG_OF[dest].resting_value

    overlaps = bool(get("overlap_grad_reduce"))
    return RunOptions(
        implementation="local" if get("transformer_impl") == "local" else "transformer_engine",
        gradients_in_fp32=_gradients_in_fp32(get),
        overlap_gradients=overlaps,
        overlap_parameters=bool(get("overlap_param_gather")),
        overlap_tensor_parallel=bool(get("tp_comm_overlap")),
        optimizer_instances=get("num_distributed_optimizer_instances") or 1,
        deepspeed_zero_1=arguments.get("galvatron_zero_backend") == "deepspeed",
        # Without overlap Megatron's buckets, and those of ZeRO, are as large as can be.
        bucket_elements=get("ddp_bucket_size") if overlaps else None,
        bucket_count=get("ddp_num_buckets") if overlaps else None,
    )


def _gradients_in_fp32(get: Callable[[str], object]) -> bool:
    """As ``validate_args`` of Megatron-LM core_v0.19 decides it."""
    asked = bool(get("accumulate_allreduce_grads_in_fp32"))
    if get("bf16"):
        # A namespace that was validated has a torch.dtype here.
        is_wide = str(get("main_grads_dtype")).removeprefix("torch.") in ("fp32", "float32")
        return not get("grad_reduce_in_bf16") and (asked or is_wide)
    return asked or not get("fp16")
