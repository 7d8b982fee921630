"""Writes a universal checkpoint of a model on one rank in DeepSpeed's layout; imported on ranks only."""

from pathlib import Path

import torch
from megatron.core.utils import unwrap_model


def write_universal(folder, models, optimizer, steps):
    """Files as ``ds_to_universal`` names and fills them, from the tensors of an unsharded fp32 job."""
    (stepper,) = optimizer.chained_optimizers
    root = Path(folder) / f"global_step{steps}_universal"
    for name, parameter in unwrap_model(models)[0].named_parameters():
        state = stepper.optimizer.state[parameter]
        where = root / "zero" / f"module.{name}"
        where.mkdir(parents=True)
        for key, tensor in (("fp32", parameter), *((key, state[key]) for key in ("exp_avg", "exp_avg_sq"))):
            torch.save({"param": tensor.detach().clone(), "cat_dim": 0}, where / f"{key}.pt")
        torch.save(torch.tensor(float(steps)), where / "step.pt")
    (Path(folder) / "latest_universal").write_text(root.name)
