"""Step time of layers sharded by ZeRO under Megatron's loop, against DeepSpeed's own engine.

Two arms train the same small model on the ranks of this machine, step by step in turn inside one job:

* engine: DeepSpeed's engine as its documentation uses it, with a plain loop around it;
* runtime: Megatron's training step under a uniform plan of that stage, on DeepSpeed's optimizer classes.

Same weights, batches, accumulation, clipping and bucket size (the runtime's). Under ZeRO 3 all arms leave
vectors whole, and a third one takes part:

* bounded: DeepSpeed's engine, prefetching, with no more parameters whole at a time than the runtime has: two
  layers, none kept between its forward and its backward pass. As DeepSpeed's defaults are, up to 10^9 elements
  stay whole from the forward pass on: all of a model that is not larger, which is then gathered half as often.

Prints, for the time that passes and for the time that rank 0 computes, the medians and the median ratio of
turns to both kinds of engine, and how far apart the losses are.

    python benchmarks/zero_engine.py [--stage 1|2|3] [--ranks 2] [--steps 60]
"""

import argparse
import statistics
from functools import partial
from typing import Any

from _arms import (
    Batches,
    MegatronArm,
    add_accumulation,
    add_arguments,
    initialized,
    measure_in_turn,
    replicated_values,
    start,
    uniform_plan,
)

SEQUENCE, VOCABULARY, MICRO_BATCH = 64, 512, 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, hidden=256)
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3), help="ZeRO stage (default 2)")
    add_accumulation(parser)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    """One rank: builds both arms and steps them in turn."""
    values = replicated_values(
        options,
        sequence=SEQUENCE,
        vocabulary=VOCABULARY,
        micro_batch=MICRO_BATCH,
        iterations=options.steps + options.warm_up,
    )
    args = initialized(values, *(["--use-distributed-optimizer"] if options.stage == 1 else []))

    import torch
    import torch.distributed as dist
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.utils import unwrap_model
    from megatron.training.arguments import core_transformer_config_from_args

    from galvatron_megatron.plan.strategy import Strategy
    from galvatron_megatron.runtime import attach
    from galvatron_megatron.runtime.zero import import_engines
    from galvatron_megatron.runtime.zero_whole import whole_parameters

    args.galvatron_zero_backend = "deepspeed"
    strategy = Strategy(dp=options.ranks, zero=options.stage)
    attach.install(uniform_plan(strategy, args), args)
    runtime = MegatronArm(args)
    sharded = unwrap_model(runtime.model[0])
    with whole_parameters([sharded]):
        weights = {name: value.detach().clone() for name, value in sharded.named_parameters()}
    (bucket,) = {
        int(part_engine.reduce_bucket_size)
        for part in runtime.model[0].parts.values()
        for part_engine in part.engines
    }
    attach.attached().detach(keep_groups=True)

    import_engines()
    import deepspeed

    def engine_of(**limits: int) -> Any:
        plain = GPTModel(
            core_transformer_config_from_args(args),
            get_gpt_layer_local_spec(),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=SEQUENCE,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        )
        plain.load_state_dict(weights, strict=False)
        engine, *_ = deepspeed.initialize(
            model=plain,
            optimizer=torch.optim.AdamW(
                plain.parameters(),
                lr=args.lr,
                eps=args.adam_eps,
                weight_decay=0.0,
                betas=(args.adam_beta1, args.adam_beta2),
            ),
            config={
                "train_micro_batch_size_per_gpu": MICRO_BATCH,
                "gradient_accumulation_steps": options.accumulation,
                "gradient_clipping": args.clip_grad,
                "zero_optimization": {
                    "stage": options.stage,
                    "reduce_bucket_size": bucket,
                    "allgather_bucket_size": bucket,
                    "overlap_comm": False,
                    "stage3_param_persistence_threshold": 4 * options.hidden,
                    **limits,
                },
            },
        )
        return engine

    batches = Batches(args, options.ranks, dist.get_rank())

    def engine_step(engine: Any, number: int) -> float:
        total = torch.zeros(())
        for inputs, labels in batches.of(number):
            loss = engine(inputs, batches.positions, batches.mask, labels=labels).mean()
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        return float(total) / options.accumulation / options.ranks

    arms = {"engine": partial(engine_step, engine_of()), "runtime": partial(runtime.step, batches)}
    if options.stage == 3:
        layer = sum(value.numel() for name, value in weights.items() if ".layers.0." in name)
        bounded = engine_of(
            stage3_max_live_parameters=2 * layer, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=layer
        )
        arms["bounded"] = partial(engine_step, bounded)
    measure_in_turn(arms, options)


def main() -> None:
    options = parse()
    if options.out is not None:
        measure(options)
        return
    result = start(options.ranks)
    losses = result["losses"]
    apart = max(abs(a - b) / a for name in losses for a, b in zip(losses["engine"], losses[name], strict=True))
    print(f"ZeRO {options.stage}, {options.ranks} ranks, {options.steps} steps of each arm in turn")
    for key, label in (("seconds", "wall"), ("cpu_seconds", "CPU ")):
        for name, values in result[key].items():
            line = (
                f"  {name:8s} {label} median {statistics.median(values) * 1e3:8.2f} ms  median ratio of turns"
            )
            for base in [base for base in ("engine", "bounded") if base in result[key]]:
                ratios = [value / other for value, other in zip(values, result[key][base], strict=True)]
                line += f"  {statistics.median(ratios):.4f} of {base}"
            print(line)
    print(f"  losses differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
