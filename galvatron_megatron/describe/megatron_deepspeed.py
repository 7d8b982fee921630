"""A uniform plan as the flags of Megatron-DeepSpeed (deepspeedai/Megatron-DeepSpeed).

That code base is a Megatron-LM of 2023 with packages of its own in megatron-core's place, so that neither
megatron-core nor our hooks can be used with it. Its flags and DeepSpeed's configuration file say what they can.
"""

from pathlib import Path

from galvatron_megatron.describe.deepspeed_config import engine_strategy
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel

COMMIT = "4efb479d5317ce9b86096b9d8e3e8030b0b5263b"
"""The commit whose arguments were read (main of July 2025)."""


def megatron_deepspeed_arguments(plan: Plan, config: Path | str, *, stage: int | None = None) -> list[str]:
    """The words of a Megatron-DeepSpeed command line for a plan.

    Args:
        plan: in which all layers run alike.
        config: DeepSpeed's configuration file, as the command line is to name it.
        stage: ZeRO stage that the file says; the plan's by default.

    Raises:
        PlanError: Megatron-DeepSpeed cannot run the plan; names the field and the nearest valid choice.
    """
    strategy = engine_strategy(plan)
    kinds = {layer.kind for layer in plan.layers}
    if kinds != {LayerKind.BLOCK}:
        raise PlanError(
            f"plan layers of kind {', '.join(sorted(kinds - {LayerKind.BLOCK}))}: Megatron-DeepSpeed's "
            "pretrain_gpt.py has other ones; valid: block"
        )
    counts = {len(stage.layers) for stage in plan.stages}
    if plan.virtual_stages > 1:
        raise PlanError("plan.virtual_stages: DeepSpeed's pipeline does not interleave; valid: 1")
    if len(counts) > 1:
        raise PlanError(
            "plan.stages: of different length, which Megatron-DeepSpeed has no flag for; valid: equal stages"
        )
    words = [
        *("--tensor-model-parallel-size", str(strategy.tp)),
        *("--pipeline-model-parallel-size", str(plan.pp)),
        *("--micro-batch-size", str(plan.micro_batch_size)),
        *("--global-batch-size", str(plan.global_batch_size)),
        *("--deepspeed", "--deepspeed_config", str(config)),
        *("--zero-stage", str(strategy.zero if stage is None else stage)),
    ]
    if plan.pp == 1:
        # Otherwise its pipeline engine runs the single stage, and refuses ZeRO 2 and 3.
        words.append("--no-pipeline-parallel")
    if strategy.sequence_parallel is SequenceParallel.MEGATRON:
        words.append("--sequence-parallel")
    if strategy.offload is not Offload.NONE:
        words.append("--cpu-optimizer")
    if strategy.offload is Offload.PARAMETERS:
        words += ["--remote-device", "cpu"]
    return [*words, *_recompute_words(plan)]


def _recompute_words(plan: Plan) -> list[str]:
    kinds = {layer.strategy.recompute for layer in plan.layers}
    if len(kinds) > 1:
        raise PlanError(
            "plan recompute: layers differ; valid for Megatron-DeepSpeed: all layers none, selective or full"
        )
    (kind,) = kinds
    if kind is Recompute.NONE:
        return []
    if kind is Recompute.SELECTIVE:
        return ["--recompute-granularity", "selective"]
    words = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    return [*words, "--deepspeed-activation-checkpointing"]
