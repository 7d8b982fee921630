"""The optimizer of states in host memory, and how optimizers count their steps."""

from typing import Any

import torch

from galvatron_megatron.host_adam import host_adam


def host_optimizer(param_groups: list[dict[str, Any]], config: Any) -> torch.optim.Optimizer:
    """Adam over parameters in host memory.

    Args:
        param_groups: with Megatron's settings by parameter.
        config: Megatron's optimizer config.

    Raises:
        UnsupportedPlanError: it cannot be compiled here.
    """
    return host_adam(
        param_groups,
        lr=config.lr or 0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        decoupled=config.decoupled_weight_decay,
    )


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
