"""One rank of a training job: runs case after case through Megatron's own ``pretrain()``.

Imported on ranks only (see ``runtime_rank``). A case is a plan, model arguments and options; every case starts
from the same weights, which depend on nothing but the name of the parameter in a distributed checkpoint.
"""

import argparse
import functools
import gc
import hashlib
import os
import queue
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.enums import ModelType
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import unwrap_model
from megatron.training import pretrain, training
from megatron.training.argument_utils import (
    ArgumentGroupFactory,
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from runtime_cases import CLIP
from runtime_collectives import priced, record_collectives
from runtime_communicators import created_again, record_communicators
from runtime_memory import measure_at_norm, predicted
from runtime_mutations import MUTATIONS
from runtime_overlap import watch_resharding
from runtime_saves import measure_saves
from runtime_sharding import kept_states, planned_states

from galvatron_megatron.integration import cpu_device
from galvatron_megatron.integration.job import go_on_from
from galvatron_megatron.integration.observation import Observation
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy
from galvatron_megatron.runtime import attach
from galvatron_megatron.runtime.checkpoint import initialise_states
from galvatron_megatron.runtime.zero import is_left_to_megatron
from galvatron_megatron.runtime.zero_whole import whole_parameters

# Megatron reads and parses the source of its config classes anew for every parser it builds: a third of a short
# case. What the fields say there is told in --help alone.
_factory = object.__new__(ArgumentGroupFactory)
_read_fields = ArgumentGroupFactory._get_field_docstrings
_fields = functools.cache(lambda config: _read_fields(_factory, config))
ArgumentGroupFactory._get_field_docstrings = lambda _, config: _fields(config)
# What the imported packages made is never garbage; looking through it again and again is an eighth of a case.
gc.collect()
gc.freeze()


def read_arguments() -> None:
    """Reads what Megatron's command line has, once for all processes that are forked afterwards."""
    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


SEQUENCE = 16
VOCABULARY = 64


KINDS = {
    "*": LayerKind.ATTENTION,
    "-": LayerKind.MLP,
    "E": LayerKind.MOE,
    "M": LayerKind.MAMBA,
    "b": LayerKind.BLOCK,
    "e": LayerKind.MOE_BLOCK,
}


def strategy_of(words: str, ranks: int) -> Strategy:
    """A strategy from words such as ``"tp2+megatron zero1 recompute-full"``; dp fills the stage."""
    values = {}
    for word in words.split():
        if word.startswith("tp"):
            degree, _, parallel = word[2:].partition("+")
            values["tp"] = int(degree)
            if parallel:
                values["sequence_parallel"] = SequenceParallel(parallel)
        elif word.startswith("cp"):
            values["cp"] = int(word[2:])
        elif word.startswith("etp"):
            values["expert_tensor_parallel"] = int(word[3:])
        elif word.startswith("ep"):
            values["expert_parallel"] = int(word[2:])
        elif word.startswith("zero"):
            values["zero"] = int(word[4:])
        elif word.startswith("recompute-"):
            values["recompute"] = Recompute(word.removeprefix("recompute-"))
        elif word.startswith("offload-"):
            values["offload"] = Offload(word.removeprefix("offload-"))
        else:
            raise ValueError(word)
    return Strategy(dp=ranks // values.get("tp", 1) // values.get("cp", 1), **values)


def plan_of(case: dict, world_size: int) -> Plan:
    """The plan of a case: ``base``, ``stages`` (lists of strategies in words), ``pp``, ``virtual``, ..."""
    pp = case.get("pp", 1)
    ranks = world_size // pp
    pattern = case.get("pattern")
    kinds = iter(
        [KINDS[letter] for letter in pattern.replace("|", "")]
        if pattern
        else [KINDS[letter] for letter in case.get("blocks", "b" * sum(map(len, case["stages"])))]
    )
    base = strategy_of(case["base"], ranks)
    micro = case.get("micro_batch", 8 // base.dp // case.get("micro_batches", 2))
    return Plan(
        pp=pp,
        virtual_stages=case.get("virtual", 1),
        micro_batch_size=micro,
        micro_batches=8 // base.dp // micro,
        base=base,
        stages=tuple(
            StagePlan(layers=tuple(LayerPlan(kind=next(kinds), strategy=strategy_of(w, ranks)) for w in words))
            for words in case["stages"]
        ),
    )


def arguments(case: dict, plan: Plan) -> list[str]:
    """Megatron's command line of a case."""
    model = {
        "num-layers": len(plan.layers),
        "hidden-size": 32,
        "num-attention-heads": 4,
        "ffn-hidden-size": 64,
        "seq-length": SEQUENCE,
        "max-position-embeddings": SEQUENCE,
        "make-vocab-size-divisible-by": 8,
        "vocab-size": VOCABULARY,
        "tokenizer-type": "NullTokenizer",
        "micro-batch-size": plan.micro_batch_size,
        "global-batch-size": plan.global_batch_size,
        "tensor-model-parallel-size": plan.base.tp,
        "pipeline-model-parallel-size": plan.pp,
        "lr": 7e-3,
        "lr-decay-style": "constant",
        "lr-warmup-iters": 0,
        "weight-decay": 0.01,
        "clip-grad": CLIP,
        "adam-eps": 1e-5,
        "seed": 1234,
        "eval-iters": 0,
        "eval-interval": 1000,
        "log-interval": 1,
        "hidden-dropout": 0.0,
        "attention-dropout": 0.0,
        "init-method-std": 0.1,
        "distributed-backend": "gloo",
        "transformer-impl": "local",
        "num-workers": 0,
    }
    flags = {"log-num-zeros-in-grad", "no-check-for-nan-in-loss-and-grad", "mock-data"}
    if plan.base.sequence_parallel is SequenceParallel.MEGATRON:
        flags.add("sequence-parallel")
    if plan.base.zero == 1:
        flags.add("use-distributed-optimizer")
    pattern = case.get("pattern")
    if pattern:
        del model["num-layers"]
        model["hybrid-layer-pattern"] = pattern
    elif plan.pp > 1:
        parts = ["t" * len(stage.layers) for stage in plan.stages]
        parts[0], parts[-1] = "E" + parts[0], parts[-1] + "L"
        model["pipeline-model-parallel-layout"] = "|".join(parts)
    for name, value in case.get("arguments", {}).items():
        if value is True:
            flags.add(name)
        elif value is None:
            model.pop(name, None)
        else:
            model[name] = value
    words = [word for name, value in model.items() for word in (f"--{name}", str(value))]
    return words + [f"--{flag}" for flag in sorted(flags)]


class Tokens(torch.utils.data.Dataset):
    """Sequences in which the next token mostly follows from the last: something to learn.

    Args:
        first: number of the first sequence.
    """

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = np.random.default_rng(self.first + index)
        tokens = [int(generator.integers(VOCABULARY - 4))]
        for noise in generator.random(SEQUENCE):
            step = 7 * tokens[-1] + 3 if noise < 0.8 else int(noise * 1000)
            tokens.append(step % (VOCABULARY - 4))
        row = torch.tensor(tokens)
        mask = torch.ones(SEQUENCE)
        mask[: index % 3] = 0.0
        return {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(SEQUENCE),
            "attention_mask": torch.ones(1, SEQUENCE, SEQUENCE).tril().lt(0.5),
        }


def datasets(_samples, vp_stage=None):
    return Tokens(), Tokens(first=10_000), None


datasets.is_distributed = True


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])

    def loss(losses):
        mask = batch["loss_mask"].view(-1).float()
        total = torch.sum(losses.view(-1).float() * mask)
        # The same number of tokens on every rank and micro-batch: the mean of means is the mean.
        tokens = torch.tensor(float(mask.numel()))
        report = torch.stack([total.detach(), tokens])
        return total, tokens.to(torch.int), {"lm loss": report}

    return output, loss


def dying(when: dict):
    """A forward step during which one rank is killed, in the middle of a training step."""
    calls = 0

    def step(data_iterator, model):
        nonlocal calls
        calls += 1
        if dist.get_rank() == when["rank"] and calls > when["calls"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward_step(data_iterator, model)

    return step


def full_value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of that name in every case, whatever the vocabulary is padded to."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])
    rows = (max(shape[0], 256), *shape[1:]) if "embedding" in key or "output_layer" in key else shape
    values = np.random.default_rng(seed).standard_normal(rows)[: shape[0]]
    if "norm" in key and key.endswith("weight"):
        return torch.from_numpy(1 + 0.1 * values)
    return torch.from_numpy(0.15 * values)


def shards(models) -> list[ShardedTensor]:
    found = []
    for model in unwrap_model(models):
        state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        apply_factories(state)
        found += [v for v in nested_values(state) if isinstance(v, ShardedTensor)]
    return found


def place(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a piece lies in the whole; leading dimensions that only the whole has are experts, one by one."""
    shape = (1,) * (len(offset) - len(shape)) + tuple(shape)
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def local_slice(full: torch.Tensor, shard: ShardedTensor) -> torch.Tensor:
    return full[place(shard.global_offset, shard.data.shape)]


def set_weights(models, optimizer) -> None:
    with torch.no_grad(), whole_parameters(unwrap_model(models), keep_changes=True):
        for shard in shards(models):
            part = local_slice(full_value(shard.key, shard.global_shape), shard)
            shard.data.copy_(part.to(shard.data.dtype).view_as(shard.data))
    if optimizer is not None:
        optimizer.reload_model_params()


def copies_differ(models) -> float:
    """Largest difference between what ranks hold of the same piece of a weight (0 is right)."""
    mine = {(s.key, tuple(s.global_offset)): s.data.detach().float().numpy().copy() for s in shards(models)}
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    first, worst = {}, 0.0
    for owned in gathered:
        for key, value in owned.items():
            reference = first.setdefault(key, value)
            worst = max(worst, float(np.abs(reference - value).max(initial=0.0)))
    return worst


def gather_whole(mine: list[tuple]) -> dict[str, np.ndarray]:
    """Whole tensors on every rank, from key, whole shape, offset and value of what each rank holds."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    whole = {}
    for key, shape, offset, value in (entry for owned in gathered for entry in owned):
        full = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
        full[place(offset, value.shape)] = value
    return whole


def gather_weights(models) -> dict[str, np.ndarray]:
    """Whole weights on every rank, in fp32."""
    return gather_whole(
        [
            (s.key, tuple(s.global_shape), tuple(s.global_offset), s.data.detach().float().numpy().copy())
            for s in shards(models)
        ]
    )


def build_iterators_without_drawing(original):
    """A data loader draws its seed from the host's generator, which on CPU ranks is the device's as well."""

    @functools.wraps(original)
    def build(*arguments_):
        with torch.random.fork_rng(devices=[]):
            return original(*arguments_)

    return build


def load_with_torch_adam():
    """Lets stock Megatron load its distributed optimizer's states where Adam is torch's.

    It expects Transformer Engine's, which needs no states before the first step and keeps no step among them.
    """
    state_dict = DistributedOptimizer.state_dict
    load = DistributedOptimizer.load_parameter_state_from_fully_reshardable

    def with_states(self):
        initialise_states(self)
        return state_dict(self)

    def without_steps(self, loaded):
        states = self.optimizer.state.values()
        steps = [state.pop("step") for state in states]
        load(self, loaded)
        for state, step in zip(states, steps, strict=True):
            state["step"] = step.clone()

    DistributedOptimizer.state_dict = with_states
    DistributedOptimizer.load_parameter_state_from_fully_reshardable = without_steps

    def undo():
        DistributedOptimizer.state_dict = state_dict
        DistributedOptimizer.load_parameter_state_from_fully_reshardable = load

    return undo


def run_case(case: dict) -> dict:
    """Trains one case and returns losses, gradient norms, zero counts and the final weights."""
    world_size = dist.get_world_size()
    plan = plan_of(case, world_size)
    seen = {"losses": [], "norms": [], "zeros": [], "skipped": [], "evaluated": [], "weights_after": {}}
    seen["loss_scales"] = []
    # Without asynchronous saving only this process uses the queue; Megatron would start a process to serve it.
    filesystem_async._results_queue = queue.Queue()
    sys.argv = ["job", *arguments(case, plan)]
    args = parse_args()
    cpu_device.configure(args)
    observation = Observation(args, {}, Path(case["observe"])) if case.get("observe") else None
    late = case.get("late_arguments", {})
    if case.get("measure"):
        seen["predicted"] = predicted(args, plan, late)
    if case.get("collectives"):
        seen["priced"] = priced(args, plan, late)
    validate_args(args, {})
    for name, value in late.items():
        setattr(args, name, value)
    set_global_variables(args)
    real_step, real_setup = training.train_step, training.setup_model_and_optimizer
    real_evaluate = training.evaluate
    real_iterators = training.build_train_valid_test_data_iterators
    models, optimizers, undone, communicators = [], [], [], []
    undone.append(record_communicators(communicators))
    if case.get("mutation"):
        undone.append(MUTATIONS[case["mutation"]]())
    if case.get("detached"):
        undone.append(load_with_torch_adam())
    if case.get("watch"):
        seen["exchanges"] = []
        undone.append(watch_resharding(seen["exchanges"], models))

    if case.get("collectives"):
        seen["sent"] = []
        undone.append(record_collectives(seen["sent"]))

    def setup(*arguments_, **options):
        model, optimizer, scheduler = real_setup(*arguments_, **options)
        if args.iteration == 0 and not case.get("keep_weights"):
            set_weights(model, optimizer)
        models.extend(model)
        optimizers.append(optimizer)
        if case.get("measure"):
            seen["live"] = measure_at_norm(model, optimizer)
        if args.save:
            undone.append(measure_saves(seen.setdefault("saves", []), model, optimizer))
        return model, optimizer, scheduler

    def step(*arguments_, **options):
        if case.get("collectives"):
            seen["sent"].append({})
        result = real_step(*arguments_, **options)
        if result[0]:
            seen["losses"].append(float(result[0]["lm loss"]))
        seen["skipped"].append(int(result[1]))
        seen["loss_scales"].append(float(optimizers[0].get_loss_scale()))
        seen["norms"].append(None if result[5] is None else float(result[5]))
        seen["zeros"].append(None if result[6] is None else float(result[6]))
        if len(seen["skipped"]) in case.get("weights_after", ()):
            seen["weights_after"][len(seen["skipped"])] = gather_weights(models)
        return result

    def evaluate(*arguments_, **options):
        result = real_evaluate(*arguments_, **options)
        if result[0]:
            seen["evaluated"].append(float(result[0]["lm loss"]))
        return result

    training.train_step, training.setup_model_and_optimizer = step, setup
    training.evaluate = evaluate
    if case.get("universal"):
        go_on_from(Path(case["universal"]), training, args)
    training.build_train_valid_test_data_iterators = build_iterators_without_drawing(real_iterators)
    try:
        if not case.get("detached"):
            attach.install(plan, args)
        if observation is not None:
            observation.install(training, args)
        config = hybrid_config_from_args(args) if case.get("pattern") else gpt_config_from_args(args)
        pretrain(
            pretrain_cfg_container_from_args(args, config),
            datasets,
            ModelType.encoder_or_decoder,
            dying(case["dies"]) if "dies" in case else forward_step,
        )
        attachment = attach.attached()
        seen["planned"] = not is_left_to_megatron(plan, args)
        if seen["planned"]:
            seen["created"] = sum(ours for _, ours in communicators)
            seen["states"] = kept_states(models)
            seen["planned_states"] = planned_states(plan, attachment.context.zero_backend)
            seen["received_bytes"] = attachment.context.traffic.received_bytes
        seen["weights"] = gather_weights(models)
        seen["copies_differ"] = copies_differ(models)
        for name in ("losses", "evaluated"):
            known = [None] * world_size
            dist.all_gather_object(known, seen[name])
            seen[name] = next((values for values in known if values), [])
        again = [None] * world_size
        dist.all_gather_object(again, created_again(communicators, world_size))
        seen["created_again"] = sorted({ranks for found in again for ranks in found})
        kept = [None] * world_size
        dist.all_gather_object(kept, seen.get("states", set()))
        seen["states"] = set().union(*kept)
    finally:
        training.train_step, training.setup_model_and_optimizer = real_step, real_setup
        training.evaluate = real_evaluate
        training.build_train_valid_test_data_iterators = real_iterators
        for undo in undone:
            undo()
        attach.uninstall()
        for model in models:
            model.config.grad_scale_func = None  # the optimizer, which keeps stock models alive as well
        training.destroy_global_state()
    return seen
