"""The collectives of the runtime's ZeRO engines are those that the cost model prices, by number and bytes.

Gathering ahead changes when they start and, where layers are computed again, that these gather once for it.
"""

from collections import Counter

import pytest

from galvatron_megatron.cost.counts import layer_counts
from galvatron_megatron.cost.memory import parameter_bytes
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.records.values import gpt_layer
from galvatron_megatron.cost.sharding import gathered_modules, sharding_collectives
from galvatron_megatron.describe.model import Model
from galvatron_megatron.plan.strategy import Recompute, Strategy
from galvatron_megatron.plan.zero_rules import bucket_elements, reduction_buffers

pytestmark = pytest.mark.distributed

LAYERS, HIDDEN, HEADS, WIDTH, LENGTH, SAMPLES = 3, 32, 4, 64, 8, 2
BIASES = HIDDEN + WIDTH + HIDDEN
"""Elements of the biases that a layer's linears hand on: gathered with their linear, and kept."""
MODEL = Model(
    name="three layers",
    hidden_size=HIDDEN,
    seq_length=LENGTH,
    vocab_size=64,
    layers=(gpt_layer(HIDDEN, HEADS, gated=False, ffn=WIDTH, bias=True),) * LAYERS,
)
OPTIONS = RunOptions(implementation="local", deepspeed_zero_1=True)
CASES = [
    (zero, precision, recompute, ahead, keeps)
    for zero in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for recompute in (Recompute.NONE, Recompute.FULL)
    for ahead, keeps in ((False, False), (True, False), (True, True))[: zero if zero > 1 else 1]
]
"""ZeRO stage, precision, recomputation, communication overlaps (parameters are gathered ahead, gradients are
reduced beside the backward pass), small vectors stay whole."""


