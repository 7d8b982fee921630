"""The plan that a Megatron command line stands for as it is, nothing searched."""

from collections.abc import Sequence
from dataclasses import replace

from galvatron_megatron.describe.command_line import plan_constraints
from galvatron_megatron.describe.model import Model
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.checks import shown
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy


def plan_from_command_line(argv: Sequence[str], model: Model, world_size: int) -> Plan:
    """The uniform plan that Megatron runs for a command line on so many ranks.

    Args:
        argv: the script and its flags.
        model: described by the same command line.
        world_size: ranks of the job.

    Raises:
        PlanError: the degrees do not divide the ranks, or the layers or batch do not divide.
    """
    fixed = plan_constraints(argv)
    tp, pp, cp = fixed.tp or 1, fixed.pp or 1, fixed.cp or 1
    if fixed.pp is None and fixed.stage_layers is not None:
        pp = len(fixed.stage_layers)
    dp, rest = divmod(world_size, tp * pp * cp)
    if rest or dp == 0:
        raise PlanError(
            f"command line: tp {tp} x pp {pp} x cp {cp} does not divide {world_size} ranks; valid: a number of "
            f"devices that is a multiple of {tp * pp * cp}"
        )
    micro = fixed.micro_batch_size
    if micro is None:
        raise PlanError("command line: no --micro-batch-size; valid: --micro-batch-size N")
    batch = fixed.global_batch_size or micro * dp
    if batch % (micro * dp):
        raise PlanError(
            f"command line: --global-batch-size {batch} is not divisible by micro-batch {micro} x dp {dp}; "
            f"valid: a multiple of {micro * dp}"
        )
    strategy = Strategy(
        tp=tp,
        cp=cp,
        dp=dp,
        zero=fixed.zero or 0,
        sequence_parallel=(
            fixed.sequence_parallel or SequenceParallel.NONE if tp > 1 else SequenceParallel.NONE
        ),
    )
    recomputed = replace(strategy, recompute=fixed.recompute or Recompute.NONE)
    limit = fixed.recomputed_layers_per_stage
    kinds = iter(layer.kind for layer in model.layers)
    experts = {
        "expert_parallel": fixed.expert_parallel or 1,
        "expert_tensor_parallel": fixed.expert_tensor_parallel,
    }
    if not any(layer.kind.has_experts for layer in model.layers) and experts["expert_parallel"] > 1:
        raise PlanError(
            f"command line: --expert-model-parallel-size {fixed.expert_parallel} without experts; valid: "
            "--num-experts N beside it, or 1"
        )

    def planned(kind: LayerKind, chosen: Strategy) -> LayerPlan:
        return LayerPlan(kind=kind, strategy=replace(chosen, **experts) if kind.has_experts else chosen)

    counts = _stage_layers(fixed, len(model.layers), pp)
    if sum(counts) != len(model.layers) or min(counts) < 1:
        raise PlanError(
            f"command line: stages of {shown(list(counts))} layers; valid: at least one layer in every stage, "
            f"{len(model.layers)} together"
        )
    stages = tuple(
        StagePlan(
            layers=tuple(
                planned(next(kinds), recomputed if limit is None or place < limit else strategy)
                for place in range(count)
            )
        )
        for count in counts
    )
    return Plan(
        pp=pp,
        virtual_stages=len(stages) // pp,
        micro_batch_size=micro,
        micro_batches=batch // (micro * dp),
        base=strategy,
        stages=stages,
    )


def _stage_layers(fixed: Constraints, layers: int, pp: int) -> tuple[int, ...]:
    """Layers of every virtual stage."""
    if fixed.stage_layers is not None:
        return fixed.stage_layers
    first, last = fixed.first_stage_layers, fixed.last_stage_layers
    virtual = fixed.virtual_stages or 1
    if fixed.layers_per_virtual_stage is not None:
        virtual, rest = divmod(layers, pp * fixed.layers_per_virtual_stage)
        if rest:
            raise PlanError(
                f"command line: --num-layers-per-virtual-pipeline-stage {fixed.layers_per_virtual_stage} x pp "
                f"{pp} does not divide {layers} layers; valid: a divisor of {layers // pp}"
            )
    given = [count for count in (first, last) if count is not None]
    middle, left = pp - len(given), layers - sum(given)
    per_rank = left // middle if middle else 0
    if (middle and left % middle) or (not middle and left) or virtual < 1 or per_rank % virtual:
        raise PlanError(
            f"command line: {layers} layers do not divide over {pp} pipeline ranks with {virtual} virtual "
            "stages each; valid: degrees that divide the layers"
        )
    ranks = [per_rank] * pp
    if first is not None:
        ranks[0] = first
    if last is not None:
        ranks[-1] = last
    if any(count % virtual for count in ranks):
        raise PlanError(
            f"command line: {ranks} layers a rank do not divide into {virtual} virtual stages; valid: multiples"
        )
    return tuple(count // virtual for _ in range(virtual) for count in ranks)
