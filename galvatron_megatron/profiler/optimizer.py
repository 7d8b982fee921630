"""Measures what a rank does once per step: zeroing gradients and Megatron's optimizer."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from galvatron_megatron.describe.profile import StepPoint
from galvatron_megatron.describe.typical import typical
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.profiler.clock import Clock
from galvatron_megatron.profiler.few_layers import FewLayers


def measure_step(few: FewLayers, *, zero: int, repeats: int = 6) -> StepPoint:
    """Times the step of a model's optimizer; every rank of the job calls this.

    Megatron's distributed optimizer ends its step by gathering the parameters; that part is left out, it is a
    collective and priced as one.

    Args:
        few: a model built with (zero 1) or without (zero 0) the distributed optimizer.
        zero: which of the two.
        repeats: steps to time.

    Returns:
        The point: mean of the middle half of the steps, maximum over ranks.

    Raises:
        GalvatronError: Megatron gathers the parameters where this is not seen.
    """
    optimizer = few.optimizer()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    clock = Clock()
    gathering: list[float] = []

    def timed(gather_parameters: Callable[..., None]) -> Callable[..., None]:
        def gather(*args: object, **kwargs: object) -> None:
            clock.synchronize()
            start = clock.mark()
            gather_parameters(*args, **kwargs)
            end = clock.mark()
            clock.synchronize()
            gathering.append(clock.seconds(start, end))

        return gather

    bucket_groups = few.ddp.bucket_groups + few.ddp.expert_parallel_bucket_groups
    for group in bucket_groups:
        group.start_param_sync = timed(group.start_param_sync)
    samples = []
    for index in range(repeats + 1):
        dist.barrier()
        gathering.clear()
        start = clock.mark()
        few.ddp.zero_grad_buffer()
        optimizer.zero_grad()
        optimizer.step()
        end = clock.mark()
        clock.synchronize()
        # The first step makes the optimizer's states and is not counted.
        if index:
            samples.append(clock.seconds(start, end) - sum(gathering))
    for group in bucket_groups:
        del group.start_param_sync
    slowest = torch.tensor([typical(samples)[0]], device="cuda", dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    trained = [p for p in few.module.parameters() if p.requires_grad]
    parameters = sum(p.numel() for p in trained)
    replicas = few.arguments.world_size // few.arguments.tensor_model_parallel_size
    if zero and replicas > 1 and not gathering:
        raise GalvatronError(
            "profile: this Megatron's distributed optimizer gathers parameters by other means than "
            "start_param_sync of its bucket groups, so that its step cannot be timed; valid: megatron-core 0.19"
        )
    return StepPoint(
        tensors=len(trained),
        parameters=parameters,
        updated=parameters if zero == 0 else -(-parameters // replicas),
        zero=zero,
        seconds=max(slowest.item(), 0.0),
    )
