"""Traces the layers of a Megatron command line; runs in a process of its own, started by ``trace``.

Reads one JSON request from the standard input and writes one JSON answer to the file named in it. Under
``fake`` no tensor has data and the process group answers without other ranks; otherwise the same layers run for
real, one process per rank over gloo, which is how the fake run is checked.
"""

import contextlib
import io
import json
import logging
import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from galvatron_megatron.describe.megatron_args import model_from_arguments
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.cpu_device import CpuDevice, configure
from galvatron_megatron.plan.strategy import SequenceParallel
from galvatron_megatron.profiler.trace_kernels import compiled

_KEPT_FUSIONS = ("bias_gelu_fusion", "bias_swiglu_fusion", "bias_dropout_fusion")


@dataclass(kw_only=True, frozen=True, slots=True)
class Request:
    """What to trace."""

    argv: list[str]
    """Megatron's arguments, without the script's name."""
    settings: list[tuple[tuple[int, str, int, int], str, int]]
    """((tp, sequence parallelism, expert parallelism, parts of an expert), recompute, samples) of every trace
    wanted."""
    answer: str
    """File to write."""
    vocab_size: int | None = None
    fake: bool = True
    kernels: str = "gpu"
    fused_attention: bool = True
    world_size: int = 0


def parse(argv: list[str]) -> Namespace:
    """Megatron's arguments, parsed but not validated."""
    from megatron.training.arguments import parse_args

    before = sys.argv
    sys.argv = ["trace", *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return parse_args(ignore_unknown_args=True)
    finally:
        sys.argv = before


@contextlib.contextmanager
def process_group(request: Request, world_size: int) -> Iterator[None]:
    """A fake group of so many ranks, or the real one that the environment describes, which is made once."""
    if not request.fake:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def answer(request: Request) -> list[dict[str, Any]]:
    """Traces everything that the request asks for.

    Returns:
        One row per part and setting: part, layout, recompute, samples, counts.
    """
    from galvatron_megatron.profiler.few_layers import parallel_state_of
    from galvatron_megatron.profiler.trace_parts import PartTracer

    arguments = parse(request.argv)
    # Before anything is set for tracing: parts are named by the layers of the command line as it stands.
    model = model_from_arguments(vars(arguments), vocab_size=request.vocab_size)
    configure_for_tracing(arguments)
    rows = []
    for tp, *experts in dict.fromkeys((layout[0], *layout[2:]) for layout, _, _ in request.settings):
        arguments.expert_model_parallel_size, arguments.expert_tensor_parallel_size = experts
        smallest = math.lcm(tp, math.prod(experts))
        world_size = max(1, request.world_size // smallest) * smallest
        layouts = dict.fromkeys(s[0] for s in request.settings if (s[0][0], *s[0][2:]) == (tp, *experts))
        with process_group(request, world_size), parallel_state_of(tp, arguments):
            for layout in layouts:
                sequence_parallel = layout[1]
                tracer = PartTracer(
                    arguments,
                    model,
                    tp=tp,
                    sequence_parallel=SequenceParallel(sequence_parallel),
                    world_size=world_size,
                    fake=request.fake,
                    kernels=request.kernels,
                    fuse=request.fused_attention,
                )
                wanted = [s[1:] for s in request.settings if s[0] == layout]
                setting = {"layout": layout}
                try:
                    for part, recompute, samples, counts in tracer.rows(wanted):
                        row = {"part": part, "recompute": recompute, "samples": samples}
                        rows.append(setting | row | {"counts": counts.to_json()})
                except (GalvatronError, ValueError, AssertionError) as error:
                    rows.append(setting | {"refused": _first_line(error)})
    return rows


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def configure_for_tracing(arguments: Namespace) -> None:
    """Sets what Megatron's local layers need on CPU tensors, and keeps fusions that are plain Python."""
    kept = {name: getattr(arguments, name) for name in _KEPT_FUSIONS if hasattr(arguments, name)}
    configure(arguments)
    for name, value in kept.items():
        setattr(arguments, name, value)
    if arguments.num_experts:
        # As many tokens for every expert: shapes are then known without data, and the load is balanced.
        arguments.moe_token_dispatcher_type = "alltoall"
        arguments.moe_expert_capacity_factor = 1.0
        arguments.moe_pad_expert_input_to_capacity = True


def main() -> int:
    """Answers the request on the standard input; user errors go to the answer as one line."""
    request = Request(**json.load(sys.stdin))
    request = Request(
        **{name: getattr(request, name) for name in request.__slots__}
        | {"settings": [(tuple(layout), *rest) for layout, *rest in request.settings]}
    )
    os.environ["TORCHDYNAMO_DISABLE"] = os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    logging.disable(logging.WARNING)
    torch.compile = compiled
    CpuDevice(even_with_gpu=True).install()
    try:
        content: dict[str, Any] = {"rows": answer(request)}
    except GalvatronError as error:
        content = {"error": str(error), "kind": type(error).__name__}
    Path(request.answer).write_text(json.dumps(content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
