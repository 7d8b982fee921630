"""Whole parameters, where nothing is sharded."""

import sys

import torch

from galvatron_megatron.runtime.zero_whole import whole_parameters


def test_deepspeed_is_not_imported_where_nothing_is_sharded(monkeypatch):
    # Its first import settles which device it takes, which a job under ZeRO has to say before.
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad(), whole_parameters([layer], keep_changes=True):
        layer.weight.fill_(3.0)
    assert layer.weight.eq(3.0).all()
