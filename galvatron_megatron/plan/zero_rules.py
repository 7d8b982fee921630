"""Sizes that a class of sharded parameters takes, as the runtime sets them and the cost model prices them."""

from galvatron_megatron.plan.strategy import Offload

LEAST_BUCKET = 40_000_000
"""Elements that Megatron, and with it the engines of ZeRO, reduce at once."""
BUCKET_PER_RANK = 1_000_000
"""Elements for every rank that shards them, where that is more."""
WHOLE_SHARE = 0.01
"""Part of a layer's parameters that may stay whole under ZeRO 3."""
_SMALLEST = 2
"""DeepSpeed wants buckets of an even number of elements to gather with."""


def is_deepspeed(zero: int, offload: Offload, zero_1: bool) -> bool:
    """Whether DeepSpeed shards some states: those of ZeRO 2 and 3, and all that lie in host memory.

    Args:
        zero: stage.
        offload: what of them lies there.
        zero_1: stage 1 of states on the device is DeepSpeed's, not Megatron's.
    """
    return offload is not Offload.NONE or zero > 1 or (zero == 1 and zero_1)


def usual_bucket(replicas: int) -> int:
    """Elements that Megatron reduces at once where a job does not say.

    Args:
        replicas: ranks that share them.
    """
    return max(LEAST_BUCKET, BUCKET_PER_RANK * replicas)


def bucket_elements(parameters: int, largest: int, replicas: int, wanted: int | None = None) -> int:
    """Elements of the buffer in which DeepSpeed's classes reduce the gradients of a class of parameters.

    Never more than there are, and never less than one parameter has.

    Args:
        parameters: elements of all parameters of the class in a model chunk of one rank.
        largest: elements of the largest of them.
        replicas: ranks that shard the class.
        wanted: elements to reduce at once where the job says so (``--ddp-bucket-size``).
    """
    if not parameters:
        return 0
    return max(_SMALLEST, min(parameters, max(wanted or usual_bucket(replicas), largest)))


def reduction_buffers(zero: int, overlaps: bool) -> int:
    """Buckets that an engine holds while gradients are reduced.

    While one is reduced beside the backward pass, ZeRO 2 fills another; ZeRO 3 fills the same on its stream.

    Args:
        zero: stage.
        overlaps: reduction overlaps the backward pass (``--overlap-grad-reduce``).
    """
    return 2 if zero == 2 and overlaps else 1


def vectors_stay_whole(vectors: int, parameters: int, replicas: int, offload: Offload = Offload.NONE) -> bool:
    """Whether ZeRO 3 leaves the small vectors of a layer whole on every rank, gathered once behind the step.

    These are norms, and biases that are added outside of their linear: they are gathered in messages of their
    own in every pass, which takes latency for next to no bytes. A bias that its linear adds is gathered in one
    message with the matrix, and sharded like it.

    Args:
        vectors: elements of these vectors on a rank.
        parameters: elements of all parameters of the layer there, the vectors' included.
        replicas: ranks that shard them.
        offload: of the layer; weights in host memory are not kept on the device.
    """
    return replicas > 1 and offload is not Offload.PARAMETERS and 0 < vectors <= WHOLE_SHARE * parameters
