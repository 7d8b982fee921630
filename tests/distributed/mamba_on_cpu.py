"""Megatron's Mamba layer without mamba-ssm: its two CUDA kernels in plain torch, and a hybrid spec with them.

Imported on ranks only, by the ``--spec`` of a case. The scan is written from "Transformers are SSMs" (arXiv
2405.21060), in its quadratic form: y = (L * C B^T) x + D x, where L[i, j] for i >= j is
exp(A (dt[j+1] + ... + dt[i])) dt[j], and 0 elsewhere.
"""

import dataclasses
import importlib
import sys
from types import ModuleType
from unittest.mock import patch

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.nn import functional

from galvatron_megatron.integration import local_hybrid_spec


class GatedNorm(torch.nn.Module):
    """A root-mean-square norm over groups of channels, behind a gate where there is one."""

    def __init__(self, hidden_size, eps, group_size, norm_before_gate, device, dtype):
        super().__init__()
        assert not norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, x, z=None):
        x = x if z is None else x * functional.silu(z)
        groups = x.unflatten(-1, (-1, self.group_size))
        scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (groups * scale).flatten(-2) * self.weight


def split_conv1d_scan(mixed, weight, bias, dt_bias, a, *, activation, headdim, ngroups, **options):
    """What ``mamba_split_conv1d_scan_combined`` gives: [batch, sequence, channels], gated by z."""
    assert activation == "silu"
    assert options.get("seq_idx") is None
    heads, (channels, width) = a.numel(), weight.shape
    inner = heads * headdim
    z, mixed, dt = mixed.split([inner, channels, heads], dim=-1)
    padded = functional.pad(mixed.transpose(1, 2), (width - 1, 0))
    mixed = functional.silu(functional.conv1d(padded, weight[:, None], bias, groups=channels)).transpose(1, 2)
    x, b, c = mixed.split([inner, *[(channels - inner) // 2] * 2], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (part.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, dim=2) for part in (b, c))
    dt = functional.softplus(dt + dt_bias)
    decay = (dt * a).cumsum(dim=1)
    steps = decay[:, :, None] - decay[:, None]  # [batch, to, from, heads]
    future = torch.ones(steps.shape[1:3]).triu(1).bool()[None, :, :, None]
    weights = torch.exp(steps.masked_fill(future, -torch.inf)) * dt[:, None]
    scores = torch.einsum("bihn,bjhn->bijh", c, b) * weights
    y = torch.einsum("bijh,bjhp->bihp", scores, x) + options["D"][:, None] * x
    return y.flatten(-2) * functional.silu(z)


def _mixer_with_kernels():
    """Megatron's module of the mixer, imported as if mamba-ssm were installed."""
    norms, scans = ModuleType("layernorm_gated"), ModuleType("ssd_combined")
    norms.RMSNorm = GatedNorm
    scans.mamba_split_conv1d_scan_combined = split_conv1d_scan
    scans.mamba_chunk_scan_combined = split_conv1d_scan
    found = {"mamba_ssm.ops.triton.layernorm_gated": norms, "mamba_ssm.ops.triton.ssd_combined": scans}
    packages = {name: ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")}
    with patch.dict(sys.modules, packages | found):
        return importlib.reload(mamba_mixer)


mixer = _mixer_with_kernels()
mamba_layer = ModuleSpec(
    module=MambaLayer,
    submodules=MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(
            module=mixer.MambaMixer,
            submodules=mixer.MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
        ),
        mamba_bda=get_bias_dropout_add,
    ),
)
hybrid_stack_spec = dataclasses.replace(
    local_hybrid_spec.hybrid_stack_spec,
    submodules=dataclasses.replace(local_hybrid_spec.hybrid_stack_spec.submodules, mamba_layer=mamba_layer),
)
