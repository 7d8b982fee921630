"""Measures the processor time that the runtime's engines of ZeRO 2 and 3 take beside a model's own passes."""

import time
from argparse import Namespace
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import torch
from megatron.core import parallel_state

from galvatron_megatron.describe.profile import EnginePoint
from galvatron_megatron.device import on_cpu
from galvatron_megatron.profiler.few_layers import FewLayers, bare_model
from galvatron_megatron.profiler.layers import SPANS, make_batch, parameter_counts, run_once
from galvatron_megatron.profiler.process_group import gather

STAGES = (2, 3)
LARGEST_PARAMETERS = 32 << 20
"""Beside the computation of a larger model (one layer, embedding and head) the engines' time does not count."""
_TOKENS = 16
"""So few that computing takes little; the engines' time does not depend on them."""
_WARM_UP, _REPEATS = 2, 5

Passes = dict[str, tuple[float, float]]
"""Seconds forward and backward by part."""


def can_measure_engines(arguments: Namespace) -> bool:
    """Whether engines are worth measuring for a model: on CPU ranks; beside GPUs the host runs ahead.

    Ranks route tokens to different experts, so models with experts are left out.

    Args:
        arguments: of Megatron, validated, for a model of one layer.
    """
    hidden = arguments.hidden_size
    wide = 2 * arguments.padded_vocab_size + 4 * hidden + 3 * (arguments.ffn_hidden_size or 4 * hidden)
    has_experts = bool(getattr(arguments, "num_experts", None))
    return on_cpu() and not has_experts and hidden * wide <= LARGEST_PARAMETERS


def measure_engines(arguments: Namespace, layer_name: str) -> list[EnginePoint]:
    """Runs a model with and without engines; every rank of the job calls this, in a parallel state.

    The time is that of the processor in the thread that computes, so that neither other ranks nor collectives
    are in it.

    Args:
        arguments: of Megatron, validated, for a model of one layer.
        layer_name: digest of the layer.

    Returns:
        Points of the embedding, the layer and the head under ZeRO 2 and 3: means over ranks.
    """
    few = _few(arguments)
    counts = {part: count for part, (count, _) in parameter_counts(few).items()}
    shares = {part: count / sum(counts.values()) for part, count in counts.items()}
    plain = _passes(few, shares, lambda: None)
    points = []
    for zero in STAGES:
        with_engine = _with_engine(_few(arguments), shares, zero)
        for part in SPANS:
            more = [max(0.0, a - b) for a, b in zip(with_engine[part], plain[part], strict=True)]
            forward, backward = (fmean(values) for values in zip(*gather(more), strict=True))
            points.append(
                EnginePoint(
                    part=layer_name if part == "layer" else part,
                    zero=zero,
                    forward_seconds=forward,
                    backward_seconds=backward,
                )
            )
    return points


def _few(arguments: Namespace) -> FewLayers:
    module = bare_model(arguments)
    module.cuda(torch.cuda.current_device())
    if arguments.fp16 or arguments.bf16:
        module.to(arguments.params_dtype)
    return FewLayers(arguments=arguments, module=module, ddp=module, layers=1)


def _passes(few: FewLayers, shares: dict[str, float], end: Callable[[], None]) -> Passes:
    """Processor seconds of the passes of every part.

    Args:
        few: the model.
        shares: of the parameters, by part.
        end: called behind every backward pass; parts share its time as they share parameters.
    """
    batch = make_batch(few, 1, min(_TOKENS, few.arguments.seq_length))
    samples: dict[tuple[str, int], list[float]] = {(part, side): [] for part in SPANS for side in (0, 1)}
    for number in range(_WARM_UP + _REPEATS):
        seen = run_once(few, batch, time.thread_time)
        ending = time.thread_time()
        end()
        ending = time.thread_time() - ending
        few.module.zero_grad(set_to_none=True)
        if number < _WARM_UP:
            continue
        for part, spans in SPANS.items():
            for side, (first, last) in enumerate(spans):
                shared = side * ending * shares[part]
                samples[part, side].append(seen[last] - seen[first] + shared)
    return {part: (median(samples[part, 0]), median(samples[part, 1])) for part in SPANS}


def _with_engine(few: FewLayers, shares: dict[str, float], zero: int) -> Passes:
    """The same under an engine over all parameters."""
    from galvatron_megatron.runtime.zero import import_engines
    from galvatron_megatron.runtime.zero_ahead import BACKWARD, FORWARD, GatherAhead

    engines = import_engines()
    # Not before: the first import settles for good which device DeepSpeed takes.
    from deepspeed.comm import comm as deepspeed_comm

    module = few.module
    names = {parameter: name for name, parameter in module.named_parameters()}
    options = engines.EngineOptions(
        group=parallel_state.get_data_parallel_group(),
        gradient_dtype=torch.float32,
        communication_dtype=torch.float32,
        bucket_elements=sum(parameter.numel() for parameter in names),
        scale=1.0 / parallel_state.get_data_parallel_world_size(),
    )
    optimizer = torch.optim.AdamW(list(names), lr=0.0)
    borrowers = []
    head = getattr(module, "output_layer", None)
    if zero == 3 and head is not None and head.weight is None:
        borrowers = [(head, module.shared_embedding_or_output_weight())]
    engine = (
        engines.ShardedStatesEngine(optimizer, names, zero, options)
        if zero < 3
        else engines.ShardedParametersEngine(optimizer, names, [module], borrowers, options)
    )
    ahead = GatherAhead(few.layer_modules)
    if zero == 3:
        ahead.add(engine)

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        ahead.begin(FORWARD)
        losses = module(*args, **kwargs)
        ahead.end()
        ahead.begin(BACKWARD)
        engine.begin_backward()
        return losses

    def end() -> None:
        ahead.end()
        engine.end_backward()

    few.ddp = forward
    try:
        return _passes(few, shares, end)
    finally:
        engine.destroy()
        # The job's own process group comes later; DeepSpeed connects to that one then.
        deepspeed_comm.cdb = None
