import threading
import time

import pytest
import torch.distributed as dist

from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration import channel as module
from galvatron_megatron.integration.channel import Channel, ToldByRankZeroError


@pytest.fixture
def three(monkeypatch):
    """Channels of three ranks on one store, in threads of this process."""
    store = dist.HashStore()
    monkeypatch.setattr(module.dist, "rendezvous", lambda *args, **kwargs: iter([(store, 0, 3)]))
    return [Channel(rank, 3, timeout_seconds=5) for rank in range(3)]


def on_all(channels, work):
    """Runs ``work(channel)`` for every rank at once; results or errors by rank."""
    found = [None] * len(channels)

    def one(rank):
        try:
            found[rank] = work(channels[rank])
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(channels))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return found


def test_every_rank_has_rank_zeros_answer(three):
    assert on_all(three, lambda c: c.share(lambda: {"rank": c.rank})) == [{"rank": 0}] * 3
    # And the next answer is another one.
    assert on_all(three, lambda c: c.share(lambda: c.rank + 7)) == [7] * 3


def test_an_error_of_rank_zero_reaches_all_and_rank_zero_waits_for_them(three):
    def work(channel):
        def fail():
            raise GalvatronError("nothing fits")

        if channel.rank == 2:
            time.sleep(0.3)
        channel.share(fail)

    errors = on_all(three, work)
    assert [str(error) for error in errors] == ["nothing fits"] * 3
    assert [type(error) for error in errors] == [GalvatronError, ToldByRankZeroError, ToldByRankZeroError]


def test_an_answer_that_cannot_be_told_does_not_leave_ranks_waiting(three):
    errors = on_all(three, lambda c: c.share(lambda: {1, 2}))
    assert isinstance(errors[0], TypeError)
    assert all(isinstance(error, ToldByRankZeroError) and "set" in str(error) for error in errors[1:])


def test_a_mistake_in_our_code_does_not_leave_ranks_waiting(three):
    errors = on_all(three, lambda c: c.share(lambda: 1 // 0))
    assert isinstance(errors[0], ZeroDivisionError)
    assert all(isinstance(error, ToldByRankZeroError) for error in errors[1:])


def test_values_are_collected_by_rank(three):
    assert on_all(three, lambda c: c.collect("x", c.rank * 2)) == [[0, 2, 4], None, None]


def test_a_missing_value_is_not_waited_for_forever(three):
    assert three[0].collect("y", 1, timeout_seconds=0.2) is None


def test_silence_of_rank_zero_is_an_error(three, monkeypatch):
    with pytest.raises(GalvatronError, match="rank 0 gave no answer to rank 1"):
        three[1]._timeout = module.timedelta(seconds=0.2)
        three[1].share(lambda: None)


def test_one_rank_needs_nobody():
    alone = Channel(0, 1)
    assert alone.share(lambda: 3) == 3
    assert alone.collect("x", 4) == [4]
    alone.leave()


def test_ranks_without_a_meeting_place_are_told_so(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(GalvatronError, match=r"rank 1 of 2 cannot reach the others.*torchrun") as caught:
        Channel(1, 2)
    assert "\n" not in str(caught.value)
