"""Where reports for people are printed."""

import os
import sys

from rich.console import Console

_PAGE_COLUMNS = 140


def terminal() -> Console:
    """The terminal; where the output is none (a file, a pipe), a page wide enough for the tables."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return Console()
    return Console(width=_PAGE_COLUMNS)
