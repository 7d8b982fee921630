"""A uniform plan as DeepSpeed's configuration file, for ``deepspeed.initialize`` and for Megatron-DeepSpeed.

DeepSpeed's engine has one ZeRO stage and one data-parallel group for the whole model. What a plan says beyond
that is refused here: such a plan runs under ``--galvatron-plan``.
"""

import json

from galvatron_megatron.describe.model import Model
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload, SequenceParallel, Strategy

PRECISIONS = ("bf16", "fp16", "fp32")

_LOSS_SCALE = {"loss_scale": 0, "initial_scale_power": 32, "loss_scale_window": 1000, "min_loss_scale": 1}
"""Megatron's defaults: dynamic, from 2**32 (``--initial-loss-scale``, ``--loss-scale-window``)."""


def deepspeed_config(plan: Plan, *, precision: str, clip_grad: float, model: Model | None = None) -> dict:
    """The content of a ``ds_config.json`` for a plan.

    Gradients are accumulated in fp32 where weights are bf16, as Megatron does.

    Args:
        plan: in which all layers run alike (they may differ in recomputation, which is the model's own).
        precision: ``bf16``, ``fp16`` or ``fp32``.
        clip_grad: largest gradient norm (``--clip-grad``); 0 clips nothing.
        model: the model it is for, from which buffers take their sizes; DeepSpeed's defaults without it.

    Returns:
        Mappings, lists, strings and numbers.

    Raises:
        PlanError: DeepSpeed's engine cannot run the plan; names the field and the nearest valid choice.
    """
    if precision not in PRECISIONS:
        raise PlanError(f"precision: {precision!r}; valid: {', '.join(PRECISIONS)}")
    if not 0 <= clip_grad < float("inf"):
        raise PlanError(f"--clip-grad: {clip_grad}; valid: a number >= 0")
    strategy = engine_strategy(plan)
    stage = strategy.zero
    if precision == "bf16" and stage == 0:
        if strategy.state_replicas > 1:
            raise PlanError(
                "plan zero: 0 in bf16, where DeepSpeed's engine takes a first step of its own; valid: zero 1, "
                "or Megatron's own data parallelism (galvatron export without --deepspeed)"
            )
        # A rank that shards with nobody: the same states, and fp32 gradients, which stage 0 has not.
        stage = 1
    document: dict = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.micro_batches,
        "gradient_clipping": clip_grad,
        "zero_optimization": {"stage": stage, **_buffers(stage, model), **_offload(strategy)},
        "steps_per_print": 100,
    }
    if precision == "fp16":
        document["fp16"] = {"enabled": True, **_LOSS_SCALE}
    if precision == "bf16":
        document["bf16"] = {"enabled": True}
        document["data_types"] = {"grad_accum_dtype": "fp32"}
        document["communication_data_type"] = "fp32"
    return document


def engine_strategy(plan: Plan) -> Strategy:
    """The one strategy of a plan that DeepSpeed's engine can run, without recomputation.

    Raises:
        PlanError: layers differ, or the engine has no such strategy.
    """
    base = plan.base
    for index, layer in enumerate(plan.layers):
        own = layer.strategy.without_experts
        if (own.layout, own.sequence_parallel, own.zero, own.offload) != (
            base.layout,
            base.sequence_parallel,
            base.zero,
            base.offload,
        ):
            raise PlanError(
                f"plan layer {index}: {layer.strategy}, but the base layout is {base}; valid for DeepSpeed's "
                "engine: all layers alike (galvatron search --uniform), or train with --galvatron-plan"
            )
    if any(degrees != (1, None) for degrees in plan.expert_degrees):
        raise PlanError(
            "plan expert_parallel: DeepSpeed's engine does not know Megatron's expert groups; valid: "
            "expert_parallel 1"
        )
    if base.cp > 1 or base.sequence_parallel is SequenceParallel.ULYSSES:
        raise PlanError(
            f"plan.base: {base}; valid for DeepSpeed's engine: cp 1 and sequence_parallel none or megatron"
        )
    if plan.pp > 1 and base.zero > 1:
        raise PlanError(
            f"plan.base.zero: {base.zero} with pp {plan.pp}, which DeepSpeed's engine refuses; valid: zero 0, "
            "1, or train with --galvatron-plan"
        )
    return base


def deepspeed_json(document: dict) -> str:
    """The text of the file."""
    return json.dumps(document, indent=2) + "\n"


def _buffers(stage: int, model: Model | None) -> dict:
    """Sizes of DeepSpeed's buffers, in elements.

    Stage 3 takes the sizes that DeepSpeed's integration in Hugging Face Transformers derives from the hidden
    size ("auto" values): reduce in buckets of hidden**2, fetch 0.9 hidden**2 ahead, keep tensors of up to
    10 hidden whole on every rank. Lower stages reduce and gather in buckets of one layer, so that there is
    something to overlap with, in the bounds that DeepSpeed recommends for its 16-bit buckets.
    """
    buffers: dict = {"overlap_comm": stage > 0, "contiguous_gradients": True} if stage else {}
    if model is None or stage == 0:
        return buffers
    hidden = model.hidden_size
    if stage == 3:
        return buffers | {
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
        }
    largest = max(layer.parameter_count(hidden, model.normalization) for layer, _ in model.layer_runs())
    # Even, as DeepSpeed wants it.
    bucket = min(max(largest, 50_000_000), 500_000_000) // 2 * 2
    return buffers | {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}


def _offload(strategy: Strategy) -> dict:
    host = {"device": "cpu", "pin_memory": True}
    if strategy.offload is Offload.NONE:
        return {}
    if strategy.offload is Offload.OPTIMIZER:
        return {"offload_optimizer": host}
    return {"offload_optimizer": host, "offload_param": dict(host)}
