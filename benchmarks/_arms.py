"""What benchmarks share that train several arms of a small model step by step in turn inside one job."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

SMALL_MODEL = {
    "num-layers": 4,
    "num-attention-heads": 8,
    "tokenizer-type": "NullTokenizer",
    "lr": 1e-3,
    "eval-iters": 0,
    "distributed-backend": "gloo",
    "transformer-impl": "local",
    "hidden-dropout": 0.0,
    "attention-dropout": 0.0,
    "position-embedding-type": "rope",
}
"""Megatron's arguments of the model that all arms train."""
SAMPLES = 9_000
"""Of the random tokens that all arms train on."""


def add_arguments(parser: argparse.ArgumentParser, *, hidden: int) -> None:
    """Adds what every such benchmark takes."""
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start (default 2)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each arm (default 60)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps of each arm not counted (default 10)")
    parser.add_argument("--hidden", type=int, default=hidden, help="hidden size (default %(default)s)")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)


def add_accumulation(parser: argparse.ArgumentParser) -> None:
    """Adds the number of micro-batches."""
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step (default 2)")


def replicated_values(
    options: argparse.Namespace, *, sequence: int, vocabulary: int, micro_batch: int, iterations: int
) -> dict[str, object]:
    """Megatron's arguments of a job in which every rank has a replica, beside ``SMALL_MODEL``.

    Args:
        options: of the command line, ``--accumulation`` among them.
        sequence: tokens of a sample.
        vocabulary: words.
        micro_batch: samples of a micro-batch.
        iterations: steps that the job has at most.
    """
    return {
        "hidden-size": options.hidden,
        "seq-length": sequence,
        "max-position-embeddings": sequence,
        "vocab-size": vocabulary,
        "micro-batch-size": micro_batch,
        "global-batch-size": micro_batch * options.ranks * options.accumulation,
        "train-iters": iterations,
        "lr-decay-style": "constant",
        "weight-decay": 0.0,
    }


def uniform_plan(strategy: Any, args: argparse.Namespace) -> Any:
    """The plan that runs every layer alike, for Megatron's arguments.

    Args:
        strategy: of the layers and of the base layout.
        args: Megatron's arguments.
    """
    from galvatron_megatron.plan.layer_kind import LayerKind
    from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan

    return Plan(
        pp=1,
        micro_batch_size=args.micro_batch_size,
        micro_batches=args.global_batch_size // args.micro_batch_size // strategy.dp,
        base=strategy,
        stages=(StagePlan(layers=(LayerPlan(kind=LayerKind.BLOCK, strategy=strategy),) * args.num_layers),),
    )


def start(ranks: int, link: str | None = None) -> dict:
    """Starts this program again on every rank and returns what rank 0 measured.

    Args:
        ranks: to start.
        link: rate of the link between two nodes made of this machine, half the ranks in each; None: one node.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if link is not None:
            script = Path(__file__).parents[1] / "launch" / "two_nodes.sh"
            launcher = ["bash", str(script), link, str(ranks // 2), sys.executable]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        words = [*launcher, *sys.argv, "--out", str(out)]
        if subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
            raise SystemExit("a rank failed")
        return json.loads(out.read_text())


def initialized(values: Mapping[str, object], *flags: str) -> argparse.Namespace:
    """Starts Megatron on this rank, on the CPU where there is no GPU, and returns its arguments.

    Args:
        values: Megatron's arguments beside those of the small model.
        flags: those without a value.
    """
    import torch
    import torch.distributed as dist

    from galvatron_megatron.integration import cpu_device

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        cpu_device.install()
    dist.init_process_group("gloo")

    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron

    words = [word for name, value in {**SMALL_MODEL, **values}.items() for word in (f"--{name}", str(value))]
    sys.argv = ["benchmark", *words, *flags, "--mock-data", "--no-check-for-nan-in-loss-and-grad"]
    args = parse_args()
    cpu_device.configure(args)
    validate_args(args, {})
    set_global_variables(args)
    initialize_megatron()
    return args


class MegatronArm:
    """Model and optimizer as Megatron's own training sets them up, and its training step.

    Args:
        args: Megatron's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.enums import ModelType
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.utils import get_model_config
        from megatron.training import training
        from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

        container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=container,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.config = get_model_config(self.model[0])
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        for chunk in self.model:
            chunk.train()

    def step(self, batches: "Batches", number: int) -> float:
        """One training step; returns its loss."""
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.training import training

        result = training.train_step(
            batches.forward_step,
            RerunDataIterator(batches.of(number)),
            self.model,
            self.optimizer,
            self.scheduler,
            self.config,
            get_forward_backward_func(),
            iteration=number,
        )
        return float(result[0]["lm loss"])


class Batches:
    """Random tokens, equal for all arms.

    Args:
        args: Megatron's.
        replicas: data-parallel ranks.
        replica: this one's number among them.
    """

    def __init__(self, args: argparse.Namespace, replicas: int, replica: int) -> None:
        import torch

        self.samples, self.batch = args.micro_batch_size, args.global_batch_size
        self.replicas, self.replica = replicas, replica
        length = args.seq_length
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, 500, (SAMPLES + 1_000, length + 1), generator=generator)
        self.mask = torch.ones(1, 1, length, length).tril().lt(0.5)
        self.positions = torch.arange(length).expand(self.samples, -1)

    def of(self, step: int) -> Iterator[tuple[Any, Any]]:
        """Inputs and labels of the micro-batches of a step."""
        for micro in range(self.batch // self.samples // self.replicas):
            sample = step * self.batch + (micro * self.replicas + self.replica) * self.samples
            first = sample % SAMPLES
            rows = self.tokens[first : first + self.samples]
            yield rows[:, :-1], rows[:, 1:]

    def forward_step(self, iterator: Iterator, model: Any) -> tuple[Any, Callable]:
        """Megatron's forward step: output and loss function."""
        import torch

        inputs, labels = next(iterator)
        output = model(inputs, self.positions, self.mask, labels=labels)

        def loss(losses: Any) -> tuple:
            total = losses.sum()
            count = torch.tensor(losses.numel(), dtype=torch.int)
            return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

        return output, loss


def measure_in_turn(arms: Mapping[str, Callable[[int], float]], options: argparse.Namespace) -> None:
    """Steps the arms in turn, each turn beginning with another one; rank 0 writes seconds and losses.

    Beside the time that passes goes the time that the rank computes, which other programs hardly change.

    Args:
        arms: name -> function that does a step of this number and returns its loss.
        options: of the program.
    """
    import torch
    import torch.distributed as dist

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    computing: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for step in range(options.steps + options.warm_up):
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            dist.barrier()
            begin, computed = time.perf_counter(), time.process_time()
            loss = arms[name](step)
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
            computing[name].append(time.process_time() - computed)
            losses[name].append(loss)
    if dist.get_rank() == 0:
        kept = {
            key: {name: values[options.warm_up :] for name, values in measured.items()}
            for key, measured in (("seconds", seconds), ("cpu_seconds", computing))
        }
        options.out.write_text(json.dumps({**kept, "losses": losses}))
    dist.barrier()
