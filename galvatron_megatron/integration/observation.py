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
from galvatron_megatron.describe.profile import EMBEDDING, HEAD
from galvatron_megatron.describe.profile_key import layer_digest, shape_digest
from galvatron_megatron.device import on_cpu
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.job_model import job_model
from galvatron_megatron.profiler.few_layers import last_norm
from galvatron_megatron.profiler.process_group import gather
from galvatron_megatron.profiler.switches import switches_of
from galvatron_megatron.profiler.topology import facts_of_this_rank, provenance_of_ranks
from galvatron_megatron.runtime.attach import attached
from galvatron_megatron.runtime.observe import JobObserver, ObservedChunk, ObservedParts
from galvatron_megatron.runtime.observed_strategy import observed_base, observed_optimizer, observed_strategy
from galvatron_megatron.runtime.zero import is_left_to_megatron


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

    def _begin(self, chunks: list[Any]) -> ObservedParts:
        """What the job is and what this rank has of it; all ranks call this together."""
        args = self._args
        plan = attached().plan if attached() is not None else None
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
            "pp": args.pipeline_model_parallel_size,
            "fingerprint": provenance.fingerprint(),
            "provenance": asdict(provenance),
        }
        modules = unwrap_model(chunks)
        base = observed_base(args, zero=0 if plan is None else plan.base.zero)
        return ObservedParts(
            header=header,
            chunks=[self._chunk(module, base) for module in modules],
            optimizer=observed_optimizer(
                modules, args, is_stock=plan is None or is_left_to_megatron(plan, args)
            ),
            gathers=bool(args.overlap_param_gather),
            reduces=bool(args.overlap_grad_reduce),
        )

    def _chunk(self, module: torch.nn.Module, base: dict[str, Any]) -> ObservedChunk:
        layers = []
        for position, layer in enumerate(module.decoder.layers):
            index = layer.layer_number - 1
            about = {
                "part": layer_digest(self._model.layers[index]),
                "layer": index,
                **observed_strategy(layer, self._args, position=position),
            }
            layers.append((layer, about))
        norm = last_norm(module.decoder)
        head = {"part": HEAD, **base}
        if norm is None:
            head["left_out"] = head["left_out"] or "no final norm says where it begins"
        return ObservedChunk(
            module=module,
            layers=layers,
            embedding={"part": EMBEDDING, **base} if module.pre_process else None,
            head=head if module.post_process else None,
            norm=norm,
        )
