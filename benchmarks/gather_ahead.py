"""Step time under ZeRO 3 with the next layer's parameters gathered ahead, and with small vectors left whole.

One small model is trained by Megatron's training step on the ranks of this machine; steps that gather every
parameter at use, that gather ahead, and that leave norms whole as well take turns inside one job. The last
then gather norms once more than in a job that always leaves them whole. With ``--link`` the machine plays two
nodes joined by a link of that rate, half the ranks in each (needs root). Prints, for the time that passes and
for the time that rank 0 computes, the medians and the median ratio of turns.

    python benchmarks/gather_ahead.py [--ranks 2] [--steps 60] [--link 1gbit]
"""

import argparse
import statistics

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

SEQUENCE, VOCABULARY, MICRO_BATCH = 128, 512, 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, hidden=256)
    add_accumulation(parser)
    parser.add_argument(
        "--link", help="rate of a link between two nodes made of this machine (1gbit; needs root)"
    )
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    """One rank: builds the model and steps it in turn in all three ways."""
    values = replicated_values(
        options,
        sequence=SEQUENCE,
        vocabulary=VOCABULARY,
        micro_batch=MICRO_BATCH,
        iterations=2 * (options.steps + options.warm_up),
    )
    args = initialized(values)

    import torch.distributed as dist

    from galvatron_megatron.plan.strategy import Strategy
    from galvatron_megatron.runtime import attach

    strategy = Strategy(dp=options.ranks, zero=3)
    attach.install(uniform_plan(strategy, args), args)
    arm = MegatronArm(args)
    batches = Batches(args, options.ranks, dist.get_rank())
    parts = [part for chunk in arm.model for part in chunk.parts.values()]
    (ahead,) = {part.ahead for part in parts}
    vectors = {engine: engine.whole for part in parts for engine in part.engines}

    def step(number: int, *, enabled: bool, whole: bool) -> float:
        ahead.enabled = enabled
        for engine, small in vectors.items():
            engine.leave_whole(small if whole else ())
        return arm.step(batches, number)

    measure_in_turn(
        {
            "at use": lambda number: step(number, enabled=False, whole=False),
            "ahead": lambda number: step(number, enabled=True, whole=False),
            "whole": lambda number: step(number, enabled=True, whole=True),
        },
        options,
    )


def main() -> None:
    options = parse()
    if options.out is not None:
        measure(options)
        return
    result = start(options.ranks, options.link)
    where = f"a link of {options.link}" if options.link else "one node"
    print(f"ZeRO 3, {options.ranks} ranks, {where}, {options.steps} steps of each arm in turn")
    for key, label in (("seconds", "wall"), ("cpu_seconds", "CPU ")):
        for name, values in result[key].items():
            ratios = [value / base for value, base in zip(values, result[key]["at use"], strict=True)]
            milliseconds, ratio = statistics.median(values) * 1e3, statistics.median(ratios)
            print(f"  {name:8s} {label} median {milliseconds:8.2f} ms  median ratio of turns {ratio:.4f}")


if __name__ == "__main__":
    main()
