"""What the runtime costs where all layers run alike: step time against stock Megatron, interleaved.

Three arms train the same small model on the ranks of this machine, step by step in turn inside one job:

* stock: Megatron alone;
* plan: the same job with its uniform plan attached, which leaves the work to Megatron's own code;
* forced: planned layers, data parallelism and optimizer of the runtime although nothing needs them, which is
  what a mixed plan costs beyond the work it asks for.

Prints the medians, their ratios to stock, the median of the ratios within each turn (what else the machine does
in a turn slows all arms of it), and whether the losses are equal to the bit.

    python benchmarks/runtime_uniform.py [--ranks 2] [--steps 60] [--tp 2]
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start (default 2)")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel degree (default 2)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each arm (default 60)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps of each arm not counted (default 10)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size (default 128)")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(options: argparse.Namespace) -> dict:
    """Starts the ranks and returns what rank 0 measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        common = {
            **os.environ,
            "WORLD_SIZE": str(options.ranks),
            "LOCAL_WORLD_SIZE": str(options.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, str(HERE), *sys.argv[1:], "--out", str(out)],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(options.ranks)
        ]
        exit_codes = [process.wait() for process in ranks]
        if any(exit_codes):
            raise SystemExit("a rank failed")
        return json.loads(out.read_text())


def megatron_arguments(options: argparse.Namespace) -> list[str]:
    values = {
        "num-layers": 4,
        "hidden-size": options.hidden,
        "num-attention-heads": 8,
        "seq-length": 64,
        "max-position-embeddings": 64,
        "vocab-size": 512,
        "tokenizer-type": "NullTokenizer",
        "micro-batch-size": 2,
        "global-batch-size": 4 * options.ranks // options.tp,
        "tensor-model-parallel-size": options.tp,
        "train-iters": options.steps,
        "lr": 1e-3,
        "eval-iters": 0,
        "distributed-backend": "gloo",
        "transformer-impl": "local",
        "hidden-dropout": 0.0,
        "attention-dropout": 0.0,
        "position-embedding-type": "rope",
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*words, "--mock-data", "--swiglu", "--no-check-for-nan-in-loss-and-grad"]


def measure(options: argparse.Namespace) -> None:
    """One rank: builds both arms and steps them in turn."""
    import time

    import torch
    import torch.distributed as dist

    from galvatron_megatron.integration import cpu_device

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        cpu_device.install()
    dist.init_process_group("gloo")

    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.utils import get_model_config
    from megatron.training import training
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron

    from galvatron_megatron.plan.layer_kind import LayerKind
    from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
    from galvatron_megatron.plan.strategy import Strategy
    from galvatron_megatron.runtime import attach

    sys.argv = ["benchmark", *megatron_arguments(options)]
    args = parse_args()
    cpu_device.configure(args)
    validate_args(args, {})
    set_global_variables(args)
    initialize_megatron()
    strategy = Strategy(tp=options.tp, dp=options.ranks // options.tp)
    plan = Plan(
        pp=1,
        micro_batch_size=args.micro_batch_size,
        micro_batches=args.global_batch_size // args.micro_batch_size // strategy.dp,
        base=strategy,
        stages=(StagePlan(layers=(LayerPlan(kind=LayerKind.BLOCK, strategy=strategy),) * 4),),
    )

    def build():
        torch.manual_seed(7)
        torch.cuda.manual_seed(7)
        container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        model, optimizer, scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=container,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        return model, optimizer, scheduler

    def arm():
        model, optimizer, scheduler = build()
        config = get_model_config(model[0])
        config.grad_scale_func = optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        for chunk in model:
            chunk.train()
        return model, optimizer, scheduler, config

    arms = {"stock": arm()}
    attachment = attach.Attachment(plan, args)
    arms["plan"] = arm()
    attachment.detach(keep_groups=True)
    attach.is_left_to_megatron = lambda plan, args: False
    attachment = attach.Attachment(plan, args)
    arms["forced"] = arm()
    attachment.detach(keep_groups=True)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 500, (10_000, 65), generator=generator)
    group = attachment.context.groups.dp
    step_func = get_forward_backward_func()

    def batches(step):
        samples = args.micro_batch_size
        for micro in range(plan.micro_batches):
            first = (step * args.global_batch_size + (micro * group.size() + group.rank()) * samples) % 9_000
            rows = tokens[first : first + samples]
            yield rows[:, :-1], rows[:, 1:]

    mask = torch.ones(1, 1, 64, 64).tril().lt(0.5)
    positions = torch.arange(64).expand(args.micro_batch_size, -1)

    def forward_step(iterator, model):
        inputs, labels = next(iterator)
        output = model(inputs, positions, mask, labels=labels)

        def loss(losses):
            total = losses.sum()
            count = torch.tensor(losses.numel(), dtype=torch.int)
            return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

        return output, loss

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for step in range(options.steps + options.warm_up):
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            model, optimizer, scheduler, config = arms[name]
            dist.barrier()
            begin = time.perf_counter()
            result = training.train_step(
                forward_step,
                RerunDataIterator(batches(step)),
                model,
                optimizer,
                scheduler,
                config,
                step_func,
                iteration=step,
            )
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
            losses[name].append(float(result[0]["lm loss"]))
    if dist.get_rank() == 0:
        counted = {name: values[options.warm_up :] for name, values in seconds.items()}
        options.out.write_text(json.dumps({"seconds": counted, "losses": losses}))
    dist.barrier()


def main() -> None:
    options = parse()
    if options.out is not None:
        measure(options)
        return
    result = start(options)
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    print(f"uniform plan, {options.ranks} ranks, tp {options.tp}, {options.steps} steps of each arm in turn")
    for name, value in medians.items():
        equal = "equal" if result["losses"][name] == result["losses"]["stock"] else "NOT equal"
        ratio = value / medians["stock"]
        turns = zip(result["seconds"][name], result["seconds"]["stock"], strict=True)
        paired = statistics.median(own / stock for own, stock in turns)
        print(
            f"  {name:7s} median {value * 1e3:8.2f} ms  ratio {ratio:.4f}  within turns {paired:.4f}  "
            f"losses {equal} to the bit"
        )


if __name__ == "__main__":
    main()
