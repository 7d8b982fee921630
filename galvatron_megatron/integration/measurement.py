"""Measures a job while it trains and puts the figures beside the prediction.

One name of Megatron is replaced: ``training_log`` in ``megatron.training.training``, which the training loop
calls on every rank after each iteration (megatron-core 0.17 to 0.19; a test holds the names of the parameters
that are read here against the installed release). Once the figures are shown, and where no report file is asked
for, an iteration costs nothing more.
"""

import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from galvatron_megatron.describe.profile_store import write_atomically
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.channel import Channel
from galvatron_megatron.integration.decision import Decision
from galvatron_megatron.integration.presentation import measured_lines

REPORT_ITERATIONS = 10
"""Iterations after which measured figures are shown."""
WARM_UP_ITERATIONS = 3
"""First iterations that do not count: memory is allocated and libraries load."""

SEAM = "training_log"
LOSSES_PARAMETER = "loss_dict"
ITERATION_PARAMETER = "iteration"


class Measurement:
    """Step times, peak memory and losses of this rank.

    Args:
        decision: the plan and what is predicted.
        channel: to the other ranks.
        last_iteration: ``--train-iters``, where the job ends; None where it is not known.
        report: file for the figures, or None.
        clock: seconds, rising.
    """

    def __init__(
        self,
        decision: Decision,
        channel: Channel,
        last_iteration: int | None,
        report: Path | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._decision = decision
        self._channel = channel
        self._last = last_iteration
        self._report = report
        self._clock = clock
        self._ends: list[float] = []
        self._first: int | None = None
        self._losses: dict[int, dict[str, float]] = {}
        self._shown = False

    def install(self, training: ModuleType) -> None:
        """Listens to Megatron's training loop.

        Args:
            training: ``megatron.training.training``.
        """
        original = getattr(training, SEAM)
        signature = inspect.signature(original)

        def listen(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            self.step_ended(int(given[ITERATION_PARAMETER]), given[LOSSES_PARAMETER])
            return original(*args, **kwargs)

        setattr(training, SEAM, listen)

    def step_ended(self, iteration: int, losses: Mapping[str, torch.Tensor]) -> None:
        """Notes the end of an iteration; shows and writes the figures when it is time.

        Args:
            iteration: Megatron's number of it, from 1.
            losses: of the iteration; empty but on the last pipeline stage.
        """
        if self._shown and self._report is None:
            return
        if self._first is None:
            self._first = iteration
        count = iteration - self._first + 1
        due = count == REPORT_ITERATIONS or iteration == self._last
        torch.cuda.synchronize()
        self._ends.append(self._clock())
        if self._report is not None and losses:
            # As numbers at once: a tensor each iteration would fill the device of a long job.
            self._losses[iteration] = {name: _mean(value) for name, value in losses.items()}
        if due:
            self._show(iteration)

    def step_seconds(self) -> float | None:
        """Median time of the iterations after the warm-up; None where there are too few."""
        warm = min(WARM_UP_ITERATIONS, max(1, len(self._ends) // 2))
        ends = self._ends[warm - 1 :]
        times = [end - start for start, end in pairwise(ends)]
        return statistics.median(times) if times else None

    def _show(self, iteration: int) -> None:
        mine = {
            "step_seconds": self.step_seconds(),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "losses": [[number, found] for number, found in sorted(self._losses.items())],
        }
        first, self._shown = not self._shown, True
        everyone = self._channel.collect(f"measured/{iteration}", mine)
        if everyone is None:
            if self._channel.rank == 0:
                print("galvatron: a rank's measurements did not arrive; none are shown", file=sys.stderr)
            return
        figures = self._together(iteration, everyone)
        if first:
            print("\n".join(measured_lines(self._decision, figures)), file=sys.stdout, flush=True)
        if self._report is not None:
            try:
                write_atomically(self._report, json.dumps(figures, indent=1) + "\n")
            except GalvatronError as error:
                # The training is worth more than its report.
                print(f"galvatron: report {error}; training goes on", file=sys.stderr, flush=True)

    def _together(self, iteration: int, everyone: list[dict[str, Any]]) -> dict[str, Any]:
        plan = self._decision.plan
        of_stage = plan.base.ranks
        peaks = [
            max(entry["peak_bytes"] for entry in everyone[start : start + of_stage])
            for start in range(0, len(everyone), of_stage)
        ]
        times = [entry["step_seconds"] for entry in everyone if entry["step_seconds"] is not None]
        losses = next((entry["losses"] for entry in everyone if entry["losses"]), [])
        return {
            **self._decision.to_dict(),
            "iterations": iteration,
            "measured_step_seconds": max(times) if times else None,
            "measured_memory_bytes": peaks,
            "losses": losses,
        }


def _mean(value: torch.Tensor) -> float:
    """The loss: Megatron gives the sum and the number of tokens, or the mean alone."""
    numbers = value.float().flatten().tolist()
    return numbers[0] / max(numbers[1], 1.0) if len(numbers) == 2 else numbers[0]
