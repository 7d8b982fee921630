"""A plan as Megatron's own arguments (Megatron-LM core_v0.19).

The arguments reproduce a plan exactly where ``runs_on_stock_megatron`` is true. Otherwise they are the base
layout under which the runtime gives each layer the strategy of the plan file.
"""

import shlex
from collections.abc import Sequence
from typing import Protocol

from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy

_GPT_KINDS = frozenset({LayerKind.BLOCK, LayerKind.MOE_BLOCK})
_HYBRID_SYMBOLS = {
    LayerKind.ATTENTION: "*",
    LayerKind.MLP: "-",
    LayerKind.MOE: "E",
    LayerKind.MAMBA: "M",
}
_LATENT_ATTENTION_SYMBOL = "+"
_RECOMPUTE_ARGUMENTS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
)


class _HasLayers(Protocol):
    """A model description, as far as it is needed here."""

    @property
    def layers(self) -> Sequence[object]: ...


def megatron_arguments(
    plan: Plan, model: _HasLayers | None = None, *, sharding_by_runtime: bool = False
) -> dict[str, object]:
    """Turns a plan into Megatron's arguments.

    Args:
        plan: the plan.
        model: the model it is for; tells plain from multi-latent attention in a hybrid pattern.
        sharding_by_runtime: ZeRO 2 and 3 are the runtime's job, so that they need no argument.

    Returns:
        Destination in Megatron's namespace -> value, for every argument that a plan decides; None and False
        undo what might be there.

    Raises:
        PlanError: Megatron has no arguments for the plan; names the field and the nearest valid choice.
    """
    _check_expressible(plan, sharding_by_runtime)
    base = plan.base
    is_ulysses = base.sequence_parallel is SequenceParallel.ULYSSES
    arguments: dict[str, object] = {
        "tensor_model_parallel_size": base.weight_shards,
        "pipeline_model_parallel_size": plan.pp,
        "sequence_parallel": base.sequence_parallel is SequenceParallel.MEGATRON,
        "context_parallel_size": base.tp if is_ulysses else base.cp,
        "micro_batch_size": plan.micro_batch_size,
        "global_batch_size": plan.global_batch_size,
        "use_distributed_optimizer": base.zero == 1,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "num_virtual_stages_per_pipeline_rank": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "pipeline_model_parallel_layout": None,
    }
    if is_ulysses:
        # Megatron's name for Ulysses is context parallelism that communicates by all-to-all.
        arguments["cp_comm_type"] = ["a2a"]
    # Where layers differ, the runtime recomputes layer by layer.
    recompute = _recompute_arguments(plan) if runs_on_stock_megatron(plan) else None
    arguments |= recompute or dict.fromkeys(_RECOMPUTE_ARGUMENTS)
    arguments |= _expert_arguments(plan)
    arguments |= _stage_arguments(plan, model)
    return arguments


def command_line(
    plan: Plan, model: _HasLayers | None = None, *, sharding_by_runtime: bool = False
) -> list[str]:
    """Turns a plan into the words of a Megatron command line.

    Args and errors are those of ``megatron_arguments``.
    """
    words: list[str] = []
    for dest, value in megatron_arguments(plan, model, sharding_by_runtime=sharding_by_runtime).items():
        if value is None or value is False:
            continue
        option = "--" + dest.replace("_", "-")
        if value is True:
            words.append(option)
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        elif str(value).startswith("-"):
            # A hybrid pattern may start with an MLP layer, which argparse would take for an option.
            words.append(f"{option}={value}")
        else:
            words += [option, str(value)]
    return words


def shell_line(words: Sequence[str]) -> str:
    """Words of a command line as a shell reads them: patterns and layouts in quotes."""
    return shlex.join(words)


def runs_on_stock_megatron(plan: Plan) -> bool:
    """True where Megatron's arguments alone reproduce the plan, with no code of this package at run time."""
    plain_base = _without_recompute(plan.base)
    return (
        plan.base.zero <= 1
        and plan.base.offload is Offload.NONE
        and all(_without_recompute(layer.strategy) == plain_base for layer in plan.layers)
        and len(plan.expert_degrees) <= 1
        and _recompute_arguments(plan) is not None
    )


def stage_layout(plan: Plan) -> str:
    """The plan's stages as a ``--pipeline-model-parallel-layout``, e.g. ``"Et*3|t*4|t*3L"``."""
    parts = [f"t*{len(stage.layers)}" if len(stage.layers) > 1 else "t" for stage in plan.stages]
    return "E" + "|".join(parts) + "L"


def _without_recompute(strategy: Strategy) -> Strategy:
    """What every layer must share, with experts or without."""
    return Strategy(
        tp=strategy.tp,
        sequence_parallel=strategy.sequence_parallel,
        cp=strategy.cp,
        dp=strategy.dp,
        zero=strategy.zero,
        offload=strategy.offload,
    )


