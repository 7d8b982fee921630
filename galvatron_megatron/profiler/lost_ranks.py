"""A rank that died, hangs, or whose link does: one line on every other rank, within the time limit."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from galvatron_megatron.errors import EXIT_CODE, GalvatronError
from galvatron_megatron.profiler.process_group import rank_from_environment, silent_ranks
from galvatron_megatron.profiler.progress import Progress

SIGN_SECONDS = 3.0
"""How long a rank whose collective failed waits for a sign of the others, to name the one that gives none."""
GRACE_SECONDS = 5.0
"""How much later than a collective's own time limit a rank is taken to be stuck in a call that has none."""


@contextmanager
def one_line_errors(progress: Progress, timeout_seconds: float) -> Iterator[None]:
    """A rank that is gone or a link that hangs, in one line instead of torch's traceback.

    Raises:
        GalvatronError: a collective failed inside.
    """
    try:
        yield
    except (dist.DistBackendError, dist.DistNetworkError) as error:
        raise GalvatronError(_lost(_reason(error), progress.text, timeout_seconds)) from error
    except RuntimeError as error:
        text = str(error).lower()
        if any(word in text for word in ("connection", "timed out", "timeout", "gloo", "peer")):
            raise GalvatronError(_lost(_reason(error), progress.text, timeout_seconds)) from error
        raise


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _lost(reason: str, doing: str, timeout_seconds: float) -> str:
    rank, world_size, _ = rank_from_environment()
    silent = silent_ranks(SIGN_SECONDS)
    who = ", ".join(map(str, silent[:8])) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
    waited = f"rank{'s' * (len(silent) > 1)} {who}" if silent else "another rank"
    return (
        f"profile: rank {rank} of {world_size} waited in vain for {waited} while measuring {doing} "
        f"(at most {timeout_seconds:.0f} s: {reason}); valid: look at that rank and its link, run again; "
        "what was measured is kept"
    )


def end_process(line: str) -> None:
    """Prints the line and ends this process, whatever its main thread waits for."""
    sys.stderr.write(f"galvatron rank {rank_from_environment()[0]}: {line}\n")
    sys.stderr.flush()
    os._exit(EXIT_CODE)


class Watchdog:
    """Ends this rank where it waits for another one in a call that knows no time limit.

    Collectives have one. What makes their groups asks the rendezvous store, which rank 0 may serve: a store
    that hangs answers never, and the call waits for ever. A thread beside it notices that nothing has been
    begun or finished for too long.

    Args:
        timeout_seconds: time limit of a collective; this rank is ended ``SIGN_SECONDS + GRACE_SECONDS`` later.
        end: gets the line; must not return.
    """

    def __init__(self, timeout_seconds: float, end: Callable[[str], None] = end_process) -> None:
        self._timeout_seconds = timeout_seconds
        self._end = end
        self._progress: Progress | None = None
        self._entered = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="galvatron watchdog", daemon=True)

    def watch(self, progress: Progress) -> None:
        """Counts from the last thing that this progress was told, from now on."""
        self._progress = progress

    def __enter__(self) -> "Watchdog":
        if rank_from_environment()[1] > 1:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        limit = self._timeout_seconds + SIGN_SECONDS + GRACE_SECONDS
        while True:
            last = self._entered if self._progress is None else self._progress.last_told
            left = last + limit - time.monotonic()
            if left <= 0:
                break
            if self._over.wait(min(left, 1.0)):
                return
        doing = self._progress.text if self._progress else "the hardware of the ranks"
        self._end(_lost("the rendezvous store does not answer", doing, self._timeout_seconds))
