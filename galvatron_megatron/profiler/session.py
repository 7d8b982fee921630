"""Fills a profile on the live ranks, in front of a training job or on its own."""

import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from galvatron_megatron.describe.cluster import Cluster
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.describe.profile_cluster import cluster_from_ranks
from galvatron_megatron.describe.profile_key import shape_digest
from galvatron_megatron.describe.profile_store import check_directory, from_json
from galvatron_megatron.device import on_cpu
from galvatron_megatron.profiler.few_layers import megatron_state_restored
from galvatron_megatron.profiler.host_step import compile_host_step
from galvatron_megatron.profiler.levels import level_notes, place_of_this_rank
from galvatron_megatron.profiler.lost_ranks import Watchdog, end_process, one_line_errors
from galvatron_megatron.profiler.measurements import Measurements
from galvatron_megatron.profiler.needs import ProfileNeeds
from galvatron_megatron.profiler.process_group import gather, on_rank_zero, own_process_group
from galvatron_megatron.profiler.progress import Progress
from galvatron_megatron.profiler.switches import switches_of
from galvatron_megatron.profiler.topology import gather_facts, measure_speeds, provenance_of_ranks


def profile_live_ranks(
    model: Model,
    arguments: Namespace,
    needs: ProfileNeeds,
    directory: Path,
    *,
    args_defaults: Mapping[str, Any] | None = None,
    backend: str | None = None,
    memory_gb: float | None = None,
    again: bool = False,
    show: bool = True,
    seconds_per_point: float = 0.25,
    timeout_seconds: float = 300.0,
    end_stuck: Callable[[str], None] = end_process,
) -> tuple[Profile, Cluster]:
    """Measures what the profile store lacks; every rank of the job calls this before Megatron initialises.

    The CPU device back end must be installed where there is no GPU. Rank 0 reads and writes the store; every
    measurement is stored as soon as it is made, so that a job that is killed goes on where it was.

    Args:
        model: what the arguments describe.
        arguments: Megatron's parsed arguments, validated or not; left unchanged.
        needs: what to measure.
        directory: the profile store, an existing directory; writable where it lacks anything.
        args_defaults: the training script's ``args_defaults``.
        backend: ``nccl`` or ``gloo``; Megatron's ``--distributed-backend`` by default.
        memory_gb: memory of a device that a plan may use, for the cluster.
        again: measure even what the store has.
        show: show progress on rank 0.
        seconds_per_point: time for the repeats of one setting.
        timeout_seconds: after this long without an answer of a rank, the job ends with an error.
        end_stuck: ends this process with a line where another rank's silence holds it in a call without a
            time limit.

    Returns:
        The profile and the cluster of the live ranks, equal on every rank.

    Raises:
        GalvatronError: the store cannot be used, ranks cannot reach each other, or one died.
    """
    backend = backend or getattr(arguments, "distributed_backend", None) or ("gloo" if on_cpu() else "nccl")
    if on_cpu():
        backend = "gloo"
    if not any(getattr(arguments, name, False) for name in ("use_torch_fsdp2", "use_megatron_fsdp")):
        # Megatron asks for it with tensor parallelism; it counts until CUDA starts in this process.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if needs.host_step:
        compile_host_step()
    with (
        megatron_state_restored(),
        _quiet(),
        Watchdog(timeout_seconds, end_stuck) as watchdog,
        own_process_group(backend, timeout_seconds),
        Progress(show=show and dist.get_rank() == 0) as progress,
        one_line_errors(progress, timeout_seconds),
    ):
        watchdog.watch(progress)
        progress.at("the hardware of the ranks")
        on_rank_zero(lambda: str(check_directory(directory, write=False)))
        facts = gather_facts()
        switches = switches_of(arguments)
        provenance = provenance_of_ranks(shape_digest(model), backend, facts, switches=switches)
        run = Measurements(
            model,
            arguments,
            needs,
            directory,
            dict(args_defaults or {}),
            Profile(provenance=provenance),
            nodes=[entry.node for entry in facts],
            progress=progress,
            seconds_per_point=seconds_per_point,
        )
        text, note = on_rank_zero(lambda: run.stored_text(again))
        if text:
            run.profile = from_json(text, str(directory))
        if note:
            progress.note(note)
        if run.missing.anything():
            # Before minutes of measurements; a read-only store that holds all of them serves as it is.
            on_rank_zero(lambda: str(check_directory(directory, lacks="measurements of this job")))
        if run.missing.speeds():
            progress.at("the speed of the devices")
            with progress.phase("device speed"):
                places = gather(place_of_this_rank(run.nodes[dist.get_rank()]))
                run.keep(speeds=measure_speeds(facts), notes=level_notes(places))
        run.measure()
    return run.profile, cluster_from_ranks(run.profile, memory_gb=memory_gb)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Megatron's log lines about every small model out of the job's output."""
    logger = logging.getLogger("megatron")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
