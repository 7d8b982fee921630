"""Random numbers differ between the tp ranks of a layer and agree between its replicas."""

import pytest

pytest.importorskip("megatron.training")

import torch
from megatron.core.tensor_parallel import random as megatron_random

from galvatron_megatron.integration import cpu_device
from galvatron_megatron.runtime.layout import Layout
from galvatron_megatron.runtime.random_streams import MODEL_PARALLEL_STREAM, RandomStreams

PLAIN = Layout(tp=1, cp=1, dp=4, split=False)
TWO = Layout(tp=2, cp=1, dp=2, split=False)
TWO_SPLIT = Layout(tp=2, cp=1, dp=2, split=True)
FOUR_SPLIT = Layout(tp=4, cp=1, dp=1, split=True)


@pytest.fixture(autouse=True)
def device():
    with cpu_device.CpuDevice():
        yield
        megatron_random.initialize_rng_tracker(force_reset=True)


def rank_of(rank, base):
    """A rank as Megatron seeds it: the model-parallel stream by base tp rank, the rest alike."""
    megatron_random.initialize_rng_tracker(force_reset=True)
    tracker = megatron_random.get_cuda_rng_tracker()
    torch.cuda.manual_seed(7)
    tracker.add(megatron_random.get_data_parallel_rng_tracker_name(), 7)
    tracker.add(MODEL_PARALLEL_STREAM, 7 + 2718 + rank % base.tp)
    return RandomStreams(seed=7, rank=rank, base=base), tracker


def drawn(rank, base, layout, *, core):
    streams, tracker = rank_of(rank, base)
    with streams.computing(layout):
        if core:
            with tracker.fork():
                return torch.rand(4).tolist()
        return torch.rand(4).tolist()


@pytest.mark.parametrize("base", [PLAIN, TWO, TWO_SPLIT, FOUR_SPLIT])
@pytest.mark.parametrize("layout", [PLAIN, TWO, TWO_SPLIT, FOUR_SPLIT])
def test_attention_dropout_differs_between_tp_ranks_only(base, layout):
    seen = [drawn(rank, base, layout, core=True) for rank in range(4)]
    for rank in range(4):
        for other in range(4):
            same_shard = rank % layout.tp == other % layout.tp
            assert (seen[rank] == seen[other]) == same_shard


@pytest.mark.parametrize("base", [PLAIN, TWO])
@pytest.mark.parametrize("layout", [TWO_SPLIT, FOUR_SPLIT])
def test_hidden_dropout_differs_between_slices(base, layout):
    seen = [drawn(rank, base, layout, core=False) for rank in range(4)]
    assert len({tuple(values) for values in seen}) == layout.tp


@pytest.mark.parametrize("base", [TWO_SPLIT, FOUR_SPLIT])
@pytest.mark.parametrize("layout", [PLAIN, TWO])
def test_hidden_dropout_agrees_where_the_activation_is_replicated(base, layout):
    seen = set()
    for rank in range(4):
        streams, tracker = rank_of(rank, base)
        with tracker.fork(), streams.computing(layout):  # Megatron's block runs in a fork under its own split
            seen.add(tuple(torch.rand(4).tolist()))
    assert len(seen) == 1


def test_weights_differ_between_shards_and_agree_between_replicas():
    seen = []
    for rank in range(4):
        streams, tracker = rank_of(rank, PLAIN)
        with streams.initialising(2), tracker.fork():
            seen.append(tuple(torch.rand(4).tolist()))
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_the_base_layout_is_left_alone():
    streams, tracker = rank_of(1, TWO)
    before = tracker.get_states()
    with streams.computing(TWO), streams.initialising(2):
        assert tracker.get_states().keys() == before.keys()
        with tracker.fork():
            inside = torch.rand(4)
    rank_of(1, TWO)
    with megatron_random.get_cuda_rng_tracker().fork():
        assert torch.equal(inside, torch.rand(4))


def test_megatrons_own_stream_goes_on_where_it_was():
    streams, tracker = rank_of(0, TWO)
    state = tracker.get_states()[MODEL_PARALLEL_STREAM].clone()
    with streams.computing(FOUR_SPLIT), tracker.fork():
        torch.rand(4)
    assert torch.equal(tracker.get_states()[MODEL_PARALLEL_STREAM], state)


def test_streams_restart_with_the_iteration():
    def after(iteration):
        streams, tracker = rank_of(1, PLAIN)
        if iteration:
            streams.restart(iteration=iteration)
        with streams.computing(TWO), tracker.fork():
            return torch.rand(4).tolist()

    assert after(5) == after(5)
    assert after(5) != after(0)
    assert after(5) != after(6)


def test_streams_go_on_where_they_stood():
    streams, tracker = rank_of(1, PLAIN)

    def draw():
        with streams.computing(TWO), tracker.fork():
            return torch.rand(4).tolist()

    draw()
    stood = streams.states()
    expected = draw()
    streams.restart(iteration=3)
    assert not streams.states()
    assert draw() != expected
    streams.go_on(stood)
    assert draw() == expected
    assert MODEL_PARALLEL_STREAM in tracker.get_states()
