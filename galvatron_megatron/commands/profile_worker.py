"""One rank of ``galvatron profile``; started by the command, or by torchrun, deepspeed or srun.

torchrun ... -m galvatron_megatron.commands.profile_worker REQUEST.json
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from galvatron_megatron.errors import EXIT_CODE, GalvatronError
from galvatron_megatron.search.decision_tree import Space
from galvatron_megatron.search.request import SearchRequest

RANK_TIMEOUT_SECONDS = 300
"""How long ranks wait for one that does not answer, unless said otherwise."""


def run_rank(request: dict, end_stuck: Callable[[str], None] | None = None) -> str:
    """Measures on this rank.

    Args:
        request: ``megatron`` (words of a command line), ``directory``, ``device`` (``cpu`` or ``cuda``),
            ``global_batch_size``, ``micro_batch_sizes`` (or None), ``tps`` (or None),
            ``again`` and, where they are not the usual ones, ``rank_timeout`` (seconds to wait for another
            rank) and ``offload`` (measure a step over states in host memory, too).
        end_stuck: ends this process with a line where it is stuck; by default that prints the line.

    Returns:
        The fingerprint of the profile.
    """
    from galvatron_megatron.describe.megatron_args import model_from_arguments
    from galvatron_megatron.profiler.process_group import rank_from_environment

    cpu = request["device"] == "cpu"
    if cpu:
        from galvatron_megatron.integration import cpu_device

        cpu_device.install(even_with_gpu=True)
    from megatron.training.arguments import parse_args

    from galvatron_megatron.profiler.lost_ranks import end_process
    from galvatron_megatron.profiler.needs import ProfileNeeds
    from galvatron_megatron.profiler.session import profile_live_ranks

    before, sys.argv = sys.argv, ["galvatron profile", *request["megatron"]]
    try:
        parsed = parse_args()
    finally:
        sys.argv = before
    if cpu:
        cpu_device.configure(parsed)
    if parsed.lr is None:
        # Of no effect on time; Megatron's validation and optimizer want one.
        parsed.lr = 1e-4
    model = model_from_arguments(vars(parsed))
    _, world_size, _ = rank_from_environment()
    batch = request["global_batch_size"] or parsed.global_batch_size or 8 * world_size
    question = SearchRequest(
        model=model,
        world_size=world_size,
        devices_per_node=int(os.environ.get("LOCAL_WORLD_SIZE") or world_size),
        memory_bytes=1 << 60,
        global_batch_size=batch,
    )
    degrees = Space(request=question).ulysses_degrees()
    needs = ProfileNeeds.for_job(
        model,
        world_size,
        batch,
        host_step=request.get("offload", False),
        tps=request["tps"],
        micro_batch_sizes=request["micro_batch_sizes"],
        ulysses=[tp for tp in degrees if tp in (request["tps"] or degrees)],
    )
    profile, _ = profile_live_ranks(
        model,
        parsed,
        needs,
        Path(request["directory"]),
        again=request["again"],
        timeout_seconds=request.get("rank_timeout", RANK_TIMEOUT_SECONDS),
        end_stuck=end_stuck or end_process,
    )
    return profile.fingerprint()


def main() -> int:
    """Runs one rank; it writes its error beside the request, rank 0 the fingerprint too."""
    path = Path(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))

    def end_stuck(line: str) -> None:
        path.with_suffix(f".error{rank}").write_text(line)
        os._exit(EXIT_CODE)

    try:
        fingerprint = run_rank(json.loads(path.read_text()), end_stuck)
    except GalvatronError as error:
        path.with_suffix(f".error{rank}").write_text(str(error))
        return EXIT_CODE
    if rank == 0:
        path.with_suffix(".done").write_text(fingerprint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
