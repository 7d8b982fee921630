"""Megatron's switches beside a plan, as flags of the commands that take a model file."""

import argparse

from galvatron_megatron.cost.options import RunOptions, run_options
from galvatron_megatron.describe.megatron_flags import FLAG_OF
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.describe.switches import USUAL_VALUES, switches_of_profile
from galvatron_megatron.plan.runnable import ZERO_BACKENDS

SWITCHES = (
    "overlap_grad_reduce",
    "overlap_param_gather",
    "tp_comm_overlap",
    "ddp_bucket_size",
    "grad_reduce_in_bf16",
    "accumulate_allreduce_grads_in_fp32",
    "main_grads_dtype",
    "num_distributed_optimizer_instances",
    "transformer_impl",
)
"""Megatron's destinations."""


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, in a group of their own."""
    group = parser.add_argument_group("how the job runs beside the plan")
    for dest in SWITCHES:
        FLAG_OF[dest].add_to(group, "as Megatron's flag of this name")
    group.add_argument(
        "--zero-backend",
        choices=ZERO_BACKENDS,
        help="who shards, as --galvatron-zero-backend of a job (default: megatron ZeRO 1, deepspeed the rest)",
    )


def given_switches(arguments: argparse.Namespace) -> list[str]:
    """Names of the flags that were given."""
    return [name for name in (*SWITCHES, "zero_backend") if getattr(arguments, name, None) is not None]


def options_of(arguments: argparse.Namespace, model: Model, profile: Profile | None = None) -> RunOptions:
    """The switches of a job that trains a model.

    Args:
        arguments: with the flags that were given.
        model: says the precision.
        profile: says under which switches layers were measured, where the flags do not.
    """
    measured = {} if profile is None else switches_of_profile(profile)
    # A switch that is on reads True; what is not listed has its usual value.
    known = {
        name: USUAL_VALUES[name] is False or value
        for name, value in measured.items()
        if name in SWITCHES and name in USUAL_VALUES
    }
    given = {name: getattr(arguments, name) for name in SWITCHES if hasattr(arguments, name)}
    precision = {name: model.precision == name for name in ("bf16", "fp16")}
    backend = {"galvatron_zero_backend": arguments.zero_backend}
    return run_options(precision | known | given | backend)
