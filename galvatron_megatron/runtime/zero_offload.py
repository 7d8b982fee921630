"""Who steps states that lie in host memory, named in one place.

On CUDA DeepSpeed's Adam for hosts, which is compiled at first use (minutes, once per machine); on CPU ranks the
host is the device, and Megatron's own choice (torch's Adam) steps there.
"""

import os
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


def host_optimizer(param_groups: list[dict[str, Any]], config: Any) -> torch.optim.Optimizer:
    """DeepSpeed's Adam over parameters in host memory.

    Args:
        param_groups: with Megatron's settings by parameter.
        config: Megatron's optimizer config.

    Raises:
        UnsupportedPlanError: it cannot be compiled here.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(
            param_groups,
            lr=config.lr or 0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            adamw_mode=config.decoupled_weight_decay,
        )
    except RuntimeError as error:
        raise UnsupportedPlanError(
            f"plan offload: DeepSpeed's Adam for hosts cannot be compiled here ({error.__cause__ or error}); "
            "valid: install a C++ compiler and ninja, or offload none"
        ) from error


def step_count(optimizer: Any, steps: int = 0) -> torch.Tensor | int | None:
    """A step count as an optimizer keeps it by parameter; its own for each, as some count in place.

    Args:
        optimizer: any Adam.
        steps: that were made.

    Returns:
        A tensor for torch's, a number for DeepSpeed's on hosts, None where it is kept by group.
    """
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return torch.tensor(float(steps), dtype=torch.float32)
    return steps if hasattr(optimizer, "ds_opt_adam") else None
