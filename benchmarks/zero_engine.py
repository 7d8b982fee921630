"""Step time of layers sharded by ZeRO 1 or 2 under Megatron's loop, against DeepSpeed's own engine.

Two arms train the same small model on the ranks of this machine, step by step in turn inside one job:

* engine: DeepSpeed's engine as its documentation uses it, with a plain loop around it;
* runtime: Megatron's training step under a uniform plan of that stage, on DeepSpeed's optimizer classes.

Same weights, batches, accumulation, clipping and bucket size. Prints the medians, their ratio, and how far
apart the losses are.

    python benchmarks/zero_engine.py [--stage 2] [--ranks 2] [--steps 60]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEQUENCE, VOCABULARY, MICRO_BATCH = 64, 512, 2
BUCKET = 1_000_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2), help="ZeRO stage (default 2)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start (default 2)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each arm (default 60)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps of each arm not counted (default 10)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default 256)")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step (default 2)")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def megatron_arguments(options: argparse.Namespace) -> list[str]:
    values = {
        "num-layers": 4,
        "hidden-size": options.hidden,
        "num-attention-heads": 8,
        "seq-length": SEQUENCE,
        "max-position-embeddings": SEQUENCE,
        "vocab-size": VOCABULARY,
        "tokenizer-type": "NullTokenizer",
        "micro-batch-size": MICRO_BATCH,
        "global-batch-size": MICRO_BATCH * options.ranks * options.accumulation,
        "train-iters": options.steps + options.warm_up,
        "lr": 1e-3,
        "lr-decay-style": "constant",
        "weight-decay": 0.0,
        "eval-iters": 0,
        "ddp-bucket-size": BUCKET,
        "distributed-backend": "gloo",
        "transformer-impl": "local",
        "hidden-dropout": 0.0,
        "attention-dropout": 0.0,
        "position-embedding-type": "rope",
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    words += ["--use-distributed-optimizer"] if options.stage == 1 else []
    return [*words, "--mock-data", "--no-check-for-nan-in-loss-and-grad"]


def measure(options: argparse.Namespace) -> None:
    """One rank: builds both arms and steps them in turn."""
    import torch
    import torch.distributed as dist

    from galvatron_megatron.integration import cpu_device

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        cpu_device.install()
    dist.init_process_group("gloo")

    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.utils import get_model_config, unwrap_model
    from megatron.training import training
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron

    from galvatron_megatron.plan.layer_kind import LayerKind
    from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
    from galvatron_megatron.plan.strategy import Strategy
    from galvatron_megatron.runtime import attach
    from galvatron_megatron.runtime.zero import import_engines

    sys.argv = ["benchmark", *megatron_arguments(options)]
    args = parse_args()
    cpu_device.configure(args)
    validate_args(args, {})
    set_global_variables(args)
    initialize_megatron()
    args.galvatron_zero_backend = "deepspeed"
    strategy = Strategy(dp=options.ranks, zero=options.stage)
    layers = (LayerPlan(kind=LayerKind.BLOCK, strategy=strategy),) * args.num_layers
    plan = Plan(
        pp=1,
        micro_batch_size=MICRO_BATCH,
        micro_batches=options.accumulation,
        base=strategy,
        stages=(StagePlan(layers=layers),),
    )
    attach.install(plan, args)
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    model, optimizer, scheduler = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=container,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    weights = {name: value.detach().clone() for name, value in unwrap_model(model[0]).named_parameters()}
    attach.attached().detach(keep_groups=True)

    import_engines()
    import deepspeed

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
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                "overlap_comm": False,
            },
        },
    )

    tokens = torch.randint(0, 500, (10_000, SEQUENCE + 1), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).tril().lt(0.5)
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
    rank = dist.get_rank()

    def batches(step):
        for micro in range(options.accumulation):
            first = (step * args.global_batch_size + (micro * options.ranks + rank) * MICRO_BATCH) % 9_000
            rows = tokens[first : first + MICRO_BATCH]
            yield rows[:, :-1], rows[:, 1:]

    def forward_step(iterator, chunk):
        inputs, labels = next(iterator)
        output = chunk(inputs, positions, mask, labels=labels)

        def loss(losses):
            total = losses.sum()
            count = torch.tensor(losses.numel(), dtype=torch.int)
            return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

        return output, loss

    def runtime_step(step):
        result = training.train_step(
            forward_step,
            RerunDataIterator(batches(step)),
            model,
            optimizer,
            scheduler,
            config,
            get_forward_backward_func(),
            iteration=step,
        )
        return float(result[0]["lm loss"])

    def engine_step(step):
        total = torch.zeros(())
        for inputs, labels in batches(step):
            loss = engine(inputs, positions, mask, labels=labels).mean()
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        return float(total) / options.accumulation / options.ranks

    arms = {"engine": engine_step, "runtime": runtime_step}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {name: [] for name in arms}
    for step in range(options.steps + options.warm_up):
        for name in list(arms)[:: 1 if step % 2 else -1]:
            dist.barrier()
            begin = time.perf_counter()
            loss = arms[name](step)
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
            losses[name].append(loss)
    if rank == 0:
        counted = {name: values[options.warm_up :] for name, values in seconds.items()}
        options.out.write_text(json.dumps({"seconds": counted, "losses": losses}))
    dist.barrier()


def main() -> None:
    options = parse()
    if options.out is not None:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [f"--nproc-per-node={options.ranks}", __file__, *sys.argv[1:], "--out", str(out)]
        subprocess.run([*launcher, *words], check=True, stdout=subprocess.DEVNULL)
        result = json.loads(out.read_text())
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    apart = max(
        abs(a - b) / a for a, b in zip(result["losses"]["engine"], result["losses"]["runtime"], strict=True)
    )
    print(f"ZeRO {options.stage}, {options.ranks} ranks, {options.steps} steps of each arm in turn")
    for name, value in medians.items():
        print(f"  {name:8s} median {value * 1e3:8.2f} ms  ratio {value / medians['engine']:.4f}")
    print(f"  losses differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
