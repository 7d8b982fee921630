"""Attaches to Megatron's argument parser: flags, then the plan between parsing and validation.

Three names of ``megatron.training.arguments`` are replaced right after the module has run, so that everything
that imports them later gets the replacements (megatron-core 0.17 to 0.19; a test holds them against the
installed release):

* ``add_megatron_arguments``: adds our group of flags;
* ``parse_args``: reads what the launcher says, checks the flags and installs the device;
* ``validate_args``: finds the plan and sets Megatron's arguments to it, before Megatron validates them.
"""

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

from galvatron_megatron.errors import EXIT_CODE, GalvatronError
from galvatron_megatron.integration.launcher import accepting_local_rank, adopt_environment
from galvatron_megatron.integration.options import Options, add_options, check_flag_names

HOOKED = ("add_megatron_arguments", "parse_args", "validate_args")
"""The replaced names."""


def attach(module: ModuleType) -> None:
    """Adds the flags and what they do to Megatron's argument parser.

    Args:
        module: ``megatron.training.arguments``.
    """
    with one_line_errors():
        missing = [name for name in HOOKED if not hasattr(module, name)]
        if missing:
            raise GalvatronError(
                f"{module.__name__} has no {missing[0]}; valid: megatron-core >= 0.17 and < 0.20"
            )
    if getattr(module, "_galvatron_attached", False):
        return
    module._galvatron_attached = True
    module.add_megatron_arguments = _with_flags(module.add_megatron_arguments)
    module.parse_args = _with_device(module.parse_args)
    module.validate_args = _with_plan(module.validate_args)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with the error in one line and exit code 2 instead of a traceback.

    An error that rank 0 has told the others is printed by rank 0 alone.
    """
    try:
        yield
    except GalvatronError as error:
        from galvatron_megatron.integration.channel import ToldByRankZeroError

        rank = int(os.environ.get("RANK", "0"))
        if not isinstance(error, ToldByRankZeroError):
            where = f" rank {rank}" if rank else ""
            print(f"galvatron{where}: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        add_options(parser)
        _repair_help(parser)
        return parser

    return add_megatron_arguments


def _repair_help(parser: argparse.ArgumentParser) -> None:
    """Makes ``--help`` work: Megatron 0.19 has help texts with a bare percent sign, on which argparse fails."""
    for action in parser._actions:
        try:
            if action.help and action.help is not argparse.SUPPRESS:
                _ = action.help % (vars(action) | {"prog": parser.prog})
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


def _with_device(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def parse_args(extra_args_provider: Any = None, *args: Any, **kwargs: Any) -> Namespace:
        with one_line_errors():
            adopt_environment()
        with errors_of_rank_zero_only():
            check_flag_names(sys.argv[1:])
        parsed = original(accepting_local_rank(extra_args_provider), *args, **kwargs)
        with errors_of_rank_zero_only():
            options = Options.from_arguments(parsed)
            _prepare_device(options, parsed)
        return parsed

    return parse_args


@contextmanager
def errors_of_rank_zero_only() -> Iterator[None]:
    """For checks that every rank makes alike, on the command line alone: one rank is enough to say it."""
    from galvatron_megatron.integration.channel import ToldByRankZeroError

    with one_line_errors():
        try:
            yield
        except GalvatronError as error:
            if int(os.environ.get("RANK", "0")):
                raise ToldByRankZeroError(str(error)) from None
            raise


def _prepare_device(options: Options, args: Namespace) -> None:
    """Installs the device and sets the arguments it needs; says so once."""
    import torch

    if options.plans or options.device == "cpu":
        # Megatron demands it where a plan splits tensors, and it counts only if set before CUDA starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if options.device == "cpu":
        from galvatron_megatron.integration import cpu_device

        is_first = cpu_device.installed() is None
        cpu_device.install(even_with_gpu=options.ignore_gpus)
        changed = cpu_device.configure(args)
        if changed and is_first and args.rank == 0:
            words = ", ".join(f"{name} {_short(new)}" for name, (_, new) in sorted(changed.items()))
            print(f"galvatron: device cpu sets {words}", flush=True)
    elif not torch.cuda.is_available():
        raise GalvatronError(
            "--galvatron-device: cuda, but no GPU is visible; valid: cpu, to train on CPU ranks"
        )


def _short(value: object) -> str:
    return str(getattr(value, "name", value))


def _with_plan(original: Callable[..., Any]) -> Callable[..., Any]:
    state = {"planned": False}

    @wraps(original)
    def validate_args(args: Namespace, defaults: dict[str, Any] = {}) -> Any:  # noqa: B006 Megatron's own
        if state["planned"] or not hasattr(args, "galvatron_auto"):
            return original(args, defaults)
        # Measuring validates arguments of its own.
        state["planned"] = True
        with one_line_errors():
            options = Options.from_arguments(args)
        observe = _observation(options, args, defaults)
        if not options.plans:
            result = original(args, defaults)
            observe(args)
            return result
        from galvatron_megatron.integration.job import PlannedJob

        with one_line_errors():
            job = PlannedJob(args, defaults, options, original)
            job.plan()
            result = job.validate()
            job.start(args)
        observe(args)
        return result

    return validate_args


def _observation(options: Options, args: Namespace, defaults: dict[str, Any]) -> Callable[[Namespace], None]:
    """What starts the observation of a job whose arguments are validated; nothing where none is asked for."""
    if options.observe is None:
        return lambda validated: None
    from galvatron_megatron.integration.observation import Observation

    with errors_of_rank_zero_only():
        observation = Observation(args, defaults, options.observe)

    def install(validated: Namespace) -> None:
        from megatron.training import training

        observation.install(training, validated)

    return install
