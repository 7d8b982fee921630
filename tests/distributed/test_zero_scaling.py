"""ZeRO scales gradients while they are local: sums over replicas in 16 bits then overflow no sooner than means."""

import math
from itertools import product

import pytest

pytestmark = pytest.mark.distributed

LOCAL = (30_400.0, 29_600.0, 28_000.0, 27_200.0)
"""A gradient on each of four ranks: their sum is beyond fp16, half of it and their mean are not."""
CASES = [
    *product((1, 2, 3), ("float16",), (0.25, 0.5, 1.0), (1, 2)),
    *product((1, 2, 3), ("bfloat16", "float32"), (0.25,), (2,)),
]
"""ZeRO stage, in which precision gradients are computed and reduced, scale, micro-batches."""


def reduced_gradients(rank, world_size, cases):
    """The elements that a rank keeps of the gradient of a weight, least and largest, for every case."""
    import torch
    import torch.distributed as dist

    from galvatron_megatron.runtime.zero import import_engines

    engines = import_engines()
    answers = []
    for zero, precision, scale, micro_batches in cases:
        dtype = getattr(torch, precision)
        module = torch.nn.Linear(48, 4, bias=False, dtype=dtype)
        options = engines.EngineOptions(
            group=dist.group.WORLD,
            gradient_dtype=torch.float32,
            communication_dtype=dtype,
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
        sample = torch.full((1, 48), LOCAL[rank] / micro_batches, dtype=dtype, requires_grad=True)
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


def test_sums_of_scaled_gradients_overflow_no_sooner_than_they_must(ranks):
    for answers in ranks(4).run(reduced_gradients, CASES):
        for (zero, precision, scale, micro_batches), (least, largest) in zip(CASES, answers, strict=True):
            where = f"zero {zero}, {precision}, scale {scale}, {micro_batches} micro-batches"
            expected = scale * sum(LOCAL)
            if precision == "float16" and expected > 65504 and (zero == 1 or micro_batches == 1):
                # What scaling behind the sum would meet at every scale.
                assert math.isinf(largest), where
            else:
                rounding = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 0.0}[precision]
                assert least >= expected * (1 - rounding) and largest <= expected * (1 + rounding), where
