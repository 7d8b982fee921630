"""Errors that a user can act on.

Every error here is printed as one line without a traceback, and the process that meets it ends with
exit code 2. A programming mistake is not one of them and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_CODE = 2


class GalvatronError(Exception):
    """Bad input or an impossible request: what, where, why and the nearest valid choice, in one line."""


class PlanError(GalvatronError):
    """A plan that is malformed, or does not belong to this model, cluster or world size."""


class DescriptionError(GalvatronError):
    """A model, cluster or profile description that is malformed or cannot be read."""


class SearchError(GalvatronError):
    """A search that was asked something impossible, or in which nothing fits."""


class UnsupportedPlanError(GalvatronError):
    """A plan that is valid but that the runtime cannot execute here."""


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Names the valid choices, the nearest one first.

    Args:
        value: what was given; anything but text is near to nothing.
        choices: what would have been valid.

    Returns:
        Text to append to an error line, e.g. ``"did you mean 'full'? valid: full, none, selective"``.
    """
    valid = sorted(choices)
    near = get_close_matches(value[:100], valid, n=1) if isinstance(value, str) else ()
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}valid: {', '.join(valid)}"
