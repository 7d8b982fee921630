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
import statistics
from functools import partial

from _arms import Batches, MegatronArm, add_arguments, initialized, measure_in_turn, start, uniform_plan


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, hidden=128)
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel degree (default 2)")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    """One rank: builds the arms and steps them in turn."""
    values = {
        "hidden-size": options.hidden,
        "seq-length": 64,
        "max-position-embeddings": 64,
        "vocab-size": 512,
        "micro-batch-size": 2,
        "global-batch-size": 4 * options.ranks // options.tp,
        "tensor-model-parallel-size": options.tp,
        "train-iters": options.steps,
    }
    args = initialized(values, "--swiglu")

    import torch

    from galvatron_megatron.plan.strategy import Strategy
    from galvatron_megatron.runtime import attach

    strategy = Strategy(tp=options.tp, dp=options.ranks // options.tp)
    plan = uniform_plan(strategy, args)

    def arm() -> MegatronArm:
        torch.manual_seed(7)
        torch.cuda.manual_seed(7)
        return MegatronArm(args)

    arms = {"stock": arm()}
    attachment = attach.Attachment(plan, args)
    arms["plan"] = arm()
    attachment.detach(keep_groups=True)
    attach.is_left_to_megatron = lambda plan, args: False
    attachment = attach.Attachment(plan, args)
    arms["forced"] = arm()
    attachment.detach(keep_groups=True)
    group = attachment.context.groups.dp
    batches = Batches(args, group.size(), group.rank())
    measure_in_turn({name: partial(one.step, batches) for name, one in arms.items()}, options)


def main() -> None:
    options = parse()
    if options.out is not None:
        measure(options)
        return
    result = start(options.ranks)
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
