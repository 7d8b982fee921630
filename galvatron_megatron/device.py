"""What a job's tensors lie on: asked alike by the runtime and by the profiler."""

import torch


def on_cpu() -> bool:
    """True where tensors made on device ``cuda`` lie in CPU memory (the CPU device back end is installed)."""
    return torch.empty(0, device="cuda").device.type == "cpu"
