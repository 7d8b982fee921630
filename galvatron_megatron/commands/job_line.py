"""A Megatron command line as a job would read it, ours and Megatron's flags, without Megatron."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from galvatron_megatron.cost.options import RunOptions, run_options
from galvatron_megatron.describe.command_line import RaisingParser, plan_constraints, read_command_line
from galvatron_megatron.describe.megatron_args import model_from_arguments
from galvatron_megatron.describe.megatron_flags import FLAG_OF
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.vocabulary import USUAL_SIZES, UnknownVocabularyError
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.integration.cpu_megatron import SETTINGS
from galvatron_megatron.integration.options import Options, add_options, check_flag_names
from galvatron_megatron.plan.constraints import Constraints

_OF_A_RUN = ("save_plan", "report", "observe", "load_universal", "again", "plan_only", "ignore_gpus")
"""Flags of ours that change no plan and name places of the machine that runs the job."""


@dataclass(kw_only=True, frozen=True, slots=True)
class JobLine:
    """A Megatron command line, read."""

    words: tuple[str, ...]
    """The script and its flags."""
    arguments: Mapping[str, object]
    """Megatron's destinations and values, defaults filled in, as the device of the job sets them."""
    model: Model
    constraints: Constraints
    """What the flags fix by hand."""
    options: RunOptions
    flags: Options
    """Those of ours that concern the plan."""


def is_job_line(words: Sequence[str]) -> bool:
    """Whether a script and its arguments were given, not the name of a file."""
    return len(words) > 1 or (bool(words) and words[0].endswith(".py"))


def without_own_flags(words: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
    """Takes our flags off a command line.

    Args:
        words: a command line, with or without the script.

    Returns:
        The other words in order, and our flags; those that only concern the run of a job as if not given.

    Raises:
        GalvatronError: a flag of ours is unknown or lacks its value.
    """
    check_flag_names(words)
    parser = RaisingParser(allow_abbrev=False, add_help=False)
    add_options(parser)
    own, rest = parser.parse_known_args(list(words))
    for name in _OF_A_RUN:
        setattr(own, f"galvatron_{name}", parser.get_default(f"galvatron_{name}"))
    return rest, own


def read_job_line(words: Sequence[str], *, vocab_size: int | None) -> JobLine:
    """Reads a command line.

    Args:
        words: the script and its flags.
        vocab_size: entries of the vocabulary, where the command line does not say it.

    Raises:
        GalvatronError: a flag has a bad value, or the line describes no model that can be planned for.
    """
    line = read_command_line(words)
    _, own = without_own_flags(line.unknown)
    # What is asked of a job line is its plan, whether or not the job is to ask for it itself.
    own.galvatron_auto = own.galvatron_plan is None
    arguments = line.arguments | {"galvatron_zero_backend": own.galvatron_zero_backend}
    if own.galvatron_device == "cpu":
        arguments |= {name: value for name, value in SETTINGS.items() if name in FLAG_OF}
    return JobLine(
        words=tuple(words),
        arguments=arguments,
        model=_described(arguments, vocab_size, Path(words[0]).stem),
        constraints=plan_constraints(words),
        options=run_options(arguments),
        flags=Options.from_arguments(own),
    )


def _described(given: Mapping[str, object], vocab_size: int | None, name: str) -> Model:
    """The model of a command line; its vocabulary is of the usual size where only files elsewhere tell it.

    Raises:
        DescriptionError: the command line describes no model that can be planned for.
    """
    try:
        return model_from_arguments(given, name=name, vocab_size=vocab_size)
    except UnknownVocabularyError:
        # Megatron's own examples for GPT give the files of GPT-2's tokenizer and no kind.
        kind = given["tokenizer_type"] or ("GPT2BPETokenizer" if given["vocab_file"] else None)
        if kind not in USUAL_SIZES:
            raise
        Console(stderr=True).print(
            f"galvatron: {kind}: its files are not at hand; {USUAL_SIZES[kind]} entries are assumed "
            "(--vocab-size says otherwise)",
            highlight=False,
            soft_wrap=True,
        )
        return model_from_arguments(given, name=name, vocab_size=USUAL_SIZES[kind])


def refuse_beside_job_line(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuses flags of a command that a Megatron command line says itself.

    Raises:
        DescriptionError: names the first one given.
    """
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise DescriptionError(
                f"--{name.replace('_', '-')}: unused beside a Megatron command line, which says it itself; "
                "valid: one of the two"
            )
