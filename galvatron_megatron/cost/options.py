"""How a job runs beside its plan: switches of Megatron that change time or memory."""

from dataclasses import dataclass


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
    optimizer_in_step: bool = True
    """False leaves out the optimizer step, where a measured time does so too."""
