from collections.abc import Callable, Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(n)`` gives n ranks, started at first use and shared by all tests of the session."""
    started: dict[int, Ranks] = {}

    def of(world_size: int) -> Ranks:
        for other, pool in started.items():
            if other != world_size:
                # Idle ranks cost memory; tests of one world size mostly come together.
                pool.close()
        return started.setdefault(world_size, Ranks(world_size))

    yield of
    for pool in started.values():
        pool.close()
