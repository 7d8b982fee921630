"""How long computation and communication take when they run at the same time."""


def overlapped_seconds(computation: float, communication: float, slowdown: float) -> float:
    """Time until both are done when they start together and slow each other down while both run.

    While both run each proceeds at 1 / slowdown of its speed; the longer one then finishes alone::

        max + (slowdown - 1) * min

    Args:
        computation: seconds alone.
        communication: seconds alone.
        slowdown: factor >= 1.

    Returns:
        Seconds; never more than one after the other.
    """
    both = max(computation, communication) + (slowdown - 1) * min(computation, communication)
    return min(both, computation + communication)


def exposed_seconds(communication: float, computation: float, slowdown: float) -> float:
    """Time that communication adds to computation that it overlaps with.

    Args:
        communication: seconds alone.
        computation: seconds of the work that can hide it.
        slowdown: factor >= 1, see :func:`overlapped_seconds`.

    Returns:
        Seconds on top of ``computation``.
    """
    return overlapped_seconds(computation, communication, slowdown) - computation


def added_seconds(communication: float, computation: float, slowdown: float, *, overlaps: bool) -> float:
    """Time that communication adds to computation, whether or not the job lets them overlap.

    Args:
        communication: seconds alone.
        computation: seconds of the work that can hide it.
        slowdown: factor >= 1, see :func:`overlapped_seconds`.
        overlaps: the job overlaps them.
    """
    return exposed_seconds(communication, computation, slowdown) if overlaps else communication
