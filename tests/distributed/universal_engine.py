"""A job of DeepSpeed's own engine on the tests' model and data, and its universal checkpoint; on ranks only."""

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training import training
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from runtime_job import Tokens, arguments, gather_weights, plan_of, set_weights
from universal_foreign import ForeignGPT, GPTModelPipe, foreign_info

from galvatron_megatron.describe.deepspeed_config import deepspeed_config
from galvatron_megatron.integration import cpu_device, deepspeed_engine
from galvatron_megatron.integration.deepspeed_engine import ModelParallelUnit, initialize


def parameter_groups(model, decay):
    """As Megatron groups them: what has one dimension does not decay."""
    flat = [weight for weight in model.parameters() if weight.dim() == 1]
    rest = [weight for weight in model.parameters() if weight.dim() > 1]
    return [{"params": rest, "weight_decay": decay}, {"params": flat, "weight_decay": 0.0}]


def batches(count, size, start):
    """A rank's micro-batches of one step after another, as Megatron's sampler deals them out."""
    data, ranks = Tokens(), ModelParallelUnit.get_data_parallel_world_size()
    mine = ModelParallelUnit.get_data_parallel_rank()
    for number in range(count):
        first = start + (number * ranks + mine) * size
        rows = [data[index] for index in range(first, first + size)]
        yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def step(engine, config, start):
    """One step; its loss over all samples and its gradient norm."""
    count = config["gradient_accumulation_steps"]
    found = batches(count, config["train_micro_batch_size_per_gpu"], start)
    if isinstance(engine.module, GPTModelPipe):
        stream = (((b["tokens"], b["position_ids"]), (b["labels"], b["loss_mask"])) for b in found)
        return float(engine.train_batch(stream)), norm_of(engine)
    total = torch.zeros(())
    for batch in found:
        losses = engine(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
        loss = (losses.float() * batch["loss_mask"]).sum() / batch["loss_mask"].numel()
        total += loss.detach() / count
        engine.backward(loss)
        engine.step()
    dist.all_reduce(total, group=ModelParallelUnit.get_data_parallel_group())
    return float(total) / ModelParallelUnit.get_data_parallel_world_size(), norm_of(engine)


def norm_of(engine):
    """The gradient norm of the last step."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def convert(folder, tag):
    """DeepSpeed's own conversion, in this process."""
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(Path(folder) / tag),
            output_folder=str(Path(folder) / f"{tag}_universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )


def model_of(case, args, plan):
    """The model: of Megatron-core, or under Megatron-DeepSpeed's names (``foreign``)."""
    config = gpt_config_from_args(args).transformer
    if plan.pp > 1:
        config = copy.copy(config)
        config.pipeline_model_parallel_size, config.pipeline_model_parallel_layout = 1, None
        return GPTModelPipe(config, args, plan.pp)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )
    return ForeignGPT(model) if case.get("foreign") else model


def number_alike():
    """Ranks go on counting modules and parameters from the same numbers, which DeepSpeed compares.

    It counts by process: where jobs before this one had pipelines, ranks have seen different ones.
    """
    (counts,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    numbers = torch.tensor([counts[0], Init.param_id])
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    counts[0], Init.param_id = numbers.tolist()


def engine_of(case, args, plan, **more):
    """DeepSpeed's engine around the model, and its configuration."""
    deepspeed_engine.prepare()
    number_alike()
    model = model_of(case, args, plan)
    set_weights([model], None)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), lr=args.lr, eps=args.adam_eps, betas=(0.9, 0.999)
    )
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"
    content = deepspeed_config(plan, precision=precision, clip_grad=args.clip_grad) | more
    if args.fp16:
        # DeepSpeed asks whether the processor has instructions for it, which torch does without.
        get_accelerator().is_fp16_supported = lambda: True
        content["fp16"] |= {
            "initial_scale_power": int(math.log2(args.initial_loss_scale)),
            "loss_scale_window": args.loss_scale_window,
            "hysteresis": args.hysteresis,
        }
    info = deepspeed_engine.universal_checkpoint_info
    if case.get("foreign") or plan.pp > 1:
        deepspeed_engine.universal_checkpoint_info = lambda _: foreign_info(args, pipeline=plan.pp > 1)
    try:
        if plan.pp == 1:
            return initialize(model, optimizer, content), content
        return initialize_pipeline(model, optimizer, content), content
    finally:
        deepspeed_engine.universal_checkpoint_info = info


def initialize_pipeline(model, optimizer, content):
    """As a user of DeepSpeed's pipeline does, without this package."""
    import deepspeed

    model.universal_checkpoint_info = deepspeed_engine.universal_checkpoint_info(model)
    model.register_state_dict_post_hook(deepspeed_engine._tensors_alone)
    content["zero_optimization"] |= {"overlap_comm": False}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=content, dist_init_required=False
    )
    return engine


def train_engine(rank, world_size, case, folder, halfway, steps):
    """Trains, saves a universal checkpoint halfway, and trains on; what it saw of all of it.

    ``reload``: trains on from what DeepSpeed itself reads of the universal checkpoint.
    """
    plan = plan_of(case, world_size)
    sys.argv = ["job", *arguments(case, plan)]
    args = parse_args()
    cpu_device.configure(args)
    validate_args(args, {})
    set_global_variables(args)
    tag = f"global_step{halfway}"
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        engine, content = engine_of(case, args, plan)
        seen = [step(engine, content, number * 8) for number in range(halfway)]
        # Megatron-DeepSpeed adds its arguments, and counts by itself.
        args.consumed_train_samples = halfway * 8
        own = {"args": args, "iteration": halfway} if case.get("foreign") or plan.pp > 1 else {}
        engine.save_checkpoint(folder, tag=tag, client_state=own)
        skipped = engine.skipped_steps
        dist.barrier()
        if rank == 0:
            convert(folder, tag)
        dist.barrier()
        if case.get("reload"):
            engine.destroy()
            engine, content = engine_of(case, args, plan, checkpoint={"load_universal": True})
            engine.load_checkpoint(folder, tag=f"{tag}_universal")
        seen += [step(engine, content, number * 8) for number in range(halfway, steps)]
        losses, norms = map(list, zip(*seen, strict=True))
        weights = gather_weights([engine.module]) if plan.base.zero < 3 else None
        optimizer, scale = type(engine.optimizer).__name__, getattr(engine.optimizer, "cur_scale", None)
        engine.destroy()
    finally:
        training.destroy_global_state()
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights if rank == 0 else None,
        "optimizer": optimizer,
        "skipped": skipped,
        "scale": scale,
    }
