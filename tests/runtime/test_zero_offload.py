"""How optimizers count their steps."""

from argparse import Namespace

import pytest
import torch

from galvatron_megatron.runtime.zero_offload import step_count


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_torch_counts_steps_in_tensors_and_deepspeed_in_numbers(kind):
    assert step_count(kind([torch.zeros(1)])).item() == 0.0
    assert step_count(Namespace(ds_opt_adam=object())) == 0
    assert step_count(torch.optim.SGD([torch.zeros(1)])) is None
