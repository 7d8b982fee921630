"""Shows the answer of a search: the plan, what stands beside it, and why."""

from dataclasses import replace
from itertools import groupby

from rich.console import Console
from rich.table import Table

from galvatron_megatron.plan.line import plan_line
from galvatron_megatron.plan.plan import Fingerprints, Plan
from galvatron_megatron.plan.runnable import execution_problem
from galvatron_megatron.plan.serialization import plan_to_dict
from galvatron_megatron.search.decision_tree import RULES, Space
from galvatron_megatron.search.explanation import Explanation
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.result import SearchResult

_GIB = 2**30


def search_document(
    result: SearchResult, request: SearchRequest, explanation: Explanation | None = None
) -> dict[str, object]:
    """The answer as plain values: seconds, and GB of 2**30 bytes with one entry per pipeline rank."""
    document: dict[str, object] = {
        "plan": plan_to_dict(result.plan),
        "predicted": {
            "step_seconds": result.step_seconds,
            "samples_per_second": result.samples_per_second,
            "memory_gb": [amount / _GIB for amount in result.memory_bytes],
            "stage_seconds": result.stage_seconds,
            "sync_seconds": result.sync_seconds,
        },
        "cannot_be_trained_here": execution_problem(result.plan),
        "memory_budget_gb": request.memory_bytes / _GIB,
        "simulated": [{"plan": plan_line(plan), "step_seconds": seconds} for plan, seconds in result.simulated],
        "searched": None if result.searched is None else plan_to_dict(result.searched[0]),
        "search_seconds": result.search_seconds,
        "gap": result.gap,
        "outer_points": result.outer_points,
        "solved_points": result.solved_points,
        "runners_up": [
            {"plan": plan_to_dict(plan), "step_seconds": seconds} for plan, seconds in result.runners_up
        ],
    }
    for name in ("best_uniform", "best_layerwise"):
        entry = getattr(result, name)
        document[name] = None if entry is None else {"plan": plan_to_dict(entry[0]), "step_seconds": entry[1]}
    if explanation is not None:
        document["explanation"] = {
            "binding": explanation.binding,
            "fullest_stage": explanation.fullest_stage,
            "memory_use": explanation.memory_use,
            "ample_memory_gain": explanation.ample_memory_gain,
            "bubble": explanation.bubble,
            "sync": explanation.sync,
            "layerwise_gain": explanation.layerwise_gain,
            "what_if": [
                {
                    "change": answer.change,
                    "gain": answer.gain,
                    "samples_per_second": answer.samples_per_second,
                    "plan": None if answer.plan is None else plan_line(answer.plan),
                }
                for answer in explanation.what_if
            ],
        }
    return document


