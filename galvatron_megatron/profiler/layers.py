"""Measures layers, embedding and head of a real Megatron model on the live ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import custom_backward

from galvatron_megatron.describe.profile import EMBEDDING, HEAD, PartPoint
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.profiler.clock import Clock
from galvatron_megatron.profiler.few_layers import FewLayers
from galvatron_megatron.profiler.fit import median_and_spread
from galvatron_megatron.profiler.memory import MemoryMeter
from galvatron_megatron.profiler.process_group import gather

_BOUNDARIES = ("start", "decoder", "norm", "loss", "head_done", "layers_done", "end")
"""Forward: start, first layer begins, final norm begins, loss is there; backward: the gradient has reached the
final norm's input, the first layer's input, everything."""


@dataclass(kw_only=True, frozen=True, slots=True)
class _Batch:
    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None


def make_batch(few: FewLayers, micro_batch_size: int, seq_length: int) -> _Batch:
    """Random tokens in the shape that Megatron's data loader gives: [micro_batch_size, seq_length]."""
    shape = (micro_batch_size, seq_length)
    vocabulary = few.arguments.padded_vocab_size
    mask = None
    if getattr(few.arguments, "create_attention_mask_in_dataloader", True):
        square = torch.ones((micro_batch_size, 1, seq_length, seq_length), device="cuda")
        mask = torch.tril(square) < 0.5
    return _Batch(
        tokens=torch.randint(0, vocabulary, shape, device="cuda"),
        positions=torch.arange(seq_length, device="cuda").expand(shape).contiguous(),
        labels=torch.randint(0, vocabulary, shape, device="cuda"),
        mask=mask,
    )


@contextmanager
def recomputing(few: FewLayers, recompute: Recompute) -> Iterator[None]:
    """Switches the model's recomputation for a while, as Megatron's arguments would.

    ``full`` is ``--recompute-granularity full --recompute-method uniform --recompute-num-layers 1``.
    """
    config = few.module.config
    names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    before = {name: getattr(config, name) for name in names}
    attentions = [m for m in few.module.modules() if hasattr(m, "checkpoint_core_attention")]
    try:
        if recompute is Recompute.FULL:
            config.recompute_granularity, config.recompute_method, config.recompute_num_layers = (
                "full",
                "uniform",
                1,
            )
        elif recompute is Recompute.SELECTIVE:
            config.recompute_granularity = "selective"
            for attention in attentions:
                attention.checkpoint_core_attention = True
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        for attention in attentions:
            attention.checkpoint_core_attention = False


