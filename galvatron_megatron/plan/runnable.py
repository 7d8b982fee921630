"""Which plans can be executed, as far as the plan alone tells: one rule for planner and runtime."""

from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.megatron_arguments import runs_on_stock_megatron
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload, SequenceParallel, Strategy

HIGHEST_ZERO = 3
"""Highest ZeRO stage that is executed."""

HIGHEST_STOCK_ZERO = 1
"""Highest ZeRO stage that Megatron's own code executes."""

ZERO_BACKENDS = ("megatron", "deepspeed")
"""Who may execute ZeRO 1, the usual one first."""


def execution_problem(plan: Plan) -> str | None:
    """Says why a plan cannot be executed.

    A plan that Megatron's own arguments reproduce always can, as far as the plan tells; one whose layers differ
    needs the layer-wise runtime, which does not cover everything.

    Args:
        plan: the plan.

    Returns:
        One line with the place, the value and what is valid; None where the plan can be executed.
    """
    if runs_on_stock_megatron(plan):
        return None
    if plan.base.sequence_parallel is SequenceParallel.ULYSSES:
        return "plan.base.sequence_parallel: ulysses; valid for the base: none, megatron"
    if plan.base.cp > 1:
        return f"plan.base.cp: {plan.base.cp}; valid for the base of layers that differ: 1"
    problem = _strategy_problem("plan.base", plan.base)
    if problem is not None:
        return problem
    for index, layer in enumerate(plan.layers):
        problem = _strategy_problem(f"plan layer {index}", layer.strategy)
        if problem is None and layer.kind is LayerKind.MAMBA:
            problem = _mamba_problem(f"plan layer {index}", layer.strategy)
        if problem is None and layer.kind.has_experts:
            problem = _expert_problem(f"plan layer {index}", layer.strategy)
        if problem is not None:
            return problem
    return None


def _mamba_problem(where: str, strategy: Strategy) -> str | None:
    """A scan runs over the whole sequence."""
    if strategy.sequence_parallel is SequenceParallel.ULYSSES:
        return f"{where}.sequence_parallel: ulysses with mamba; valid: none, megatron"
    if strategy.cp > 1:
        return f"{where}.cp: {strategy.cp} with mamba; valid where layers differ: 1"
    return None


def _expert_problem(where: str, strategy: Strategy) -> str | None:
    """Megatron trains experts under tensor parallelism only with the sequence split."""
    if strategy.tp > 1 and strategy.sequence_parallel is SequenceParallel.NONE:
        return f"{where}.sequence_parallel: none with tp {strategy.tp} and experts; valid: megatron, ulysses"
    if strategy.zero > 1:
        return f"{where}.zero: {strategy.zero} with experts; valid: 0, 1"
    if strategy.offload is not Offload.NONE:
        return f"{where}.offload: {strategy.offload.value} with experts; valid: none"
    return None


def _strategy_problem(where: str, strategy: Strategy) -> str | None:
    if strategy.zero > HIGHEST_ZERO:
        return f"{where}.zero: {strategy.zero}; valid: 0 to {HIGHEST_ZERO}"
    if strategy.cp > 1 and strategy.sequence_parallel is SequenceParallel.ULYSSES:
        return f"{where}.cp: {strategy.cp} with ulysses; valid: cp 1, or sequence_parallel none or megatron"
    return None
