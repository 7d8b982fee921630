"""A process group of our own over the live ranks, gone again before Megatron makes its own."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from galvatron_megatron.errors import GalvatronError

_stores: list[Any] = []
"""Stores of earlier groups: where rank 0 itself serves the store, closing it would end the other ranks."""
_answer_seconds: list[float] = [300.0]
"""How long ranks wait for each other in groups made now."""


def rank_from_environment() -> tuple[int, int, int]:
    """Rank, world size and local rank as torchrun, deepspeed and srun set them; a lone process is rank 0 of 1.

    Raises:
        GalvatronError: a variable is not a number, or only some of them are set.
    """
    names = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID"))
    texts = [os.environ.get(first, os.environ.get(second, "")) for first, second in names]
    if not texts[1] or not texts[0]:
        return 0, 1, 0
    try:
        rank, world_size, local_rank = int(texts[0]), int(texts[1]), int(texts[2] or 0)
    except ValueError:
        raise GalvatronError(
            f"ranks: RANK={texts[0]!r}, WORLD_SIZE={texts[1]!r}, LOCAL_RANK={texts[2]!r} are not numbers; "
            "valid: start with torchrun, deepspeed or srun"
        ) from None
    return rank, world_size, local_rank


@contextmanager
def own_process_group(backend: str, timeout_seconds: float) -> Iterator[None]:
    """Makes the default process group for a while.

    Its keys in the rendezvous store have a prefix of their own, so that the group that Megatron makes later in
    the same process meets a clean store. Where a default group exists already it is used and left alone.

    Args:
        backend: ``nccl`` or ``gloo``.
        timeout_seconds: after this long without an answer of a rank, the collective raises.

    Raises:
        GalvatronError: the ranks cannot find each other.
    """
    _answer_seconds[:] = [timeout_seconds]
    if dist.is_initialized():
        yield
        return
    rank, world_size, local_rank = rank_from_environment()
    timeout = timedelta(seconds=timeout_seconds)
    try:
        if "MASTER_ADDR" not in os.environ and world_size == 1:
            store = dist.HashStore()
        else:
            store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    except (ValueError, RuntimeError, OSError) as error:
        raise GalvatronError(
            f"ranks: rank {rank} of {world_size} cannot reach the others "
            f"at {os.environ.get('MASTER_ADDR', '(MASTER_ADDR not set)')}:{os.environ.get('MASTER_PORT', '')} "
            f"({str(error).splitlines()[0]}); valid: start all ranks with torchrun, deepspeed or srun"
        ) from None
    if backend == "nccl":
        torch.cuda.set_device(local_rank)
    prefix = dist.PrefixStore(f"galvatron_profile_{len(_stores)}", store)
    _stores.append(store)
    dist.init_process_group(backend, store=prefix, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield
    except BaseException:
        # A rank that failed must not wait for the others in an orderly shutdown.
        dist.destroy_process_group()
        raise
    else:
        dist.barrier()
        dist.destroy_process_group()


def answer_timeout() -> timedelta:
    """How long a collective of a group made inside :func:`own_process_group` waits for a rank.

    torch and Megatron give groups that are made without it half an hour and ten minutes.
    """
    return timedelta(seconds=_answer_seconds[0])


def silent_ranks(seconds: float) -> list[int]:
    """Ranks that give no sign of life, after a collective failed.

    Every rank whose collective failed calls this before it ends and tells the others through the rendezvous
    store. Rank 0 may serve that store: while it does not answer it is the silent one.

    Args:
        seconds: to wait for the others' sign.

    Returns:
        The silent ranks; empty where there is no store of our own or where all gave a sign.
    """
    if not _stores:
        return []
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore(f"galvatron_signs_{len(_stores)}", _stores[-1])
    silent = {other for other in range(world_size) if other != rank}
    answered = threading.Event()

    def look() -> None:
        deadline = time.monotonic() + seconds
        try:
            store.set(str(rank), "alive")
            while silent and time.monotonic() < deadline:
                silent.difference_update([other for other in sorted(silent) if store.check([str(other)])])
                answered.set()
                time.sleep(0.05)
        except RuntimeError:
            # The server of the store has gone, and rank 0 with it.
            answered.clear()

    # A store whose server hangs would keep this thread for ever.
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(seconds + 1)
    if not answered.is_set():
        return [0] if rank else []
    return sorted(silent)


def agree(value: Any, *, source: int = 0) -> Any:
    """Gives every rank the value that rank ``source`` passed in; plain Python values only."""
    box = [value if dist.get_rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank; plain Python values only."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def any_reason(reason: str) -> str:
    """Why some rank cannot go on, the same on every rank; empty where all can.

    Args:
        reason: this rank's, or "".
    """
    return next((found for found in gather(reason) if found), "")


def on_rank_zero[T](work: Callable[[], T]) -> T:
    """Runs work on rank 0 and gives every rank its answer, or raises its error on every rank."""
    answer: tuple[Any, str] = (None, "")
    if dist.get_rank() == 0:
        try:
            answer = (work(), "")
        except GalvatronError as error:
            answer = (None, str(error))
    value, message = agree(answer)
    if message:
        raise GalvatronError(message)
    return value
