"""DeepSpeed's engine around a Megatron model, with an exported file, gives the losses and norms of one rank."""

import pytest

from galvatron_megatron.cli import main
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.serialization import write_plan
from galvatron_megatron.plan.strategy import SequenceParallel, Strategy

pytestmark = pytest.mark.distributed

STEPS, BATCH, LENGTH, VOCABULARY, CLIP = 4, 8, 16, 64, 0.5
MEGATRON = SequenceParallel.MEGATRON
STRATEGIES = [
    Strategy(tp=2, dp=2),
    Strategy(tp=2, dp=2, zero=1),
    Strategy(tp=2, dp=2, zero=2),
    Strategy(tp=2, dp=2, zero=3),
    Strategy(tp=2, dp=2, zero=1, sequence_parallel=MEGATRON),
    Strategy(dp=4, zero=3),
    Strategy(tp=4, zero=1),
]

BY_HAND = STRATEGIES[2]
"""Without our own ``initialize``: it is one of DeepSpeed's calls."""


def plan_of(strategy: Strategy) -> Plan:
    layers = (LayerPlan(kind=LayerKind.BLOCK, strategy=strategy),) * 2
    return Plan(
        pp=1,
        micro_batch_size=BATCH // strategy.dp // 2,
        micro_batches=2,
        base=strategy,
        stages=(StagePlan(layers=layers),),
    )


def build(tp, sequence_parallel):
    """A small GPT on this rank, with the same initial weights under every tp."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(tp)
    torch.manual_seed(3)
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # As the jobs that later tests run in these processes: Megatron keeps the choice in the environment.
        attention_backend=AttnBackend.unfused,
    )
    return GPTModel(config, get_gpt_layer_local_spec(), vocab_size=VOCABULARY, max_sequence_length=LENGTH)


def batches():
    import torch

    generator = torch.Generator().manual_seed(7)
    starts = torch.randint(0, VOCABULARY, (STEPS, BATCH, 1), generator=generator)
    return (starts + torch.arange(LENGTH + 1)) % VOCABULARY


def loss_of(model, samples):
    import torch

    tokens, labels = samples[:, :-1], samples[:, 1:]
    positions = torch.arange(LENGTH).expand(len(samples), -1)
    mask = torch.tril(torch.ones((1, 1, LENGTH, LENGTH))) < 0.5
    return model(tokens, positions, mask, labels=labels).float().mean()


def optimizer_of(model):
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


def train_all(rank, world_size, cases):
    """Losses and norms of one rank, then of the engine for every case."""
    return reference(), [under_deepspeed(strategy, config) for strategy, config in cases]


def reference():
    """Every rank by itself on the whole batch."""
    import torch
    from megatron.core import parallel_state

    model = build(1, False)
    optimizer = optimizer_of(model)
    seen = []
    for samples in batches():
        optimizer.zero_grad()
        loss = loss_of(model, samples)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        seen.append((loss.item(), norm.item()))
    parallel_state.destroy_model_parallel()
    return seen


def under_deepspeed(strategy, path):
    import json

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from galvatron_megatron.integration.deepspeed_engine import ModelParallelUnit, initialize, prepare

    model = build(strategy.tp, strategy.sequence_parallel is MEGATRON)
    optimizer, config = optimizer_of(model), json.loads(path.read_text())
    if strategy == BY_HAND:
        prepare()
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=str(path), mpu=ModelParallelUnit
        )
    else:
        engine = initialize(model, optimizer, path)
    assert engine.zero_optimization_stage() == strategy.zero
    assert ModelParallelUnit.get_model_parallel_world_size() == strategy.tp
    assert ModelParallelUnit.get_data_parallel_world_size() == strategy.dp
    group = ModelParallelUnit.get_data_parallel_group()
    mine = ModelParallelUnit.get_data_parallel_rank()
    size = config["train_micro_batch_size_per_gpu"]
    seen = []
    for samples in batches():
        total = torch.zeros(())
        for micro in range(config["gradient_accumulation_steps"]):
            start = (micro * strategy.dp + mine) * size
            loss = loss_of(engine, samples[start : start + size])
            total += loss.detach() * size / BATCH
            engine.backward(loss)
            engine.step()
        dist.all_reduce(total, group=group)
        norm = engine.get_global_grad_norm()
        # Without ZeRO the engine clips, but keeps no norm of fp32 gradients: the losses tell.
        assert (norm is None) == (strategy.zero == 0)
        seen.append((total.item(), norm if norm is None else float(norm)))
    engine.destroy()
    parallel_state.destroy_model_parallel()
    return seen


def exported(strategy, folder):
    """The file that the command writes for a plan."""
    plan, config = folder / f"{strategy}.yaml", folder / f"{strategy}.json"
    write_plan(plan_of(strategy), plan)
    assert (
        main(["export", str(plan), "--deepspeed", str(config), "--precision=fp32", f"--clip-grad={CLIP}"]) == 0
    )
    return config


def test_every_stage_equals_one_rank(ranks, tmp_path):
    cases = [(strategy, exported(strategy, tmp_path)) for strategy in STRATEGIES]
    for expected, found in ranks(4).run(train_all, cases):
        losses, norms = zip(*expected, strict=True)
        assert losses[-1] < losses[0] - 0.2 and max(norms) > CLIP
        for strategy, seen in zip(STRATEGIES, found, strict=True):
            assert [loss for loss, _ in seen] == pytest.approx(losses, rel=1e-5), strategy
            if strategy.zero:
                assert [norm for _, norm in seen] == pytest.approx(norms, rel=1e-5), strategy
