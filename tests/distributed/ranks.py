"""Ranks for tests: started once, then sent one case after another.

    def check(rank, world_size, tp): ...            # at the top of a test module; runs on every rank

    @pytest.mark.distributed
    def test_it(ranks):
        results = ranks(4).run(check, tp=2)         # one result per rank

Every rank has the CPU device back end and, for each case, a new gloo process group over all ranks; all groups
are destroyed after each case. A case that fails or takes too long raises here, with the traceback of the rank,
and the next case gets fresh ranks.
"""

import functools
import gc
import importlib
import itertools
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nursery import NURSERIES, Nursery

THREADS_OF_A_PROCESS = 200
"""Threads with which ranks are started anew: Gloo's of groups that caches of Megatron and engines of DeepSpeed
keep of each case, every one of which wakes up a hundred times a second."""


class RankError(AssertionError):
    """A case failed on a rank; the message has that rank's traceback."""


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """A fixed number of ranks on this machine.

    Args:
        world_size: how many.
        timeout_seconds: for one case, the start of the ranks not counted.
    """

    def __init__(self, world_size: int, *, timeout_seconds: float = 300.0) -> None:
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self._processes: list[int] = []
        self._pipes: list[Connection] = []

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_seconds: float | None = None, **kwargs: Any
    ) -> list[Any]:
        """Runs ``function(rank, world_size, *args, **kwargs)`` on every rank.

        Args:
            function: defined at the top of an importable module.
            args: picklable.
            timeout_seconds: for this case, instead of the usual one.
            kwargs: picklable.

        Returns:
            What it returned on each rank, by rank; tensors on the CPU and other picklable values.

        Raises:
            RankError: it raised on a rank, a rank died, or time ran out.
        """
        if self._processes and _threads(self._processes[0]) > THREADS_OF_A_PROCESS:
            self.close()
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args, kwargs))
        try:
            answers = self._collect(timeout_seconds or self.timeout_seconds)
        except RankError:
            self.close()
            raise
        failures = [(rank, text) for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.close()
            raise self._error(failures)
        return [value for _, value in answers]

    def _error(self, failures: list[tuple[int, str]]) -> RankError:
        return RankError("\n".join(f"rank {rank} of {self.world_size}:\n{text}" for rank, text in failures))

    def close(self) -> None:
        """Ends the ranks."""
        for rank, process in enumerate(self._processes):
            _nursery(rank).end(process)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.world_size):
            process, pipe = _nursery(rank).fork(rank, self.world_size, port)
            self._processes.append(process)
            self._pipes.append(pipe)
        try:
            self._collect(300.0)
        except RankError:
            self.close()
            raise

    def _collect(self, timeout_seconds: float) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_seconds
        while len(answers) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = [rank for rank in range(self.world_size) if rank not in answers]
                raise RankError(f"ranks {silent} of {self.world_size} gave no answer in {timeout_seconds:g} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    raise RankError(f"rank {rank} of {self.world_size} died") from None
            if any(not ok for ok, _ in answers.values()):
                # The others may wait for the failed rank in a collective; a short while for their own errors.
                deadline = min(deadline, time.monotonic() + 5.0)
                if not wait([p for r, p in enumerate(self._pipes) if r not in answers], timeout=1.0):
                    raise self._error([(r, text) for r, (ok, text) in answers.items() if not ok])
        return [answers[rank] for rank in range(self.world_size)]


@functools.cache
def _nurseries() -> list[Nursery]:
    return [Nursery(_serve) for _ in range(NURSERIES)]


def _nursery(rank: int) -> Nursery:
    """Where a rank comes from."""
    return _nurseries()[rank % NURSERIES]


def _threads(process: int) -> int:
    """How many threads a process has; none where the system does not say."""
    return len(list(Path("/proc", str(process), "task").glob("*")))


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    """The life of a rank."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    try:
        import torch
        import torch.distributed as dist

        from galvatron_megatron.integration import cpu_device

        torch.set_num_threads(1)
        cpu_device.install()
        store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    pipe.send((True, None))
    for case in itertools.count():
        try:
            module, name, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            # Every rank has answered the last case, so that nobody waits in a group of it any more. Its groups
            # hold threads, and hundreds of them would slow down all later cases.
            if dist.is_initialized():
                gc.collect()
                gc.freeze()  # modules, mostly: Megatron and DeepSpeed collect garbage several times in a job
                dist.destroy_process_group()
            own_store = dist.PrefixStore(f"case {case}", store)
            dist.init_process_group("gloo", store=own_store, rank=rank, world_size=world_size)
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = (True, function(rank, world_size, *args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            if "megatron.core.parallel_state" in sys.modules:
                sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
        pipe.send(answer)
