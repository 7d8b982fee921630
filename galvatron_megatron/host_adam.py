"""Adam over states in host memory, named in one place: the runtime steps with it, the profiler times it.

On CUDA DeepSpeed's Adam for hosts, which is compiled at first use (minutes, once per machine); on CPU ranks the
host is the device, and torch's Adam steps there, as Megatron would choose.
"""

import os
from collections.abc import Iterable
from shutil import which
from typing import Any

import torch

from galvatron_megatron.device import on_cpu
from galvatron_megatron.errors import UnsupportedPlanError


def missing_to_step_on_host() -> str | None:
    """What is not installed of that which DeepSpeed's Adam for hosts is compiled with; None for nothing.

    Asked before the model is built, as compiling starts only after that.
    """
    if on_cpu():
        return None
    tools = {"C++ compiler": os.environ.get("CXX", "c++"), "ninja": "ninja"}
    return next((name for name, command in tools.items() if which(command) is None), None)


def host_adam(
    parameters: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> torch.optim.Optimizer:
    """Adam over parameters in host memory.

    Args:
        parameters: they, or groups of them with settings of their own.
        lr: learning rate.
        betas: of the moments.
        eps: added to the root of the second moment.
        weight_decay: of all that have none of their own.
        decoupled: decays weights as AdamW does, not through the gradient.

    Raises:
        UnsupportedPlanError: DeepSpeed's cannot be compiled here.
    """
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if on_cpu():
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        return kind(parameters, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(parameters, **settings, adamw_mode=decoupled)
    except RuntimeError as error:
        raise UnsupportedPlanError(
            f"plan offload: DeepSpeed's Adam for hosts cannot be compiled here ({error.__cause__ or error}); "
            "valid: install a C++ compiler and ninja, or offload none"
        ) from error
