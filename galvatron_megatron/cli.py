"""The ``galvatron`` command: parses arguments and hands over to one module of ``commands``.

A module of ``commands`` has ``add_arguments(parser)`` and ``run(arguments) -> int``.
Only the module of the command that was asked for is imported, so that every command starts quickly.
"""

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from galvatron_megatron import __version__
from galvatron_megatron.errors import EXIT_CODE, GalvatronError, did_you_mean
from galvatron_megatron.plan.checks import shown

COMMANDS = {
    "search": "find the fastest plan for a model on a cluster",
    "estimate": "predict step time and memory of one plan or Megatron command line",
    "profile": "measure the cluster and the model on the ranks at hand, or manage stored profiles",
    "export": "write a plan as Megatron arguments or for other tools",
    "validate": "hold the cost model against measured runs",
    "calibrate": "fit a device's constants to measured runs, or a profile to observed jobs",
}


_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of a disk, never of the program."""


class _OneLineParser(argparse.ArgumentParser):
    """Reports a usage error in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(EXIT_CODE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _nearest_flag(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """What may have been meant by the first unknown flag, or ""."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    unknown = next((word.split("=", 1)[0] for word in words if word.startswith("--")), "")
    near = get_close_matches(unknown, flags, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments after the program's name; ``sys.argv[1:]`` by default.

    Returns:
        Exit code: 0 success, 2 bad input or impossible request, 130 interrupted,
        141 nobody reads the output any more.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _OneLineParser(
        prog="galvatron",
        description="Find and run the fastest parallel plan for training a large model with Megatron.",
        epilog="galvatron COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"galvatron_megatron {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_OneLineParser)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        parser.error(f"unknown command {chosen!r}; {did_you_mean(chosen, COMMANDS)}")
    for name, help_line in COMMANDS.items():
        command = commands.add_parser(
            name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}."
        )
        if name == chosen:
            module = import_module(f"galvatron_megatron.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        asked = commands.choices.get(chosen, parser)
        asked.error(f"unrecognized arguments: {shlex.join(unknown)}{_nearest_flag(asked, unknown)}")
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who reads has seen enough (``galvatron ... | head``); nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _OUT_OF_SPACE:
            if error.filename is None:
                raise
            # A name that is too long, or a place that may not be looked into: nothing of the program's making.
            path = shown(str(error.filename))
            print(
                f"galvatron {arguments.command}: {path}: {error.strerror}; valid: a path that can be used",
                file=sys.stderr,
            )
            return EXIT_CODE
        print(f"galvatron {arguments.command}: output cannot be written ({error.strerror})", file=sys.stderr)
        # What is still in the buffer would fail again at exit, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CODE
    except GalvatronError as error:
        print(f"galvatron {arguments.command}: {error}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print(f"galvatron {arguments.command}: interrupted", file=sys.stderr)
        return 130
