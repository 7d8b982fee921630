import os
import time

import pytest
from ranks import RankError


def total(rank, world_size, value):
    import torch
    import torch.distributed as dist

    tensor = torch.full((2,), float(value + rank), device="cuda")
    dist.all_reduce(tensor)
    assert tensor.device.type == "cpu"
    return tensor.tolist()


def fail_on_one(rank, world_size):
    if rank == 1:
        raise ValueError("only here")
    total(rank, world_size, 0)


def sleep(rank, world_size, seconds):
    time.sleep(seconds)


def hash_of_a_word(rank, world_size):
    return hash("word")


@pytest.mark.distributed
def test_cases_run_on_the_same_ranks_and_failures_are_shown(ranks):
    pair = ranks(2)
    first, second = pair.run(hash_of_a_word)
    assert first != second or "PYTHONHASHSEED" in os.environ, "no order may come from a set of strings"
    assert pair.run(total, 1) == [[3.0, 3.0]] * 2
    assert pair.run(total, value=2) == [[5.0, 5.0]] * 2
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*ValueError: only here"):
        pair.run(fail_on_one)
    # Fresh ranks serve the next case.
    assert pair.run(total, 1) == [[3.0, 3.0]] * 2
    with pytest.raises(RankError, match=r"no answer in 1 s"):
        pair.run(sleep, 60, timeout_seconds=1)
    assert not pair._processes
