"""Measures layers, embedding and head of a real Megatron model on the live ranks."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import custom_backward

from galvatron_megatron.describe.profile import EMBEDDING, HEAD, PartPoint
from galvatron_megatron.describe.typical import typical
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel
from galvatron_megatron.profiler.clock import Clock
from galvatron_megatron.profiler.few_layers import FewLayers, out_of_memory, refusal
from galvatron_megatron.profiler.fit import uncertainty
from galvatron_megatron.profiler.memory import MemoryMeter
from galvatron_megatron.profiler.process_group import gather

LONG = 2
"""A pass is long where it takes more than this many rounds' time."""
FEWEST_LONG = 2
"""Long passes that a round times."""


SPANS = {
    EMBEDDING: (("start", "decoder"), ("layers_done", "end")),
    "layer": (("decoder", "norm"), ("head_done", "layers_done")),
    HEAD: (("norm", "loss"), ("loss", "head_done")),
}
"""Boundaries of the forward and of the backward pass of every part, as ``run_once`` names them."""


@dataclass(kw_only=True, frozen=True, slots=True)
class _Batch:
    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None


def make_batch(few: FewLayers, micro_batch_size: int, seq_length: int) -> _Batch:
    """Random tokens in the shape that Megatron's data loader gives: [micro_batch_size, seq_length].

    The head of layers that split the sequence sees this rank's part alone: [micro_batch_size, part] labels.
    """
    shape = (micro_batch_size, seq_length)
    vocabulary = few.arguments.padded_vocab_size
    mask = None
    if getattr(few.arguments, "create_attention_mask_in_dataloader", True):
        square = torch.ones((micro_batch_size, 1, seq_length, seq_length), device="cuda")
        mask = torch.tril(square) < 0.5
    return _Batch(
        tokens=torch.randint(0, vocabulary, shape, device="cuda"),
        positions=torch.arange(seq_length, device="cuda").expand(shape).contiguous(),
        labels=torch.randint(
            0, vocabulary, (micro_batch_size, seq_length // few.sequence_parts), device="cuda"
        ),
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
    """Hooks that note when forward and backward cross the boundaries between the parts.

    Forward: ``start``, ``decoder`` (the first layer begins), ``norm`` (the final norm begins), ``loss``.
    Backward: ``head_done`` and ``layers_done`` (the gradient has reached the final norm's and the first layer's
    input), ``end``.
    """

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


def run_once(few: FewLayers, batch: _Batch, take: Any) -> dict[str, Any]:
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


def _slowest(seconds: float) -> float:
    """The largest of all ranks' seconds, above zero."""
    value = torch.tensor([seconds], device="cuda", dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return max(value.item(), 1e-6)


@dataclass(kw_only=True)
class PartMeasurement:
    """One setting of a model of a few layers, measured in rounds; every rank of the job makes the same calls.

    A disturbance (another process, a clock that changes) lasts longer than one setting takes, so the settings
    of a model are measured in turn and then once more, and those that vary much more often. The result is the
    mean of the middle half of all samples.
    """

    few: FewLayers
    """The model; its layers are all of one kind."""
    layer_name: str
    """Digest of that kind."""
    tp: int
    sequence_parallel: SequenceParallel
    recompute: Recompute
    micro_batch_size: int
    seq_length: int
    failure: str = ""
    """Why it cannot be measured, once that is known."""
    uncertainty: float = 0.0
    """Relative standard error of the layer's time, equal on every rank."""
    by_rank: list[float] = field(default_factory=list)
    """Seconds of every rank for the layers, forward and backward, by rank; empty before the first round."""
    _memory: dict[str, tuple[int, int]] | None = None
    _watched_seconds: float = 0.0
    """The pass whose memory was watched, which also warmed up: others are faster, unless they are disturbed."""
    _samples: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def round(self, budget_seconds: float) -> list[PartPoint]:
        """Measures once more.

        Args:
            budget_seconds: time for the repeats. Of a setting whose one pass takes longer than two rounds, the
                first round watches memory and every other one times two passes.

        Returns:
            Points of all samples so far, for the embedding, the layer and the head (embedding and head only
            without recomputation, which does not touch them): the maximum over ranks. Where any rank ran out of
            memory or Megatron refused, all points carry the failure. None yet where nothing was timed.
        """
        if not self.failure:
            try:
                with recomputing(self.few, self.recompute):
                    self._run(budget_seconds)
            except (AssertionError, ValueError, NotImplementedError) as error:
                self.failure = refusal(error)
            except RuntimeError as error:
                # A lost rank is a RuntimeError too, and no refusal.
                if not out_of_memory(error):
                    raise
                self.failure = refusal(error)
            self.few.ddp.zero_grad_buffer()
        answers = gather((self.failure, self._numbers() if self._samples and not self.failure else {}))
        self.failure = next((failure for failure, _ in answers if failure), "")
        numbers = [entry for _, entry in answers]
        if not self.failure and not self._samples:
            return []
        self.uncertainty = 0.0
        if not self.failure:
            self.by_rank = [entry["layer"]["forward"] + entry["layer"]["backward"] for entry in numbers]
            count = len(self._samples["layer", "forward"])
            self.uncertainty = uncertainty(max(entry["layer"]["spread"] for entry in numbers), count)
        return self._points(numbers)

    def _run(self, budget_seconds: float) -> None:
        clock = Clock()
        batch = make_batch(self.few, self.micro_batch_size, self.seq_length)
        first_round = self._memory is None
        if first_round:
            with MemoryMeter() as meter:
                start, _ = meter.read()
                seen = run_once(self.few, batch, lambda: (meter.read(), clock.mark()))
            clock.synchronize()
            self._memory = {name: (now - start, peak - start) for name, ((now, peak), _) in seen.items()}
            self._watched_seconds = _slowest(clock.seconds(seen["start"][1], seen["end"][1]))
        is_long = self._watched_seconds > LONG * budget_seconds
        if is_long and first_round:
            return
        if not is_long and not first_round:
            run_once(self.few, batch, clock.mark)
        dist.barrier()
        runs = [run_once(self.few, batch, clock.mark)]
        clock.synchronize()
        seconds = _slowest(clock.seconds(runs[0]["start"], runs[0]["end"]))
        # A pass that was long for being the first on its connections gets the repeats of a short one.
        repeats = max(int(min(20, budget_seconds / seconds)), FEWEST_LONG - 1)
        runs += [run_once(self.few, batch, clock.mark) for _ in range(repeats)]
        clock.synchronize()
        for part, spans in SPANS.items():
            for run in runs:
                for phase, (start, end) in zip(("forward", "backward"), spans, strict=True):
                    seconds = clock.seconds(run[start], run[end])
                    self._samples[part, phase].append(seconds / self._count(part))

    def _count(self, part: str) -> int:
        """How many of a part lie between its boundaries."""
        return self.few.layers if part == "layer" else 1

    def _numbers(self) -> dict[str, dict[str, float]]:
        """This rank's result for every part."""
        assert self._memory is not None
        held = {name: now for name, (now, _) in self._memory.items()}
        peak = {name: peak for name, (_, peak) in self._memory.items()}
        result = {}
        for part, (forward, backward) in SPANS.items():
            kept = max(held[forward[1]] - held[forward[0]], 0)
            above = max(peak[forward[1]], peak[backward[1]]) - held[forward[1]]
            phases = {name: typical(self._samples[part, name]) for name in ("forward", "backward")}
            result[part] = {
                **{name: seconds for name, (seconds, _) in phases.items()},
                "spread": max(spread for _, spread in phases.values()),
                "kept": kept // self._count(part),
                "transient": max(above, 0),
            }
        return result

    def _points(self, answers: list[dict[str, dict[str, float]]]) -> list[PartPoint]:
        common = {
            "tp": self.tp,
            "sequence_parallel": self.sequence_parallel,
            "recompute": self.recompute,
            "micro_batch_size": self.micro_batch_size,
        }
        plain = self.recompute is Recompute.NONE
        names = {self.layer_name: "layer"}
        if plain and self.few.sequence_group is None:
            names |= {EMBEDDING: EMBEDDING, HEAD: HEAD}
        if self.failure:
            return [PartPoint(part=name, failure=self.failure, **common) for name in names]
        parameters = parameter_counts(self.few)
        points = []
        for name, part in names.items():
            worst = {key: max(numbers[part][key] for numbers in answers) for key in answers[0][part]}
            points.append(
                PartPoint(
                    part=name,
                    forward_seconds=worst["forward"],
                    backward_seconds=worst["backward"],
                    spread=worst["spread"],
                    activation_bytes=int(worst["kept"]),
                    transient_bytes=int(worst["transient"]),
                    parameters=parameters[part][0],
                    tensors=parameters[part][1],
                    **common,
                )
            )
        return points


def parameter_counts(few: FewLayers) -> dict[str, tuple[int, int]]:
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
