"""``--galvatron-observe DIRECTORY``: a job's own layers measured while it trains, with or without a plan."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.observation import FORMAT
from galvatron_megatron.describe.profile_key import layer_digest, shape_digest
from galvatron_megatron.device import on_cpu
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.job_model import job_model
from galvatron_megatron.profiler.process_group import gather
from galvatron_megatron.profiler.switches import switches_of
from galvatron_megatron.profiler.topology import facts_of_this_rank, provenance_of_ranks
from galvatron_megatron.runtime.observe import JobObserver
from galvatron_megatron.runtime.observed_strategy import observed_strategy


class Observation:
    """What is to be observed of one job.

    Args:
        args: Megatron's parsed arguments, before its validation and before a plan changes them.
        defaults: the script's ``args_defaults``.
        directory: for the records, made if need be.

    Raises:
        GalvatronError: the arguments describe no model, or the directory cannot be made.
    """

    def __init__(self, args: Namespace, defaults: Mapping[str, Any], directory: Path) -> None:
        self._model: Model = job_model(args, defaults)
        # Now, for a plan may change some of them.
        self._switches = switches_of(args)
        self._args = args
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GalvatronError(
                f"--galvatron-observe: {directory} cannot be made ({error.strerror}); "
                "valid: a writable directory"
            ) from None
        self._directory = directory

    def install(self, training: ModuleType, args: Namespace) -> None:
        """Waits for the training loop.

        Args:
            training: ``megatron.training.training``.
            args: Megatron's validated arguments.
        """
        self._args = args
        path = self._directory / f"observed-rank{args.rank}.jsonl"
        JobObserver(path, self._begin).install(training)

    def _begin(self, chunks: list[Any]) -> tuple[dict[str, Any], list[tuple[torch.nn.Module, dict[str, Any]]]]:
        """The record of the job and the layers of this rank; all ranks call this together."""
        args = self._args
        backend = "gloo" if on_cpu() else args.distributed_backend
        everyone = gather((facts_of_this_rank(), datetime.now(UTC).isoformat()))
        provenance = provenance_of_ranks(
            shape_digest(self._model), backend, [facts for facts, _ in everyone], switches=self._switches
        )
        header = {
            "record": "job",
            "format": FORMAT,
            "started": everyone[0][1],
            "rank": args.rank,
            "fingerprint": provenance.fingerprint(),
            "provenance": asdict(provenance),
        }
        layers = []
        for chunk in unwrap_model(chunks):
            for position, module in enumerate(chunk.decoder.layers):
                index = module.layer_number - 1
                about = {
                    "layer": index,
                    "part": layer_digest(self._model.layers[index]),
                    **observed_strategy(module, args, position=position),
                }
                layers.append((module, about))
        return header, layers
