"""A job of DeepSpeed's own engine on the tests' model and data, and its universal checkpoint; on ranks only."""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training import training
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from runtime_job import Tokens, arguments, gather_weights, plan_of, set_weights

from galvatron_megatron.describe.deepspeed_config import deepspeed_config
from galvatron_megatron.integration import cpu_device
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
    total = torch.zeros(())
    count = config["gradient_accumulation_steps"]
    for batch in batches(count, config["train_micro_batch_size_per_gpu"], start):
        losses = engine(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
        loss = (losses.float() * batch["loss_mask"]).sum() / batch["loss_mask"].numel()
        total += loss.detach() / count
        engine.backward(loss)
        engine.step()
    dist.all_reduce(total, group=ModelParallelUnit.get_data_parallel_group())
    return float(total) / ModelParallelUnit.get_data_parallel_world_size(), float(engine.get_global_grad_norm())


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


def train_engine(rank, world_size, case, folder, halfway, steps):
    """Trains, saves a universal checkpoint halfway, and trains on; losses, norms and weights of all of it."""
    plan = plan_of(case, world_size)
    sys.argv = ["job", *arguments(case, plan)]
    args = parse_args()
    cpu_device.configure(args)
    validate_args(args, {})
    set_global_variables(args)
    try:
        parallel_state.initialize_model_parallel(args.tensor_model_parallel_size)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        config = gpt_config_from_args(args)
        model = GPTModel(
            config.transformer,
            get_gpt_layer_local_spec(normalization=args.normalization),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.seq_length,
            position_embedding_type=args.position_embedding_type,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        )
        set_weights([model], None)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, args.weight_decay), lr=args.lr, eps=args.adam_eps, betas=(0.9, 0.999)
        )
        content = deepspeed_config(plan, precision="fp32", clip_grad=args.clip_grad)
        engine = initialize(model, optimizer, content)
        seen = [step(engine, content, number * 8) for number in range(halfway)]
        engine.save_checkpoint(folder)
        seen += [step(engine, content, number * 8) for number in range(halfway, steps)]
        dist.barrier()
        if rank == 0:
            convert(folder, f"global_step{halfway}")
        losses, norms = map(list, zip(*seen, strict=True))
        weights = gather_weights([model]) if plan.base.zero < 3 else None
        engine.destroy()
    finally:
        training.destroy_global_state()
    return {"losses": losses, "norms": norms, "weights": weights if rank == 0 else None}