class _Marks:
    """Hooks that note when forward and backward cross the boundaries between the parts."""

    def __init__(self, few: FewLayers, take: Any) -> None:
        self.seen: dict[str, Any] = {}
        self._take = take
        decoder = few.module.decoder
        self._handles = [
            decoder.register_forward_pre_hook(self._crossing("decoder", "layers_done"), with_kwargs=True),
            few.final_norm.register_forward_pre_hook(self._crossing("norm", "head_done"), with_kwargs=True),
        ]

    def note(self, name: str) -> None:
        """Takes a mark at a boundary."""
        self.seen[name] = self._take()

    def _crossing(self, forward: str, backward: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self.note(forward)
            tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            tensor.register_hook(lambda gradient: self.note(backward))

        return hook

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _run_once(few: FewLayers, batch: _Batch, take: Any) -> dict[str, Any]:
    """One forward and backward; what ``take`` returned at every boundary."""
    marks = _Marks(few, take)
    try:
        marks.note("start")
        losses = few.ddp(batch.tokens, batch.positions, batch.mask, labels=batch.labels)
        loss = losses.float().mean()
        marks.note("loss")
        # What Megatron's schedules call; Tensor.backward would leave the CPU back end.
        custom_backward(loss, None)
        marks.note("end")
    finally:
        marks.remove()
    return marks.seen


def measure_parts(
    few: FewLayers,
    layer_name: str,
    *,
    tp: int,
    sequence_parallel: SequenceParallel,
    recompute: Recompute,
    micro_batch_size: int,
    seq_length: int,
    budget_seconds: float,
) -> list[PartPoint]:
    """Measures forward, backward and memory of one setting; every rank of the job calls this.

    Args:
        few: the model; its layers are all of one kind.
        layer_name: digest of that kind.
        tp: as ``few`` was built.
        sequence_parallel: as ``few`` was built.
        recompute: what to recompute.
        micro_batch_size: samples.
        seq_length: tokens of a sample.
        budget_seconds: time for the repeats; at least three are made.

    Returns:
        Points of the embedding, the layer and the head (embedding and head only without recomputation, which
        does not touch them). Where any rank ran out of memory, all points carry the failure.
    """
    keys = {
        "tp": tp,
        "sequence_parallel": sequence_parallel,
        "recompute": recompute,
        "micro_batch_size": micro_batch_size,
    }
    names = [layer_name] if recompute is not Recompute.NONE else [EMBEDDING, layer_name, HEAD]
    failure, numbers = "", {}
    try:
        with recomputing(few, recompute):
            batch = make_batch(few, micro_batch_size, seq_length)
            numbers = _measure(few, batch, budget_seconds)
    except torch.OutOfMemoryError:
        failure = "out of memory"
        torch.cuda.empty_cache()
    few.ddp.zero_grad_buffer()
    answers = gather((failure, numbers))
    failures = [answer for answer, _ in answers if answer]
    if failures:
        return [PartPoint(part=name, failure=failures[0], **keys) for name in names]
    parameters = _parameters(few)
    points = []
    for name in names:
        part = "layer" if name == layer_name else name
        worst = max(
            (numbers[part] for _, numbers in answers), key=lambda entry: entry["forward"] + entry["backward"]
        )
        points.append(
            PartPoint(
                part=name,
                forward_seconds=max(n[part]["forward"] for _, n in answers),
                backward_seconds=max(n[part]["backward"] for _, n in answers),
                spread=worst["spread"],
                activation_bytes=max(n[part]["kept"] for _, n in answers),
                transient_bytes=max(n[part]["transient"] for _, n in answers),
                parameters=parameters[part][0],
                tensors=parameters[part][1],
                **keys,
            )
        )
    return points


def _parameters(few: FewLayers) -> dict[str, tuple[int, int]]:
    """(parameters, tensors) of each part on this rank; a tied embedding counts for the embedding."""

    def count(module: torch.nn.Module) -> tuple[int, int]:
        sizes = [parameter.numel() for parameter in module.parameters()]
        return sum(sizes), len(sizes)

    whole, embedding, layers = (
        count(module) for module in (few.module, few.module.embedding, few.module.decoder.layers)
    )
    return {
        EMBEDDING: embedding,
        "layer": (layers[0] // few.layers, layers[1] // few.layers),
        HEAD: (whole[0] - embedding[0] - layers[0], whole[1] - embedding[1] - layers[1]),
    }


def _measure(few: FewLayers, batch: _Batch, budget_seconds: float) -> dict[str, dict[str, float]]:
    clock = Clock()
    _run_once(few, batch, clock.mark)
    with MemoryMeter() as meter:
        base, _ = meter.read()
        memory = _run_once(few, batch, meter.read)
    few.ddp.zero_grad_buffer()
    dist.barrier()
    warm = _run_once(few, batch, clock.mark)
    clock.synchronize()
    total = torch.tensor([clock.seconds(warm["start"], warm["end"])], device="cuda", dtype=torch.float64)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    repeats = int(min(30, max(3, budget_seconds / max(total.item(), 1e-6))))
    runs = []
    for _ in range(repeats):
        runs.append(_run_once(few, batch, clock.mark))
    clock.synchronize()
    spans = {
        EMBEDDING: (("start", "decoder"), ("layers_done", "end"), 1),
        "layer": (("decoder", "norm"), ("head_done", "layers_done"), few.layers),
        HEAD: (("norm", "loss"), ("loss", "head_done"), 1),
    }
    held = {name: memory[name][0] - base for name in _BOUNDARIES}
    peak = {name: memory[name][1] - base for name in _BOUNDARIES}
    result = {}
    for part, (forward, backward, count) in spans.items():
        times = {
            key: [clock.seconds(run[a], run[b]) / count for run in runs]
            for key, (a, b) in (("forward", forward), ("backward", backward))
        }
        _, spread = median_and_spread([f + b for f, b in zip(times["forward"], times["backward"], strict=True)])
        kept = max(held[forward[1]] - held[forward[0]], 0)
        above_forward = peak[forward[1]] - held[forward[1]]
        above_backward = peak[backward[1]] - held[forward[1]]
        result[part] = {
            "forward": median_and_spread(times["forward"])[0],
            "backward": median_and_spread(times["backward"])[0],
            "spread": spread,
            "kept": kept // count,
            "transient": max(above_forward, above_backward, 0),
        }
    return result
