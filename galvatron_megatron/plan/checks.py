"""Checks of single values, and how a value is shown in an error line."""

import reprlib

from galvatron_megatron.errors import GalvatronError, PlanError

GREATEST = 2**31 - 1
"""The largest degree, count or size: Megatron, NCCL and torch keep sizes of a dimension in 32 bits."""

MOST_LAYERS = 100_000
"""A model or plan with more layers is taken for a mistake in a count."""

_LONGEST_SHOWN = 100


class _Short(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to turn an integer of thousands of digits into text.
        return repr(value) if value.bit_length() < 64 else f"an integer of {value.bit_length()} bits"


_SHORT = _Short(maxlevel=2, maxlist=4, maxtuple=4, maxdict=4, maxset=4, maxstring=60, maxother=60)


def shown(value: object) -> str:
    """A value as one short line, whatever was read: huge numbers and lists that hold themselves included."""
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def require_count(value: object, where: str, *, least: int = 1, error: type[GalvatronError] = PlanError) -> int:
    """Makes sure that a value is a degree, count or size.

    Args:
        value: what was given.
        where: name of the field, with its document, for the message.
        least: the smallest valid integer.
        error: what to raise.

    Returns:
        The value.

    Raises:
        GalvatronError: of the given class; no integer (a boolean is none), or one out of range.
    """
    if type(value) is not int or value < least:
        raise error(f"{where}: {shown(value)}; valid: an integer >= {least}")
    if value > GREATEST:
        raise error(f"{where}: {shown(value)}; valid: an integer from {least} to {GREATEST}")
    return value