def print_search(
    console: Console, result: SearchResult, request: SearchRequest, explanation: Explanation | None = None
) -> None:
    """Prints the answer."""
    plan = result.plan
    console.print(plan_line(plan), style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"predicted {result.step_seconds:.4f} s a step, {result.samples_per_second:.2f} samples/s "
        f"({_proof(result)}; {result.outer_points} outer points, {result.solved_points} solved, "
        f"{result.search_seconds:.2f} s)",
        soft_wrap=True,
    )
    if result.simulated:
        console.print(_simulated(result), highlight=False, soft_wrap=True)
    console.print(_stages(result, request))
    console.print(_beside(result))
    problem = execution_problem(plan)
    if problem is not None:
        console.print(
            f"note: jobs cannot be trained under this plan here: {problem}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if explanation is not None:
        console.print(f"binding: {explanation.binding}", highlight=False, soft_wrap=True)
        for answer in explanation.what_if:
            found = (
                "no plan" if answer.plan is None else f"{answer.gain:+.1%} throughput: {plan_line(answer.plan)}"
            )
            console.print(f"with {answer.change}: {found}", highlight=False, markup=False, soft_wrap=True)


def _proof(result: SearchResult) -> str:
    """How sure it is that nothing is faster."""
    if result.searched is not None:
        return "chosen by its simulated schedule"
    if result.gap > 0:
        return f"not proven fastest, at most {result.gap:.2%} off"
    layerwise = result.best_layerwise
    if layerwise is None or _decisions(layerwise[0]) == _decisions(result.plan):
        return "proven fastest of the space"
    gain = _relative_seconds(result, result.plan, result.step_seconds, than=layerwise)
    return f"proven fastest uniform plan, preferred to a layer-wise one only {gain:.2%} faster"


def _simulated(result: SearchResult) -> str:
    """What the simulated schedules say of the chosen plan."""
    seconds = {_decisions(plan): value for plan, value in result.simulated}
    own = seconds[_decisions(result.plan)]
    text = f"schedules of {len(seconds)} plans simulated: {own:.4f} s a step under this one"
    if result.searched is None:
        return text
    other = seconds[_decisions(result.searched[0])]
    loss = _relative_seconds(result, result.searched[0], other, than=(result.plan, own))
    line = plan_line(result.searched[0])
    return f"{text}; the plan that is fastest by the formula, {line}, is {loss:.2%} slower"


def _decisions(plan: Plan) -> Plan:
    """The plan without what it was made for, to compare it with others of the same search."""
    return replace(plan, fingerprints=Fingerprints())


def _relative_seconds(
    result: SearchResult, plan: Plan, seconds: float, *, than: tuple[Plan, float] | None = None
) -> float:
    """By which fraction ``plan`` takes longer for a sample than another, or than the chosen plan."""
    other, other_seconds = (result.plan, result.step_seconds) if than is None else than
    return (seconds / plan.global_batch_size) / (other_seconds / other.global_batch_size) - 1


def _stages(result: SearchResult, request: SearchRequest) -> Table:
    table = Table(title=f"pipeline ranks, budget {request.memory_bytes / _GIB:.2f} GB", title_justify="left")
    for name in ("rank", "layers", "GB", "ms a micro-batch", "strategies in order"):
        table.add_column(name, justify="left" if name.startswith("strategies") else "right")
    plan = result.plan
    for rank in range(plan.pp):
        stages = plan.stages[rank :: plan.pp]
        runs = [
            f"{len(list(run))} x {strategy}"
            for stage in stages
            for strategy, run in groupby(layer.strategy for layer in stage.layers)
        ]
        table.add_row(
            str(rank),
            str(sum(len(stage.layers) for stage in stages)),
            f"{result.memory_bytes[rank] / _GIB:.2f}",
            f"{result.stage_seconds[rank] * 1e3:.2f}",
            ", ".join(runs),
        )
    return table


def _beside(result: SearchResult) -> Table:
    """The best uniform and the best layer-wise plan and the competitors, each plan once."""
    table = Table(title="beside it", title_justify="left")
    for name in ("", "kind", "s a step", "slower by", "plan"):
        table.add_column(name, justify="right" if name.startswith("s") else "left")
    rows = []
    if result.best_uniform is not None:
        rows.append(("best uniform", *result.best_uniform))
    if result.best_layerwise is not None:
        rows.append(("fastest", *result.best_layerwise))
    rows += [("competitor", *entry) for entry in result.runners_up]
    shown: set[Plan] = set()
    for name, plan, seconds in rows:
        decisions = _decisions(plan)
        if decisions in shown:
            continue
        shown.add(decisions)
        chosen = ", chosen" if decisions == _decisions(result.plan) else ""
        table.add_row(
            name + chosen,
            "uniform" if plan.is_uniform else "layer-wise",
            f"{seconds:.4f}",
            f"{_relative_seconds(result, plan, seconds):.2%}",
            plan_line(plan),
        )
    return table


def print_space(console: Console, space: Space) -> None:
    """Prints the decision tree: branches, what every rule cut, and how much remains."""
    table = Table(title="decision tree")
    for name in (
        "pp",
        "ranks a stage",
        "micro-batches",
        "virtual stages",
        "base layouts",
        "strategies a layer",
    ):
        table.add_column(name, justify="right")
    total = 0
    layers = dict.fromkeys(space.request.model.layers)
    for outer in space.outers():
        virtual, bases = space.virtual_stages(outer), space.bases(outer)
        total += len(virtual) * len(bases)
        table.add_row(
            str(outer.pp),
            str(outer.ranks),
            f"{outer.micro_batches} x {outer.samples} samples",
            ",".join(map(str, virtual)),
            str(len(bases)),
            " / ".join(str(len(space.strategies(layer, outer))) for layer in layers),
        )
    console.print(table)
    rules = Table(title=f"rules; {total} outer points remain")
    rules.add_column("rule")
    rules.add_column("cut", justify="right")
    rules.add_column("because")
    for name, reason in RULES.items():
        rules.add_row(name, str(space.cuts[name]), reason)
    console.print(rules)
