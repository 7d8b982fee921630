"""A training job that runs under a plan."""

import shlex
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.channel import Channel
from galvatron_megatron.integration.cpu_device import installed
from galvatron_megatron.integration.decision import Decision
from galvatron_megatron.integration.dependencies import check_dependencies
from galvatron_megatron.integration.measurement import Measurement
from galvatron_megatron.integration.options import Options
from galvatron_megatron.integration.planning import JobPlanner
from galvatron_megatron.integration.presentation import plan_lines
from galvatron_megatron.plan.megatron_arguments import command_line, runs_on_stock_megatron
from galvatron_megatron.plan.serialization import write_plan
from galvatron_megatron.runtime.support import check_given
from galvatron_megatron.runtime.universal_files import UniversalCheckpoint
from galvatron_megatron.runtime.zero import is_left_to_megatron

SEAM = "setup_model_and_optimizer"
"""The function of ``megatron.training.training`` that builds and loads, and behind which universal checkpoints
are read."""


class PlannedJob:
    """One job from its command line to its first iteration; made on every rank.

    Args:
        args: Megatron's parsed arguments, before validation.
        defaults: the script's ``args_defaults``.
        options: our flags.
        validate: Megatron's own ``validate_args``.
    """

    def __init__(
        self,
        args: Namespace,
        defaults: Mapping[str, Any],
        options: Options,
        validate: Callable[..., Any],
    ) -> None:
        self._args = args
        self._options = options
        self._defaults = defaults
        self._validate = validate
        self._channel = Channel(args.rank, args.world_size)
        self.decision: Decision | None = None
        self._universal: str | None = None
        """DeepSpeed's checkpoint that is to be read."""

    def plan(self) -> None:
        """Finds the plan and sets Megatron's arguments to it; ends the job where only the plan is wanted.

        Raises:
            GalvatronError: there is no plan for the job; the same error on every rank.
        """
        args, options = self._args, self._options
        warning = self._channel.share(lambda: check_dependencies(args))
        if warning and args.rank == 0:
            print(f"galvatron: {warning}", file=sys.stderr, flush=True)
        if options.load_universal is not None:
            # Before anything is measured for a job that could not go on.
            self._universal = self._channel.share(lambda: universal_to_read(args, options.load_universal))
        # Every rank reads the same command line; rank 0 is the one to complain about it.
        made: list[JobPlanner] = []
        self._channel.share(lambda: made.append(self._planner()))
        planner = made[0] if made else self._planner()
        self.decision = planner.decide()
        plan = self.decision.plan
        self._channel.share(lambda: planner.apply(plan, args))
        if args.rank:
            planner.apply(plan, args)
        self._channel.share(lambda: check_given(plan, args))
        if not args.rank:
            words = command_line(plan, planner.model, sharding_by_runtime=not runs_on_stock_megatron(plan))
            print("\n".join(plan_lines(self.decision, shlex.join(words))), flush=True)
        self._channel.share(self._save)
        if options.plan_only:
            self._channel.leave()
            sys.exit(0)

    def validate(self) -> Any:
        """Lets Megatron validate its arguments, set to the plan.

        Returns:
            What Megatron's own function returns.

        Raises:
            GalvatronError: Megatron does not accept them; printed once for all ranks.
        """
        try:
            return self._validate(self._args, self._defaults)
        except (AssertionError, ValueError, RuntimeError) as error:
            refusal = GalvatronError(
                f"plan: Megatron does not accept the job's arguments under it: {_said_by(error)}; "
                "valid: change what is named there, or another plan"
            )

        def refuse() -> None:
            raise refusal

        self._channel.share(refuse)
        raise refusal  # rank 0 had no objection

    def start(self, args: Namespace) -> None:
        """Attaches what the plan needs beyond arguments, and the measurement.

        Args:
            args: Megatron's validated arguments.

        Raises:
            GalvatronError: the plan cannot run here.
        """
        # Also a plan that Megatron runs by itself: what it saves must load under the plan of a later job.
        universal = self._universal
        if not is_left_to_megatron(self.decision.plan, args) or args.save or args.load or universal:
            from galvatron_megatron.runtime import attach

            self._channel.share(lambda: attach.check_supported(self.decision.plan, args))
            attach.install(self.decision.plan, args)
        device = installed()
        if device is not None:
            device.memory.restart()
        else:
            torch.cuda.reset_peak_memory_stats()
        from megatron.training import training

        if universal is None:
            end_in_one_line(training, SEAM)
        else:
            # It has no checkpoint yet, which --exit-on-missing-checkpoint would end the job for.
            args.load = None
            go_on_from(Path(universal), training, args)
        Measurement(self.decision, self._channel, args.train_iters, self._options.report).install(training)

    def _planner(self) -> JobPlanner:
        return JobPlanner(
            self._args, self._defaults, self._options, sys.argv[1:], self._channel, self._validate
        )

    def _save(self) -> None:
        if self._options.save_plan is not None:
            write_plan(self.decision.plan, self._options.save_plan)


def _said_by(error: Exception) -> str:
    """An error in one line; a bare assertion as it stands in the source."""
    text = " ".join(str(error).split())
    return text or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__


def universal_to_read(args: Namespace, universal: Path) -> str | None:
    """Where a job goes on from that may have gone on before.

    A job that is started again by the same command line has a checkpoint of its own by then.

    Args:
        args: Megatron's parsed arguments.
        universal: folder of the universal checkpoint.

    Returns:
        The folder; None where ``--load`` holds a checkpoint of Megatron.

    Raises:
        PlanError: the universal checkpoint is to be read and cannot be.
    """
    from megatron.training.checkpointing import checkpoint_exists

    if checkpoint_exists(args.load):
        print(
            f"galvatron: --load {args.load} holds a checkpoint; the universal one is not read again", flush=True
        )
        return None
    UniversalCheckpoint(universal).iteration()
    return str(universal)


def go_on_from(universal: Path, training: ModuleType, args: Namespace) -> None:
    """Makes Megatron read a universal checkpoint as soon as it has built model and optimizer.

    What is wrong with it ends the job with one line.

    Args:
        universal: folder of the checkpoint.
        training: ``megatron.training.training``.
        args: Megatron's validated arguments.
    """
    from galvatron_megatron.runtime.universal import reading_universal

    setattr(training, SEAM, reading_universal(getattr(training, SEAM), universal, args))
    end_in_one_line(training, SEAM)


def end_in_one_line(training: ModuleType, name: str) -> None:
    """Lets errors of a function of Megatron's that a user can act on end the job with one line.

    What all ranks raise together is said by rank 0.

    Args:
        training: ``megatron.training.training``.
        name: of the function.
    """
    # That module imports this one, as late as it can.
    from galvatron_megatron.integration.arguments import errors_of_rank_zero_only, one_line_errors
    from galvatron_megatron.runtime.agreement import AgreedError

    original = getattr(training, name)

    @wraps(original)
    def run(*given: Any, **named: Any) -> Any:
        with one_line_errors():
            try:
                return original(*given, **named)
            except AgreedError:
                with errors_of_rank_zero_only():
                    raise

    setattr(training, name, run)