def count_collectives(rank, world_size, cases, micro_batches):
    """For every case: parameters of a layer, and what one step sends, by (when, kind): [number, bytes].

    Then what stage 3 gathers in the last micro-batch: how many gathers start while only the last layer of the
    forward, and of the backward pass remains, the most elements that are whole, or on their way, at a time, and
    how many hooks modules with and without parameters have.
    Then how many reductions of that micro-batch start before the last layer of its backward pass, and the bytes
    of the buckets in which gradients are reduced.
    """
    import deepspeed.comm as deepspeed_comm
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from galvatron_megatron.runtime import zero_engines
    from galvatron_megatron.runtime.zero_ahead import GatherAhead
    from galvatron_megatron.runtime.zero_optimizer import _vectors

    parallel_state.initialize_model_parallel(1)
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    zero_engines.connect()
    sent, when = {}, ["build"]
    passed, late, early, most_whole, parameters = [0], Counter(), Counter(), [0], []
    engine, buckets = None, []
    backend = deepspeed_comm.comm.cdb

    def recording(kind, call):
        def recorded(*args, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            entry = sent.setdefault((when[0], kind), [0, 0])
            entry[0] += 1
            # Of a gather the output, of a reduction the input: the larger one.
            entry[1] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
            if kind != "all_gather":
                if when[0] == "backward":
                    buckets[:] = bucket_bytes(engine)
                early[when[0]] += passed[0] < LAYERS - 1
            else:
                late[when[0]] += passed[0] == LAYERS - 1
                whole = [
                    p for p in parameters if hasattr(p, "ds_status") and p.ds_status.name != "NOT_AVAILABLE"
                ]
                most_whole[0] = max(most_whole[0], sum(p.ds_numel for p in whole))
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

    def step(engine, ahead, layers, mask, dtype, recompute):
        engine.forget_gradients()
        for _ in range(micro_batches):
            late.clear()
            early.clear()
            when[0], passed[0] = "forward", 0
            ahead.begin("forward")
            hidden = torch.randn(LENGTH, SAMPLES, HIDDEN, dtype=dtype, requires_grad=True)
            for layer in layers:

                def run(value, layer=layer, mask=mask):
                    return layer(value, attention_mask=mask)[0]

                full = recompute is Recompute.FULL
                if passed[0]:
                    hidden.register_hook(lambda _: passed.__setitem__(0, passed[0] + 1))
                hidden = tensor_parallel.checkpoint(run, False, hidden) if full else run(hidden)
                passed[0] += 1
            ahead.end()
            when[0], passed[0] = "backward", 0
            ahead.begin("backward")
            engine.begin_backward()
            hidden.float().square().mean().backward()
            ahead.end()
            engine.end_backward()
        when[0] = "reduction"
        engine.finish_accumulation()
        when[0] = "update"
        engine.apply()

    def bucket_bytes(engine):
        found = [bucket.buffer for bucket in engine.ipg_buckets.values()]
        buffers = [each for buffer in found for each in (buffer if isinstance(buffer, list) else [buffer])]
        return [buffer.numel() * buffer.element_size() for buffer in buffers]

    answers = []
    try:
        for zero, precision, recompute, looks_ahead, keeps in cases:
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
            parameters[:] = [p for layer in layers for p in layer.parameters()]
            size = sum(p.numel() for p in layers[0].parameters())
            engine_options = zero_engines.EngineOptions(
                group=dist.group.WORLD,
                gradient_dtype=torch.float32,
                communication_dtype=torch.float32,
                # A layer fills a bucket.
                bucket_elements=size,
                overlaps=looks_ahead,
            )
            found = [_vectors(module) for layer in layers for module in layer.modules()]
            vectors = [parameter for of_module in found for parameter in of_module]
            names = {p: str(index) for index, p in enumerate(parameters)}
            optimizer = torch.optim.AdamW(parameters, lr=1e-3)
            engine = (
                zero_engines.ShardedStatesEngine(optimizer, names, zero, engine_options)
                if zero < 3
                else zero_engines.ShardedParametersEngine(
                    optimizer, names, layers, [], engine_options, vectors if keeps else ()
                )
            )
            ahead = GatherAhead(layers)
            if looks_ahead and zero == 3:
                ahead.add(engine)
            most_whole[0] = 0
            mask = torch.tril(torch.ones((1, 1, LENGTH, LENGTH))) < 0.5
            # In the first step what stays whole is gathered module by module, and the order of use is learned;
            # in the second one that biases are handed on, which DeepSpeed notices when it happens.
            for _ in range(3 if looks_ahead and zero == 3 else 1):
                sent.clear()
                step(engine, ahead, layers, mask, dtype, recompute)
            hooks = Counter()
            for module in (module for layer in layers for module in layer.modules()):
                hooks[next(module.parameters(), None) is not None] += len(module._forward_hooks)
            gathers = {"late": dict(late), "most_whole": most_whole[0], "hooks": dict(hooks)}
            reductions = {"early": early["backward"], "bucket_bytes": list(buckets)}
            answers.append((size, {key: tuple(value) for key, value in sent.items()}, gathers, reductions))
    finally:
        for name, call in plain.items():
            setattr(backend, name, call)
    return answers


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_is_sent_is_what_is_priced(ranks, micro_batches):
    counts = layer_counts(MODEL, MODEL.layers[0], Strategy(dp=2), SAMPLES, "local")
    for answers in ranks(2).run(count_collectives, CASES, micro_batches):
        for (zero, precision, recompute, ahead, keeps), (parameters, sent, *_) in zip(
            CASES, answers, strict=True
        ):
            # Priced is what the runtime does, which looks ahead: for computing again nothing more is gathered.
            again = 2 if recompute is Recompute.FULL and not ahead else 1
            assert parameters == counts.parameters
            expected = Counter()
            number = Counter()
            for entry in sharding_collectives(
                parameters,
                zero,
                parameter_bytes(precision, OPTIONS),
                modules=gathered_modules(counts, OPTIONS, norms=not keeps),
                deepspeed=OPTIONS.deepspeed_zero_1,
                whole=counts.parameters_apart if keeps else 0,
            ):
                times = LAYERS * (micro_batches if entry.when in ("forward", "backward") else 1)
                times *= again if (entry.when, entry.kind) == ("backward", "all_gather") else 1
                expected[entry.when, entry.kind] += entry.bytes * times
                # One gather of all layers behind the optimizer; the price counts a start for each.
                number[entry.when, entry.kind] += entry.count * (1 if entry.when == "update" else times)
            where = f"zero {zero} {precision} recompute {recompute.value}"
            assert sent.keys() == expected.keys(), where
            for key, (count, total) in sent.items():
                # Biases that linears hand on stay with DeepSpeed until the step; the price gathers them always.
                kept = key[1] == "all_gather" and zero == 3 and not keeps
                passes = LAYERS * micro_batches * again if kept else 0
                size = parameter_bytes(precision, OPTIONS).weight
                assert expected[key] - passes * BIASES * size <= total <= expected[key], (where, key)
                assert count == number[key], (where, key)


def test_the_next_layer_is_on_its_way_before_this_one_is_through(ranks):
    for answers in ranks(2).run(count_collectives, CASES, 3):
        seen = dict(zip(CASES, answers, strict=True))
        for zero, precision, recompute, overlaps, _ in CASES:
            if not overlaps:
                continue
            where = f"zero {zero} {precision} recompute {recompute.value}"
            parameters, sent, gathers, reductions = seen[zero, precision, recompute, True, False]
            _, sent_without, gathers_without, _ = seen[zero, precision, recompute, False, False]
            if zero == 3 and recompute is Recompute.FULL:
                key = ("backward", "all_gather")
                sent_without = {**sent_without, key: tuple(value // 2 for value in sent_without[key])}
            assert sent == sent_without, where
            # Of all layers but the one that is reduced when the pass is over, while those in front compute.
            assert reductions["early"] >= LAYERS - 2 > 0, where
            if zero < 3:
                continue
            assert gathers["hooks"][True] > gathers["hooks"][False] == 0, where
            late, late_without = gathers["late"], gathers_without["late"]
            assert late["forward"] == 0 < late_without["forward"], where
            assert late["backward"] < late_without["backward"], where
            assert late["backward"] == 0, where
            # The price counts this layer and the next; biases that stay until the step are of no size.
            most = gathers["most_whole"]
            assert gathers_without["most_whole"] < most <= 2 * parameters + LAYERS * BIASES, where


@pytest.mark.parametrize("overlaps", [False, True])
def test_buckets_are_as_large_as_the_rule_says(ranks, overlaps):
    wanted = [case for case in CASES if case[0] > 1 and case[2:] == (Recompute.NONE, overlaps, False)]
    answers = ranks(2).run(count_collectives, wanted, 1)[0]
    for (zero, precision, *_), (parameters, _, _, reductions) in zip(wanted, answers, strict=True):
        element = parameter_bytes(precision, OPTIONS)
        # Stage 2 collects gradients as they come, stage 3 in the width in which they are reduced.
        width = element.weight if zero == 2 else element.gradient
        bucket = bucket_elements(LAYERS * parameters, parameters, 2, wanted=parameters)
        assert reductions["bucket_bytes"] == [bucket * width] * reduction_buffers(zero, overlaps), zero
