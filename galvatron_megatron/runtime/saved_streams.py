"""Random streams of layers that differ, in Megatron's checkpoints: a job with the same plan goes on exactly.

Megatron saves the random states of one data-parallel rank for all. Every rank's own streams are saved beside
them under ``galvatron_random_streams``, one object per rank, and the checkpoint says under which plan. A job
with that plan takes them over wherever Megatron takes over its own states; any other starts its streams anew.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.utils import log_single_rank

from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.serialization import plan_to_dict
from galvatron_megatron.runtime.random_streams import RandomStreams

KEY = "galvatron_random_streams"
"""Of the states in a checkpoint and, in its metadata, of the plan under which they were saved."""

_logger = logging.getLogger(__name__)


def plan_digest(plan: Plan) -> str:
    """What two plans have in common that draw the same random numbers.

    Args:
        plan: the plan; what it was searched for does not count.
    """
    document = {key: value for key, value in plan_to_dict(plan).items() if key != "fingerprints"}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


class SavedStreams:
    """Carries one rank's streams into checkpoints and out of them."""

    def __init__(self, plan: Plan, streams: Callable[[], RandomStreams]) -> None:
        """Says whose streams.

        Args:
            plan: the attached plan.
            streams: gives those of this rank, once groups exist.
        """
        self._digest = plan_digest(plan)
        self._streams = streams
        self._loaded: dict[str, Any] | None = None

    @property
    def content(self) -> dict[str, str]:
        """What the metadata of a checkpoint says of the streams in it."""
        return {KEY: self._digest}

    def hook_generate(self, original: Callable[..., dict]) -> Callable[..., dict]:
        """Adds the streams to what is saved, and to what is loaded where they are there for this plan.

        Args:
            original: ``generate_state_dict`` of ``megatron.training.checkpointing``.
        """

        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> dict:
            state = original(*args, **kwargs)
            wanted = kwargs.get("optim_sd_kwargs") or {}
            metadata = wanted.get("metadata") or {}
            # Megatron leaves its own states out where they are not saved, not wanted or do not fit.
            if "rng_state" in state and metadata.get(KEY) == self._digest:
                state[KEY] = ShardedObject(
                    KEY, self._streams().states(), (dist.get_world_size(),), (dist.get_rank(),)
                )
            return state

        return generate

    def hook_read(self, original: Callable[..., tuple]) -> Callable[..., tuple]:
        """Keeps the streams of this rank that a checkpoint holds.

        Args:
            original: ``_load_base_checkpoint`` of ``megatron.training.checkpointing``.
        """

        @wraps(original)
        def read(*args: Any, **kwargs: Any) -> tuple:
            result = original(*args, **kwargs)
            self._loaded = result[0].pop(KEY, None) if isinstance(result[0], dict) else None
            return result

        return read

    def hook_load(self, original: Callable[..., tuple]) -> Callable[..., tuple]:
        """Sets the streams once a checkpoint is loaded.

        Args:
            original: ``load_checkpoint`` of ``megatron.training.checkpointing``.
        """

        @wraps(original)
        def load(*args: Any, **kwargs: Any) -> tuple:
            self._loaded = None
            result = original(*args, **kwargs)
            if self._loaded is not None:
                self._streams().go_on(self._loaded)
                self._loaded = None
                return result
            self._streams().restart(iteration=result[0])
            if result[0]:
                log_single_rank(
                    _logger,
                    logging.WARNING,
                    "random streams of layers that differ start anew from seed and iteration: the checkpoint "
                    "holds none of this plan (a job with the same plan draws on where the other stopped)",
                )
            return result

        return load
