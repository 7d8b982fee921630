"""ZeRO scales gradients while they are local: sums of replicas in 16 bits overflow no sooner than they must."""

import math
from itertools import product

import pytest

pytestmark = pytest.mark.distributed

LARGE = (30_400.0, 29_600.0, 28_000.0, 27_200.0)
"""A gradient on each of four ranks: their sum is beyond fp16, half of it and their mean are not."""
LEAST = (2.0**-24,) * 4
"""The least gradients that fp16 has: a part of one is none."""
CASES = [
    *product((1, 2, 3), ("float16",), ("float16",), (LARGE,), (0.25, 0.5, 1.0), (1, 2)),
    *product((1, 2, 3), ("float16", "bfloat16", "float32"), ("float32",), (LARGE, LEAST), (0.25,), (1,)),
]
"""ZeRO stage, in which precision gradients are computed, in which they are reduced, what they are, scale,
micro-batches."""


def reduced_gradients(rank, world_size, cases):
    """The elements that a rank keeps of the gradient of a weight, least and largest, for every case."""
    import torch
    import torch.distributed as dist

    from galvatron_megatron.runtime.zero import import_engines

    engines = import_engines()
    answers = []
    for zero, precision, communication, local, scale, micro_batches in cases:
        dtype = getattr(torch, precision)
        module = torch.nn.Linear(48, 4, bias=False, dtype=dtype)
        options = engines.EngineOptions(
            group=dist.group.WORLD,
            gradient_dtype=torch.float32,
            communication_dtype=getattr(torch, communication),
            bucket_elements=module.weight.numel(),
            scale=scale,
        )
        optimizer, names = torch.optim.AdamW(module.parameters(), lr=0.0), {module.weight: "weight"}
        engine = (
            engines.ShardedStatesEngine(optimizer, names, zero, options)
            if zero < 3
            else engines.ShardedParametersEngine(optimizer, names, [module], [], options)
        )
        engine.forget_gradients()
        sample = torch.full((1, 48), local[rank] / micro_batches, dtype=dtype, requires_grad=True)
        for _ in range(micro_batches):
            output = module(sample)
            engine.begin_backward()
            output.sum().backward()
            engine.end_backward()
        engine.finish_accumulation()
        gradient = engine.gradient(0)
        answers.append((gradient.min().item(), gradient.max().item()))
        engine.destroy()
    return answers


def test_gradients_are_scaled_once_and_before_they_are_summed(ranks):
    for answers in ranks(4).run(reduced_gradients, CASES):
        for case, (least, largest) in zip(CASES, answers, strict=True):
            zero, precision, communication, local, scale, micro_batches = case
            expected = scale * sum(local)
            if communication == "float16" and expected > 65504 and (zero == 1 or micro_batches == 1):
                assert math.isinf(largest), case  # as every scale would be, behind the sum
            else:
                rounding = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 0.0}[precision]
                assert least >= expected * (1 - rounding) and largest <= expected * (1 + rounding), case
