"""The collectives of the runtime's ZeRO engines are those that the cost model prices, by number and bytes."""

from collections import Counter

import pytest

from galvatron_megatron.cost.counts import layer_counts
from galvatron_megatron.cost.memory import parameter_bytes
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.records.values import gpt_layer
from galvatron_megatron.cost.sharding import gathered_modules, sharding_collectives
from galvatron_megatron.describe.model import Model
from galvatron_megatron.plan.strategy import Recompute, Strategy

pytestmark = pytest.mark.distributed

LAYERS, HIDDEN, HEADS, WIDTH, LENGTH, SAMPLES = 2, 32, 4, 64, 8, 2
NORM_MODULES, NORMS = 2, 2 * 2 * HIDDEN
"""Norms of a layer, and their parameters."""
MODEL = Model(
    name="two layers",
    hidden_size=HIDDEN,
    seq_length=LENGTH,
    vocab_size=64,
    layers=(gpt_layer(HIDDEN, HEADS, gated=False, ffn=WIDTH, bias=True),) * LAYERS,
)
OPTIONS = RunOptions(implementation="local", deepspeed_zero_1=True)
CASES = [
    (zero, precision, recompute)
    for zero in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for recompute in (Recompute.NONE, Recompute.FULL)
]


def count_collectives(rank, world_size, cases, micro_batches):
    """For every case: parameters of a layer, and what one step sends, by (when, kind): [number, bytes]."""
    import os

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.comm as deepspeed_comm
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from galvatron_megatron.runtime import zero_engines

    parallel_state.initialize_model_parallel(1)
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    zero_engines.connect()
    sent, when = {}, ["build"]
    backend = deepspeed_comm.comm.cdb

    def recording(kind, call):
        def recorded(*args, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            entry = sent.setdefault((when[0], kind), [0, 0])
            entry[0] += 1
            # Of a gather the output, of a reduction the input: the larger one.
            entry[1] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
            return call(*args, **kwargs)

        return recorded

    kinds = {
        "all_reduce": "all_reduce",
        "reduce": "reduce",
        "all_gather": "all_gather",
        "all_gather_into_tensor": "all_gather",
        "reduce_scatter": "reduce_scatter",
        "reduce_scatter_tensor": "reduce_scatter",
    }
    plain = {name: getattr(backend, name) for name in kinds}
    for name, kind in kinds.items():
        setattr(backend, name, recording(kind, plain[name]))
    answers = []
    try:
        for zero, precision, recompute in cases:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            config = TransformerConfig(
                num_layers=LAYERS,
                hidden_size=HIDDEN,
                num_attention_heads=HEADS,
                ffn_hidden_size=WIDTH,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                use_cpu_initialization=True,
                params_dtype=dtype,
                bf16=precision == "bf16",
            )
            submodules = get_gpt_layer_local_spec().submodules
            layers = [TransformerLayer(config, submodules, layer_number=n + 1) for n in range(LAYERS)]
            layers = [layer.to(dtype) for layer in layers]
            parameters = [p for layer in layers for p in layer.parameters()]
            size = sum(p.numel() for p in layers[0].parameters())
            engine_options = zero_engines.EngineOptions(
                group=dist.group.WORLD,
                gradient_dtype=torch.float32,
                communication_dtype=torch.float32,
                # A layer fills a bucket.
                bucket_elements=size,
            )
            names = {p: str(index) for index, p in enumerate(parameters)}
            optimizer = torch.optim.AdamW(parameters, lr=1e-3)
            engine = (
                zero_engines.ShardedStatesEngine(optimizer, names, zero, engine_options)
                if zero < 3
                else zero_engines.ShardedParametersEngine(optimizer, names, layers, [], engine_options)
            )
            sent.clear()
            mask = torch.tril(torch.ones((1, 1, LENGTH, LENGTH))) < 0.5
            engine.forget_gradients()
            for _ in range(micro_batches):
                when[0] = "forward"
                hidden = torch.randn(LENGTH, SAMPLES, HIDDEN, dtype=dtype, requires_grad=True)
                for layer in layers:

                    def run(value, layer=layer, mask=mask):
                        return layer(value, attention_mask=mask)[0]

                    full = recompute is Recompute.FULL
                    hidden = tensor_parallel.checkpoint(run, False, hidden) if full else run(hidden)
                when[0] = "backward"
                engine.begin_backward()
                hidden.float().square().mean().backward()
                engine.end_backward()
            when[0] = "reduction"
            engine.finish_accumulation()
            when[0] = "update"
            engine.apply()
            answers.append((size, {key: tuple(value) for key, value in sent.items()}))
    finally:
        for name, call in plain.items():
            setattr(backend, name, call)
    return answers


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_is_sent_is_what_is_priced(ranks, micro_batches):
    counts = layer_counts(MODEL, MODEL.layers[0], Strategy(dp=2), SAMPLES, "local")
    for answers in ranks(2).run(count_collectives, CASES, micro_batches):
        for (zero, precision, recompute), (parameters, sent) in zip(CASES, answers, strict=True):
            assert parameters == counts.parameters
            expected = Counter()
            number = Counter()
            for entry in sharding_collectives(
                parameters,
                zero,
                parameter_bytes(precision, OPTIONS),
                modules=gathered_modules(counts, OPTIONS),
                recompute=recompute,
                deepspeed=OPTIONS.deepspeed_zero_1,
            ):
                times = LAYERS * (micro_batches if entry.when in ("forward", "backward") else 1)
                expected[entry.when, entry.kind] += entry.bytes * times
                # One gather of all layers behind the optimizer; the price counts a start for each.
                number[entry.when, entry.kind] += entry.count * (1 if entry.when == "update" else times)
            where = f"zero {zero} {precision} recompute {recompute.value}"
            assert sent.keys() == expected.keys(), where
            for key, (count, total) in sent.items():
                # What stage 3 gathered for a norm stays until the step; the price gathers it every time.
                kept = key[1] == "all_gather" and zero == 3
                passes = LAYERS * micro_batches * (2 if recompute is Recompute.FULL else 1) if kept else 0
                size = parameter_bytes(precision, OPTIONS).weight
                assert expected[key] - passes * NORMS * size <= total <= expected[key], (where, key)
                assert number[key] - passes * NORM_MODULES <= count <= number[key], (where, key)
