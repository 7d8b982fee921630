"""Megatron's switches that decide which code computes a layer, apart from the layer's shape and the plan."""

from argparse import Namespace
from enum import Enum

import torch

from galvatron_megatron.describe.switches import USUAL_VALUES

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "fp8"}


def switches_of(arguments: Namespace) -> str:
    """The switches that differ from Megatron's defaults, as ``name=value`` in alphabetical order.

    Measurements made under other switches are of other code: they are filed apart.

    Args:
        arguments: Megatron's, parsed; validated or not.
    """
    found = []
    for name, usual in USUAL_VALUES.items():
        value = getattr(arguments, name, usual)
        if isinstance(value, torch.dtype):
            value = _DTYPES[value]
        elif isinstance(value, Enum):
            value = value.name
        elif isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        if value != usual:
            found.append(f"{name}={value}")
    return " ".join(sorted(found))