def _expert_arguments(plan: Plan) -> dict[str, object]:
    """Megatron has one pair of expert degrees for all layers; where layers differ, the runtime has its own."""
    degrees = plan.expert_degrees
    if not degrees:
        return {}
    ep, etp = degrees[0] if runs_on_stock_megatron(plan) else (1, None)
    return {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}


def _check_expressible(plan: Plan, sharding_by_runtime: bool) -> None:
    base = plan.base
    if not sharding_by_runtime:
        for where, strategy in [("plan.base", base)] + [
            (f"plan layer {index}", layer.strategy) for index, layer in enumerate(plan.layers)
        ]:
            if strategy.zero > 1:
                raise PlanError(
                    f"{where}: zero {strategy.zero} has no Megatron argument; valid: zero 0 or 1, "
                    "or train with --galvatron-plan FILE, where the runtime shards"
                )
            if strategy.offload is not Offload.NONE:
                raise PlanError(
                    f"{where}: offload {strategy.offload.value} has no Megatron argument; valid: offload none, "
                    "--galvatron-plan FILE to train, or galvatron export --deepspeed FILE for DeepSpeed"
                )
    if base.sequence_parallel is SequenceParallel.ULYSSES and base.cp > 1:
        raise PlanError(
            f"plan.base.cp: {base.cp} together with ulysses has no Megatron argument; "
            "valid: cp 1, or sequence_parallel none or megatron"
        )
    if plan.virtual_stages > 1 and plan.micro_batches % plan.pp:
        raise PlanError(
            f"plan.micro_batches: {plan.micro_batches} with {plan.virtual_stages} virtual stages; valid: a "
            f"multiple of pp {plan.pp}, as Megatron's interleaved schedule needs"
        )


def _recompute_arguments(plan: Plan) -> dict[str, object] | None:
    """Arguments for the plan's recomputation, or None where Megatron has none for it."""
    arguments: dict[str, object] = dict.fromkeys(_RECOMPUTE_ARGUMENTS)
    used = {layer.strategy.recompute for layer in plan.layers}
    if used == {Recompute.NONE}:
        return arguments
    # A layer without attention has nothing that selective recomputation could drop.
    attending = {layer.strategy.recompute for layer in plan.layers if layer.kind.has_attention}
    if Recompute.FULL not in used and attending <= {Recompute.SELECTIVE}:
        return arguments | {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    full = {"recompute_granularity": "full"}
    if used == {Recompute.FULL}:
        return arguments | full | {"recompute_method": "uniform", "recompute_num_layers": 1}
    if used == {Recompute.FULL, Recompute.NONE}:
        # Megatron's method block recomputes the first so many layers of every virtual stage.
        recomputed = {
            tuple(layer.strategy.recompute for layer in stage.layers).count(Recompute.FULL)
            for stage in plan.stages
        }
        count = max(recomputed)
        leading = all(
            layer.strategy.recompute is (Recompute.FULL if position < count else Recompute.NONE)
            for stage in plan.stages
            for position, layer in enumerate(stage.layers)
        )
        if leading:
            return arguments | full | {"recompute_method": "block", "recompute_num_layers": count}
    return None


def _stage_arguments(plan: Plan, model: _HasLayers | None) -> dict[str, object]:
    kinds = {layer.kind for layer in plan.layers}
    counts = [len(stage.layers) for stage in plan.stages]
    if kinds <= _GPT_KINDS:
        if len(set(counts)) > 1:
            return {"pipeline_model_parallel_layout": stage_layout(plan)}
        if plan.virtual_stages > 1:
            return {"num_layers_per_virtual_pipeline_stage": counts[0]}
        return {}
    if kinds & _GPT_KINDS:
        names = ", ".join(sorted(kind.value for kind in kinds))
        raise PlanError(
            f"plan layers of kinds {names} are of no one Megatron model; "
            "valid: block and moe_block, or the kinds of a hybrid model"
        )
    symbols = "".join(_HYBRID_SYMBOLS[layer.kind] for layer in plan.layers)
    if model is not None and any(_is_latent(layer) for layer in model.layers):
        symbols = symbols.replace(_HYBRID_SYMBOLS[LayerKind.ATTENTION], _LATENT_ATTENTION_SYMBOL)
    segments, start = [], 0
    for count in counts:
        segments.append(symbols[start : start + count])
        start += count
    return {"hybrid_layer_pattern": "|".join(segments), "hybrid_override_pattern": None}


def _is_latent(layer: object) -> bool:
    attention = getattr(layer, "attention", None)
    return attention is not None and attention.is_latent
