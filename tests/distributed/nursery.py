"""Processes that have imported what ranks need and fork them: fresh ranks then start without imports.

Torch and Megatron take a processor more than three seconds to import, and four ranks are started anew some
twenty times in a session. There are two nurseries, which fork ranks in turn: as in a job, where every rank is
an interpreter of its own, hashes of strings differ between ranks, so that an order that ranks must agree on and
that comes from a set of strings is noticed.
"""

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

NURSERIES = 2
IMPORT_SECONDS = 300.0
"""Time that a nursery may take to import."""


class Nursery:
    """A process that forks others.

    Args:
        live: what a forked process does: called with a connection to this process and the words of ``fork``;
            defined at the top of an importable module.
    """

    def __init__(self, live: Callable[..., None]) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, there = context.Pipe()
        self._process = context.Process(target=_nurse, args=(there, live), daemon=True)
        self._process.start()
        there.close()
        self._is_ready = False

    def fork(self, *words: Any) -> tuple[int, Connection]:
        """Starts a process.

        Args:
            words: for it; picklable.

        Returns:
            Its id, and the connection to it: at its end when the process ends.
        """
        if not self._is_ready:
            assert self._orders.poll(IMPORT_SECONDS), f"a nursery imported for {IMPORT_SECONDS:g} s"
            if failure := self._orders.recv():
                raise AssertionError(f"a nursery:\n{failure}")
            self._is_ready = True
        here, there = multiprocessing.Pipe()
        self._orders.send(words)
        reduction.send_handle(self._orders, there.fileno(), self._process.pid)
        process = self._orders.recv()
        there.close()
        return process, here

    def end(self, process: int) -> None:
        """Kills a process that was forked here, and waits until it is gone."""
        self._orders.send(process)
        self._orders.recv()


def _nurse(orders: Connection, live: Callable[..., None]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    try:
        # Without the CPU device back end: what it counts as a rank's memory begins where it is installed.
        import runtime_job

        runtime_job.read_arguments()
    except BaseException:
        orders.send(traceback.format_exc())
        return
    # What was imported is never garbage, and memory that is not written to stays shared with all ranks.
    gc.collect()
    gc.freeze()
    orders.send("")
    children: set[int] = set()
    while True:
        try:
            order = orders.recv()
        except EOFError:
            break
        if isinstance(order, int):
            _end(order)
            children.remove(order)
            orders.send(None)
            continue
        handle = reduction.recv_handle(orders)
        child = os.fork()
        if child == 0:
            orders.close()
            try:
                live(Connection(handle), *order)
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.close(handle)
        children.add(child)
        orders.send(child)
    for child in children:
        _end(child)


def _end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
