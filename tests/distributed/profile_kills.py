"""Kills profiling sessions of one rank at random moments and checks the store after every one of them.

    python profile_kills.py DIRECTORY KILLS

Imports Megatron once and forks a process for each session, so that twenty of them take seconds. Prints how many
sessions were killed while something was measured.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from test_profile_ranks import parsed

from galvatron_megatron.describe.megatron_args import model_from_arguments
from galvatron_megatron.describe.profile_store import list_profiles
from galvatron_megatron.integration import cpu_device


def session(directory: Path) -> None:
    """Measures what the store lacks."""
    from galvatron_megatron.profiler.needs import ProfileNeeds
    from galvatron_megatron.profiler.session import profile_live_ranks

    arguments = parsed()
    model = model_from_arguments(vars(arguments))
    needs = ProfileNeeds.for_job(model, 1, 8, micro_batch_sizes=(1, 2, 4, 8))
    profile_live_ranks(model, arguments, needs, directory, show=False, seconds_per_point=0.02)


def started(directory: Path) -> int:
    """Starts a session in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            session(directory)
            code = 0
        finally:
            os._exit(code)
    return child


def keys(directory: Path) -> set:
    """What the store has; every file in it must be whole."""
    profiles = list_profiles(directory)
    files = list(directory.glob("profile-*.json"))
    assert len(profiles) == len(files), files
    assert not list(directory.glob("*.damaged*"))
    return {p.key for profile in profiles for p in (*profile.parts, *profile.steps)}


def main() -> None:
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    cpu_device.install(even_with_gpu=True)
    import megatron.training  # noqa: F401

    import galvatron_megatron.profiler.session  # noqa: F401

    chance = random.Random(1)
    killed = stores = grown = 0
    seen: set = set()
    directory = root / "0"
    directory.mkdir()
    while killed < kills:
        child = started(directory)
        time.sleep(chance.uniform(0.0, 1.0))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        now = keys(directory)
        assert seen <= now, seen - now
        grown += now > seen
        seen = now
        if os.WIFSIGNALED(status):
            killed += 1
        else:
            # Done before the blow: the next one falls on an empty store.
            assert os.waitstatus_to_exitcode(status) == 0
            stores, seen = stores + 1, set()
            directory = root / str(stores)
            directory.mkdir()
    _, status = os.waitpid(started(directory), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert seen <= keys(directory)
    print(grown)


if __name__ == "__main__":
    main()
