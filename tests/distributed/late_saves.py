"""A job whose checkpoints are written while it trains on; on ranks only."""

from megatron.training import checkpointing, training
from runtime_job import run_case


def train_beside_saves(case):
    """Trains a case that saves asynchronously; every save is written behind the step that follows it.

    Megatron's writer is a process of its own that tensors in host memory are shared with, which it reads when
    it comes to write them. Here the rank itself writes them, as late.
    """
    waiting = []
    schedule, step = checkpointing.schedule_async_save, training.train_step

    def step_then_write(*given, **named):
        result = step(*given, **named)
        while waiting:
            waiting.pop(0).execute_sync()
        return result

    checkpointing.schedule_async_save, training.train_step = waiting.append, step_then_write
    try:
        return run_case(case)
    finally:
        checkpointing.schedule_async_save, training.train_step = schedule, step
