"""Who steps states in host memory, and what that needs."""

from argparse import Namespace

import pytest
import torch

from galvatron_megatron.runtime import zero_offload
from galvatron_megatron.runtime.zero_offload import missing_to_step_on_host, step_count


def test_a_device_needs_a_compiler_and_cpu_ranks_do_not(monkeypatch):
    monkeypatch.setattr(zero_offload, "which", lambda command: None if command == "ninja" else command)
    for kind, missing in (("cpu", None), ("cuda", "ninja")):
        tensor = Namespace(device=Namespace(type=kind))
        monkeypatch.setattr(torch, "empty", lambda *a, t=tensor, **k: t)
        assert missing_to_step_on_host() == missing


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_torch_counts_steps_in_tensors_and_deepspeed_in_numbers(kind):
    assert step_count(kind([torch.zeros(1)])).item() == 0.0
    assert step_count(Namespace(ds_opt_adam=object())) == 0
    assert step_count(torch.optim.SGD([torch.zeros(1)])) is None
