"""Who steps states in host memory, and what that needs."""

from argparse import Namespace

import pytest
import torch

from galvatron_megatron import host_adam as module
from galvatron_megatron.host_adam import host_adam, missing_to_step_on_host


def test_a_device_needs_a_compiler_and_cpu_ranks_do_not(monkeypatch):
    monkeypatch.setattr(module, "which", lambda command: None if command == "ninja" else command)
    for kind, missing in (("cpu", None), ("cuda", "ninja")):
        tensor = Namespace(device=Namespace(type=kind))
        monkeypatch.setattr(torch, "empty", lambda *a, t=tensor, **k: t)
        assert missing_to_step_on_host() == missing


@pytest.mark.parametrize("decoupled", [True, False])
def test_cpu_ranks_step_as_torch_does(monkeypatch, decoupled):
    monkeypatch.setattr(module, "on_cpu", lambda: True)
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.5}
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    weights = [torch.ones(3), torch.ones(3)]
    optimizers = [kind([weights[0]], **settings), host_adam([weights[1]], **settings, decoupled=decoupled)]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
    assert torch.equal(*weights) and not torch.equal(weights[0], torch.ones(3))
