"""Ulysses as it is priced against Ulysses as it runs: every micro-batch size and recomputation of one layer.

A profile measures two sizes without recomputation and adds the rest to what one rank computes. This measures
everything, on CPU ranks in one session, and prints both.

    torchrun --nproc-per-node 2 benchmarks/ulysses.py [--hidden 128] [--sequence 512] [--batch 16]
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from _small_gpt import add_arguments, size_words

from galvatron_megatron.cost.measured_points import PartTable
from galvatron_megatron.describe.megatron_args import model_from_arguments
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.integration import cpu_device
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.profiler.needs import ProfileNeeds, divisors
from galvatron_megatron.profiler.process_group import rank_from_environment
from galvatron_megatron.profiler.session import profile_live_ranks


class EverythingNeeded(ProfileNeeds):
    """Needs that take nothing from what one rank computes."""

    def is_added(self, kind: SequenceParallel) -> bool:
        """Never."""
        return False


def show(profile: Profile, needs: ProfileNeeds) -> None:
    """Prints measured and priced times of every point, and the mean error."""
    kept = {(tp, size) for tp in needs.ulysses for _, size in needs.settings(tp, SequenceParallel.ULYSSES)}
    exchanged = [point for point in profile.parts if point.sequence_parallel is SequenceParallel.ULYSSES]
    known = [
        point
        for point in profile.parts
        if point not in exchanged
        or (point.recompute is Recompute.NONE and (point.tp, point.micro_batch_size) in kept)
    ]
    table = PartTable(replace(profile, parts=tuple(known)))
    errors = []
    for point in exchanged:
        how = (point.tp, point.sequence_parallel, point.recompute, point.micro_batch_size)
        found = table.lookup(point.part, *how)
        measured = point.forward_seconds + point.backward_seconds
        priced = found.forward_seconds + found.backward_seconds
        name = f"{point.tp} ranks, {point.micro_batch_size:2} samples, recompute {point.recompute.value}"
        bytes_off = found.activation_bytes / point.activation_bytes - 1
        print(
            f"{name:40} measured {measured * 1e3:7.1f} ms, priced {priced * 1e3:7.1f} ms "
            f"({priced / measured - 1:+.1%}), kept bytes {bytes_off:+.2%}"
        )
        if point not in known:
            errors.append(abs(priced / measured - 1))
    print(f"not measured by a profile: mean error {statistics.mean(errors):.1%} of {len(errors)} points")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.set_defaults(hidden=128, sequence=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for the repeats of one point")
    options = parser.parse_args()
    cpu_device.install(even_with_gpu=True)
    from megatron.training.arguments import parse_args

    rank, world_size, _ = rank_from_environment()
    sys.argv = [sys.argv[0], *size_words(options, options.batch), "--lr", "1e-4", "--micro-batch-size", "1"]
    arguments = parse_args()
    cpu_device.configure(arguments)
    model = model_from_arguments(vars(arguments))
    degrees = divisors(world_size)[1:]
    needs = ProfileNeeds.for_job(model, world_size, options.batch, tps=[1], zeros=[0], ulysses=degrees)
    names = needs.__dataclass_fields__
    everything = EverythingNeeded(**{name: getattr(needs, name) for name in names})
    with tempfile.TemporaryDirectory() as store:
        profile, _ = profile_live_ranks(
            model, arguments, everything, Path(store), seconds_per_point=options.seconds, show=False
        )
    if rank == 0:
        show(profile, needs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
