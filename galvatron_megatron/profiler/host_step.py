"""Measures what a rank does once per step with states that lie in host memory."""

import time

import torch
import torch.distributed as dist

from galvatron_megatron.describe.profile import StepPoint
from galvatron_megatron.describe.typical import typical
from galvatron_megatron.device import on_cpu
from galvatron_megatron.errors import UnsupportedPlanError
from galvatron_megatron.host_adam import host_adam, missing_to_step_on_host

LARGEST_CPU_ELEMENTS = 4 << 20
LARGEST_GPU_ELEMENTS = 64 << 20
"""Beyond these a step takes as long per element; 16 bytes each."""
_WIDTHS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SMALL_SHARE = 4
"""The smaller of two sizes has this part of the elements of the larger."""


def host_step_sizes(parameters: int, world_size: int) -> tuple[int, int]:
    """Elements to measure with.

    ZeRO shares states out over all ranks that hold the same weights, and tensor and pipeline parallelism share
    weights out: whatever the plan, a rank has as many of them, or fewer where some layers stay on the device.

    Args:
        parameters: of the model.
        world_size: ranks.

    Returns:
        The small and the large number.
    """
    most = LARGEST_CPU_ELEMENTS if on_cpu() else LARGEST_GPU_ELEMENTS
    large = min(max(-(-parameters // world_size), _SMALL_SHARE), most)
    return large // _SMALL_SHARE, large


def compile_host_step() -> None:
    """Lets DeepSpeed's Adam for hosts be compiled, where one steps, before ranks wait for each other.

    Raises:
        UnsupportedPlanError: it cannot be.
    """
    if on_cpu():
        return
    if missing := missing_to_step_on_host():
        raise UnsupportedPlanError(
            f"offloading: no {missing} here, with which DeepSpeed compiles the optimizer for hosts; "
            f"valid: install {missing}, or offload none"
        )
    _adam(torch.zeros(1))


def _adam(main: torch.Tensor) -> torch.optim.Optimizer:
    # Nothing is trained: with a learning rate of zero all steps compute the same.
    return host_adam([main], lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, decoupled=True)


def measure_host_step(elements: int, precision: str, *, repeats: int = 9) -> StepPoint:
    """Times a step over states in host memory; every rank of the job calls this.

    On the device gradients are scaled, their norm is taken, and they are zeroed for the next step. On the host
    Adam steps and brings the new weights into the width that layers compute in. Copies between the two are not
    in it: their bandwidth is measured apart.

    Args:
        elements: fp32 main weights of a rank, in one flat tensor as ZeRO keeps them.
        precision: that layers compute in, as a model names it.
        repeats: steps to time.

    Returns:
        The point: mean of the middle half of the steps, maximum over ranks.

    Raises:
        UnsupportedPlanError: DeepSpeed's Adam for hosts cannot be compiled here.
    """
    main, gradient, weights = (
        _on_host(elements, dtype) for dtype in (torch.float32, torch.float32, _WIDTHS[precision])
    )
    main.grad = gradient
    on_device = torch.zeros(elements, device="cuda", dtype=torch.float32)
    optimizer = _adam(main)
    samples = []
    for index in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        on_device.mul_(1.0)
        # Its value is waited for, as the job does to clip.
        torch.linalg.vector_norm(on_device).item()
        optimizer.step()
        weights.copy_(main)
        on_device.zero_()
        # The first step makes the states and is not counted.
        if index:
            samples.append(time.perf_counter() - start)
    slowest = torch.tensor([typical(samples)[0]], device="cuda", dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return StepPoint(tensors=1, parameters=elements, updated=elements, zero=1, seconds=slowest.item())


def _on_host(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in host memory, page-locked where a device copies from and to it."""
    zeros = torch.zeros(elements, device="cpu", dtype=dtype)
    return zeros if on_cpu() else zeros.pin_memory()
