"""Names ranks and groups that are slower than their peers."""

from collections.abc import Sequence
from statistics import median

SLOWER_BY = 1.5
"""A rank is slow when it takes this many times the median of all ranks."""
FEWEST = 3
"""With fewer ranks one cannot tell which of them is out of the ordinary."""


def slow_ranks(seconds: Sequence[float]) -> list[tuple[int, float]]:
    """Finds ranks that take much longer than most for the same work.

    Args:
        seconds: of every rank, by rank; zero where a rank did not take part.

    Returns:
        (rank, times the median), the slowest first.
    """
    taking_part = [value for value in seconds if value > 0]
    if len(taking_part) < FEWEST:
        return []
    usual = median(taking_part)
    found = [(rank, value / usual) for rank, value in enumerate(seconds) if value > SLOWER_BY * usual]
    return sorted(found, key=lambda entry: -entry[1])


def straggler_note(what: str, seconds: Sequence[float], nodes: Sequence[str]) -> str:
    """One line about the slow ranks of a measurement.

    Args:
        what: what was measured.
        seconds: of every rank, by rank.
        nodes: the node of every rank.

    Returns:
        The line, or an empty string where no rank stands out.
    """
    slow = slow_ranks(seconds)
    if not slow:
        return ""
    named = ", ".join(
        f"rank {rank} on {nodes[rank].split()[0]} {ratio:.1f} times the median" for rank, ratio in slow[:4]
    )
    more = f" and {len(slow) - 4} more" if len(slow) > 4 else ""
    return f"slow in {what}: {named}{more}"
