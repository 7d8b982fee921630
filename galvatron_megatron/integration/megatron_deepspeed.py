"""The ``--galvatron-plan`` flag on the scripts of Megatron-DeepSpeed.

That repository brings an argument parser of its own (``megatron.arguments``) and runs DeepSpeed's engine. One
name of it is replaced right after the module has run: ``parse_args``, which then reads the plan, parses the
flags that say it, and hands DeepSpeed's configuration on as a dictionary. See ``patches/README.md``.
"""

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from galvatron_megatron.describe.deepspeed_config import deepspeed_config
from galvatron_megatron.describe.megatron_deepspeed import megatron_deepspeed_arguments
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.arguments import errors_of_rank_zero_only, one_line_errors
from galvatron_megatron.integration.options import add_options, check_flag_names
from galvatron_megatron.integration.start_up import FLAG_PREFIX
from galvatron_megatron.plan.line import plan_line
from galvatron_megatron.plan.serialization import read_plan

HOOKED = "parse_args"
"""The replaced name."""
MARK = "_add_zero_args"
"""A name of ``megatron.arguments`` that Megatron-LM, from which the module comes, does not have."""
DECIDED = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--micro-batch-size",
    "--global-batch-size",
    "--rampup-batch-size",
    "--deepspeed",
    "--deepspeed_config",
    "--zero-stage",
    "--no-pipeline-parallel",
    "--sequence-parallel",
    "--ds-sequence-parallel-size",
    "--cpu-optimizer",
    "--remote-device",
    "--recompute-activations",
    "--recompute-granularity",
    "--recompute-method",
    "--recompute-num-layers",
    "--checkpoint-activations",
    "--deepspeed-activation-checkpointing",
)
"""Its flags for what a plan decides."""


def attach(module: ModuleType) -> None:
    """Lets Megatron-DeepSpeed's parser read a plan.

    Args:
        module: ``megatron.arguments``.
    """
    with one_line_errors():
        if not hasattr(module, MARK) or not hasattr(module, HOOKED):
            raise GalvatronError(
                f"{module.__name__}: of a Megatron-LM that is neither megatron-core nor Megatron-DeepSpeed; "
                "valid: megatron-core >= 0.17 and < 0.20, or the commit that patches/README.md names"
            )
    module.parse_args = _with_plan(module.parse_args)


def planned(words: Sequence[str], world_size: int) -> tuple[list[str], dict[str, Any], str]:
    """Puts the flags that say a plan in place of ``--galvatron-plan``.

    Args:
        words: the command line behind the script's name.
        world_size: ranks of the job.

    Returns:
        The command line for Megatron-DeepSpeed, DeepSpeed's configuration, and the plan in a line.

    Raises:
        GalvatronError: there is no plan, it cannot run there, or the command line contradicts it.
    """
    check_flag_names(words)
    own_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(own_parser)
    own, rest = own_parser.parse_known_args(list(words))
    for action in own_parser._actions:
        name = action.option_strings[0]
        if name != f"{FLAG_PREFIX}plan" and getattr(own, action.dest) != action.default:
            raise GalvatronError(
                f"{name}: not with Megatron-DeepSpeed, whose layers are not measured; valid: galvatron search "
                f"--uniform, and {FLAG_PREFIX}plan with what it writes"
            )
    if not own.galvatron_plan:
        raise GalvatronError(
            f"{FLAG_PREFIX}plan: missing, or empty; valid with Megatron-DeepSpeed: a plan's file"
        )
    path = Path(own.galvatron_plan).expanduser()
    plan = read_plan(path)
    if plan.world_size != world_size:
        raise GalvatronError(f"{path}: for {plan.world_size} ranks; valid: {world_size}, as the job has")
    given = {word.split("=", 1)[0] for word in rest}
    for name in DECIDED:
        if name in given:
            raise GalvatronError(f"{name}: beside {FLAG_PREFIX}plan, which says it; valid: leave it out")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num-layers", type=int, default=len(plan.layers))
    parser.add_argument("--clip-grad", type=float, default=1.0)
    for precision in ("bf16", "fp16"):
        parser.add_argument(f"--{precision}", action="store_true")
    model, _ = parser.parse_known_args(rest)
    if model.num_layers != len(plan.layers):
        raise GalvatronError(
            f"{path}: {len(plan.layers)} layers; valid: {model.num_layers}, as --num-layers says"
        )
    precision = "bf16" if model.bf16 else "fp16" if model.fp16 else "fp32"
    document = deepspeed_config(plan, precision=precision, clip_grad=model.clip_grad)
    flags = megatron_deepspeed_arguments(plan, path, stage=document["zero_optimization"]["stage"])
    return [*rest, *flags], document, plan_line(plan)


def _with_plan(original: Callable[..., Namespace]) -> Callable[..., Namespace]:
    @wraps(original)
    def parse_args(*arguments: Any, **named: Any) -> Namespace:
        with errors_of_rank_zero_only():
            words, document, line = planned(sys.argv[1:], int(os.environ.get("WORLD_SIZE", "1")))
        before, sys.argv = sys.argv, [sys.argv[0], *words]
        try:
            args = original(*arguments, **named)
        finally:
            sys.argv = before
        # It takes the content as well as a file's name, and no file has to be on every node.
        args.deepspeed_config = document
        if args.rank == 0:
            print(f"galvatron: {line}, by DeepSpeed's engine", flush=True)
        return args

    return parse_args
