"""What passes of a model's parts are found to take, told by a clock that only the model's own work moves."""

from itertools import count

import pytest
import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from galvatron_megatron.runtime import observed_passes
from galvatron_megatron.runtime.observed_passes import (
    ALL_OVERLAP,
    ChunkForward,
    WatchedEmbedding,
    WatchedHead,
    WatchedLayer,
    WatchedPart,
    take_step,
)

ABOUT = {"left_out": ""}


class Clock:
    seconds = 0.0


class Work(torch.autograd.Function):
    """Takes its time, forward and backward."""

    @staticmethod
    def forward(context, tensor, clock, forward, backward):
        context.clock, context.backward_seconds = clock, backward
        clock.seconds += forward
        return tensor.clone()

    @staticmethod
    def backward(context, gradient):
        context.clock.seconds += context.backward_seconds
        return gradient, None, None, None


class Part(torch.nn.Module):
    def __init__(self, clock, forward, backward):
        super().__init__()
        self.times = clock, forward, backward
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, hidden_states):
        return Work.apply(hidden_states * self.weight, *self.times)


class Decoder(torch.nn.Module):
    def __init__(self, clock, recompute):
        super().__init__()
        self.recompute = recompute
        self.layers = torch.nn.ModuleList(Part(clock, 10.0 * n, 100.0 * n) for n in (1, 2))
        self.final_layernorm = Part(clock, 3.0, 5.0)

    def _all_layers(self, hidden_states):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states

    def forward(self, hidden_states):
        if self.recompute:
            hidden_states = checkpoint(self._all_layers, hidden_states, use_reentrant=True)
        else:
            hidden_states = self._all_layers(hidden_states)
        return self.final_layernorm(hidden_states)


class Chunk(torch.nn.Module):
    """Parts named as Megatron names them."""

    def __init__(self, clock, recompute):
        super().__init__()
        self.embedding, self.decoder = Part(clock, 1.0, 2.0), Decoder(clock, recompute)
        self.output_layer = Part(clock, 30.0, 50.0)

    def forward(self, tokens):
        return self.output_layer(self.decoder(hidden_states=self.embedding(tokens))).sum()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(observed_passes, "perf_counter", lambda: made.seconds)
    return made


def watch(chunk: Chunk) -> tuple[list[WatchedPart], ChunkForward]:
    """All parts of a chunk, in the order of the model."""
    forward, common = ChunkForward(chunk), {"about": ABOUT, "on_gpu": False, "numbers": count()}
    norm = chunk.decoder.final_layernorm
    layers = [WatchedLayer(module=layer, chunk=forward, **common) for layer in chunk.decoder.layers]
    embedding = WatchedEmbedding(module=chunk, **common)
    return [embedding, *layers, WatchedHead(module=chunk, norm=norm, **common)], forward


def step(chunk: Chunk, micro_batches: int = 1) -> None:
    for _ in range(micro_batches):
        chunk(torch.ones(3)).backward()


def times(seen: list[dict], name: str) -> list[list[float]]:
    return [entry[f"{name}_seconds"] for entry in seen]


@pytest.mark.parametrize("recompute", [False, True])
def test_every_part_has_its_own_time_and_what_is_repeated_counts_as_backward(clock, recompute):
    chunk = Chunk(clock, recompute)
    # As Megatron adds gradients to its own buffer: in a hook on the node that adds them up.
    node = get_gradient_edge(chunk.embedding.weight).node
    node.register_hook(lambda *_: setattr(clock, "seconds", clock.seconds + 0.5))
    parts, forward = watch(chunk)
    step(chunk, 2)
    seen = take_step(parts, gathers=False, reduces=False)
    again = 1 if recompute else 0
    assert times(seen, "forward") == [[1.0] * 2, [10.0] * 2, [20.0] * 2, [33.0] * 2]
    assert times(seen, "backward") == [
        [2.5] * 2,
        [100.0 + again * 10] * 2,
        [200.0 + again * 20] * 2,
        [55.0] * 2,
    ]
    assert {entry["left_out"] for entry in seen} == {""}
    # Evaluation is no training, and what was taken is gone.
    chunk.eval()
    chunk(torch.ones(3))
    assert times(take_step(parts, gathers=False, reduces=False), "forward") == [[]] * 4
    for watched in (*parts, forward):
        watched.remove()
    chunk.train()
    step(chunk)
    assert times(take_step(parts, gathers=False, reduces=False), "backward") == [[]] * 4


def test_passes_beside_collectives_of_data_parallelism_are_left_out(clock):
    chunk = Chunk(clock, recompute=False)
    parts, _ = watch(chunk)
    for gathers, reduces, forwards, backwards in ((True, False, 2, 3), (False, True, 3, 2), (True, True, 2, 2)):
        step(chunk, 3)
        seen = take_step(parts, gathers=gathers, reduces=reduces)
        assert {len(found) for found in times(seen, "forward")} == {forwards}
        assert {len(found) for found in times(seen, "backward")} == {backwards}
        assert {entry["left_out"] for entry in seen} == {""}
    step(chunk, 1)
    seen = take_step(parts, gathers=True, reduces=False)
    assert {entry["left_out"] for entry in seen} == {ALL_OVERLAP}


def test_of_interleaved_chunks_all_that_runs_before_the_last_one_begins_is_left_out(clock):
    """Two chunks of a rank: forward 0 0 1 1, backward 1 1 0 0."""
    chunks = [Chunk(clock, recompute=False) for _ in range(2)]
    numbers = count()
    parts = [
        WatchedLayer(
            module=chunk.decoder.layers[0],
            chunk=ChunkForward(chunk),
            about=ABOUT,
            on_gpu=False,
            numbers=numbers,
        )
        for chunk in chunks
    ]
    for gathers, reduces, expected in (
        (False, False, [(2, 2), (2, 2)]),
        (True, False, [(0, 2), (1, 2)]),
        (False, True, [(2, 0), (2, 1)]),
    ):
        losses = [chunks[index](torch.ones(3, requires_grad=True)) for index in (0, 0, 1, 1)]
        for index in (2, 3, 0, 1):
            losses[index].backward()
        seen = take_step(parts, gathers=gathers, reduces=reduces)
        found = list(zip(map(len, times(seen, "forward")), map(len, times(seen, "backward")), strict=True))
        assert found == expected
        assert [bool(entry["left_out"]) for entry in seen] == [0 in pair for pair in expected]
