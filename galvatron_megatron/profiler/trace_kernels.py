"""Marks functions that a compiler makes one kernel of, so that a trace counts them as one.

Stands in for ``torch.compile``, with which Megatron fuses activations, dropout and residual additions; it has
to be in place before Megatron is imported, so this module imports nothing of it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any


def run_plainly(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls the function: nothing is recorded."""
    return function(*args, **kwargs)


run_kernel: Callable[[Callable[..., Any], Any, Any], Any] = run_plainly
"""How a marked function is called; the active recorder sets it."""


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Takes the arguments of ``torch.compile``; the function stays as it is and is recorded as one kernel."""
    if function is None:
        return lambda late: compiled(late, **options)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return run_kernel(function, args, kwargs)

    return run
