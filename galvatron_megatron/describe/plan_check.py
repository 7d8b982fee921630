"""Checks that a plan belongs to a model and a job: its layers, degrees that divide, the number of ranks."""

from collections.abc import Iterator

from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import SequenceParallel, Strategy


def check_plan(
    plan: Plan,
    *,
    model: Model | None = None,
    world_size: int | None = None,
    global_batch_size: int | None = None,
    where: str = "plan",
) -> None:
    """Makes sure that a plan can run a model on so many ranks.

    Args:
        plan: the plan.
        model: the model to run; not looked at where None.
        world_size: ranks of the job.
        global_batch_size: samples per step of the job.
        where: what to call the plan in messages, usually its file.

    Raises:
        PlanError: names the field, its value, and what would be valid.
    """
    if world_size is not None and plan.world_size != world_size:
        raise PlanError(
            f"{where}: made for {plan.world_size} ranks (pp {plan.pp} x {plan.base.ranks} a stage), but there "
            f"are {world_size}; valid: start {plan.world_size} ranks, or search a plan for {world_size}"
        )
    if global_batch_size is not None and plan.global_batch_size != global_batch_size:
        raise PlanError(
            f"{where}: made for {plan.global_batch_size} samples per step, but the job has "
            f"{global_batch_size}; valid: --global-batch-size {plan.global_batch_size}, or search again"
        )
    if plan.virtual_stages > 1 and plan.micro_batches % plan.pp:
        raise PlanError(
            f"{where}.micro_batches: {plan.micro_batches} with {plan.virtual_stages} virtual stages; "
            f"valid: a multiple of pp {plan.pp}"
        )
    if model is not None:
        _check_model(plan, model, where)


def strategy_problem(layer: Layer | None, strategy: Strategy, model: Model) -> str | None:
    """Why a layer of a model cannot run under a strategy.

    Args:
        layer: the layer; None for embedding and head.
        strategy: the strategy.
        model: the model.

    Returns:
        What does not divide what, or None where all divides.
    """
    for size, what, degree, name in _divisions(layer, strategy, model):
        if size % degree:
            return f"{name} {degree} does not divide {size}, {what}"
    if layer is not None and layer.attention is not None:
        groups, tp = layer.attention.query_groups, strategy.tp
        if not layer.attention.is_latent and groups % tp and tp % groups:
            return f"tp {tp} neither divides nor is a multiple of {groups}, the query groups"
    return None


def _check_model(plan: Plan, model: Model, where: str) -> None:
    made_for = plan.fingerprints.model
    if len(plan.layers) != len(model.layers):
        raise PlanError(
            f"{where}.stages: {len(plan.layers)} layers; valid: {len(model.layers)}, as in {model.name!r}"
        )
    for index, (planned, layer) in enumerate(zip(plan.layers, model.layers, strict=True)):
        if planned.kind is not layer.kind:
            raise PlanError(
                f"{where} layer {index}: kind {planned.kind.value!r}; valid: {layer.kind.value!r}, "
                f"as in {model.name!r}"
            )
    if made_for and made_for != model.fingerprint():
        raise PlanError(
            f"{where}.fingerprints.model: {made_for!r} is another model; valid: {model.fingerprint()!r}, the "
            f"fingerprint of {model.name!r} (search again, or remove the entry to use the plan as it is)"
        )
    problem = strategy_problem(None, plan.base, model)
    if problem:
        raise PlanError(f"{where}.base: {problem}; valid: degrees that divide")
    checked: set[tuple[Layer, Strategy]] = set()
    for index, (planned, layer) in enumerate(zip(plan.layers, model.layers, strict=True)):
        if (layer, planned.strategy) in checked:
            continue
        checked.add((layer, planned.strategy))
        problem = strategy_problem(layer, planned.strategy, model)
        if problem:
            raise PlanError(f"{where} layer {index}: {problem}; valid: degrees that divide")


def _divisions(layer: Layer | None, strategy: Strategy, model: Model) -> Iterator[tuple[int, str, int, str]]:
    """What must be divisible: (size, what it is, degree, name of the degree)."""
    if strategy.cp > 1:
        # Causal attention is balanced by giving every rank one early and one late part of the sequence.
        yield model.seq_length, "the sequence length", 2 * strategy.cp, "2 x cp"
    local_seq_length = model.seq_length // strategy.cp
    if strategy.sequence_parallel is not SequenceParallel.NONE:
        yield local_seq_length, "the sequence length per cp rank", strategy.tp, "tp"
    if layer is None:
        shards = strategy.weight_shards
        yield model.padded_vocab_size(shards), "the padded vocabulary", shards, "tp"
        return
    # Under Ulysses weights are whole, but attention (and a Mamba mixer) still runs on a part of the heads.
    if layer.attention is not None:
        yield layer.attention.heads, "the attention heads", strategy.tp, "tp"
    if layer.mamba is not None:
        yield layer.mamba.head_count(model.hidden_size), "the Mamba heads", strategy.tp, "tp"
        yield layer.mamba.groups, "the Mamba groups", strategy.tp, "tp"
    if layer.mlp is not None:
        yield layer.mlp.ffn_hidden_size, "the feed-forward size", strategy.weight_shards, "tp"
    if layer.experts is not None:
        shards = strategy.expert_shards
        yield (
            layer.experts.ffn_hidden_size,
            "the experts' feed-forward size",
            shards,
            "expert tensor parallelism",
        )
        yield layer.experts.count, "the experts", strategy.expert_parallel, "expert_parallel"
        if layer.experts.shared_ffn_hidden_size:
            shared = layer.experts.shared_ffn_hidden_size
            yield shared, "the shared experts' feed-forward size", strategy.weight_shards, "tp"
