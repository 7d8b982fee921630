"""How rank 0 tells the other ranks what it decided, before Megatron has process groups.

Answers go through the store that the launcher gives every job for its rendezvous, under keys of our own. No
collective is involved, so a rank that fails never leaves the others inside one.
"""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from galvatron_megatron.errors import GalvatronError

LAST_WORD_SECONDS = 10.0
"""How long rank 0 stays for ranks that are slow to hear how the job ends."""

_PREFIX = "galvatron_channel"


class ToldByRankZeroError(GalvatronError):
    """An error of rank 0 as another rank meets it; rank 0 prints it for all."""


class Channel:
    """Rank 0's answers for all ranks of a job.

    Args:
        rank: of this process.
        world_size: ranks of the job.
        timeout_seconds: the longest that rank 0 may take for one answer.

    Raises:
        GalvatronError: the ranks cannot find each other.
    """

    def __init__(self, rank: int, world_size: int, *, timeout_seconds: float = 3600.0) -> None:
        self.rank = rank
        self.world_size = world_size
        self._timeout = timedelta(seconds=timeout_seconds)
        self._shared = 0
        self._store: Any = None
        if world_size == 1:
            self._store = dist.HashStore()
            return
        try:
            found, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(minutes=10)))
        except (ValueError, RuntimeError, OSError) as error:
            place = (
                f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR not set)')}:{os.environ.get('MASTER_PORT', '')}"
            )
            raise GalvatronError(
                f"ranks: rank {rank} of {world_size} cannot reach the others at {place} "
                f"({str(error).splitlines()[0]}); valid: start all ranks with torchrun, deepspeed or srun"
            ) from None
        # Rank 0 may itself serve the store: it must live as long as the process.
        self._root = found
        self._store = dist.PrefixStore(_PREFIX, found)

    def share(self, work: Callable[[], Any]) -> Any:
        """Runs work on rank 0 and gives every rank its answer; every rank calls this.

        Args:
            work: makes a JSON value; runs on rank 0 only.

        Returns:
            The answer.

        Raises:
            GalvatronError: on rank 0 what ``work`` raised; on every other rank ``ToldByRankZeroError``.
        """
        self._shared += 1
        key = f"answer/{self._shared}"
        if self.rank == 0:
            try:
                answer = work()
                text = json.dumps({"value": answer})
            except BaseException as error:
                self._tell_error(key, error)
                raise
            self._store.set(key, text)
            return answer
        try:
            self._store.wait([key], self._timeout)
            told = json.loads(self._store.get(key))
        except (dist.DistStoreError, dist.DistNetworkError, RuntimeError) as error:
            raise GalvatronError(
                f"ranks: rank 0 gave no answer to rank {self.rank} ({str(error).splitlines()[0]}); "
                "valid: look at the output of rank 0"
            ) from None
        if "error" in told:
            self._store.add(f"{key}/heard", 1)
            # A launcher stops all ranks as soon as one ends: rank 0 goes first, its message is out by then.
            time.sleep(0.5)
            raise ToldByRankZeroError(told["error"])
        return told["value"]

    def _tell_error(self, key: str, error: BaseException) -> None:
        """Sends an error and stays until every rank has it: rank 0 may be the one that serves the store."""
        self._store.set(key, json.dumps({"error": str(error) or type(error).__name__}))
        self._wait_for_others(f"{key}/heard")

    def leave(self) -> None:
        """Ends the use of the channel: rank 0, which may serve the store, stays until all have left."""
        if self.rank == 0:
            self._wait_for_others("left")
        else:
            self._store.add("left", 1)

    def _wait_for_others(self, counter: str) -> None:
        deadline = time.monotonic() + LAST_WORD_SECONDS
        while self._store.add(counter, 0) < self.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)

    def collect(self, name: str, value: Any, *, timeout_seconds: float = 60.0) -> list[Any] | None:
        """Sends every rank's value to rank 0; every rank calls this with the same name, once.

        Args:
            name: of the values.
            value: a JSON value.
            timeout_seconds: how long rank 0 waits for the others.

        Returns:
            On rank 0 the values by rank, or None where a rank's value did not come in time; None elsewhere.
        """
        self._store.set(f"value/{name}/{self.rank}", json.dumps(value))
        if self.rank != 0:
            return None
        keys = [f"value/{name}/{rank}" for rank in range(self.world_size)]
        try:
            self._store.wait(keys, timedelta(seconds=timeout_seconds))
        except (dist.DistStoreError, dist.DistNetworkError, RuntimeError):
            return None
        return [json.loads(self._store.get(key)) for key in keys]
