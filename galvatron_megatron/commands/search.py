"""``galvatron search``: the fastest plan for a model on a cluster."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from galvatron_megatron.commands.device_memory import usable_memory_bytes
from galvatron_megatron.commands.job_line import JobLine, is_job_line, read_job_line, refuse_beside_job_line
from galvatron_megatron.commands.job_switches import add_switches, given_switches
from galvatron_megatron.commands.search_prices import prices_of
from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.host_memory import free_host_bytes
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.protocol import CostModel
from galvatron_megatron.describe.cluster import Cluster
from galvatron_megatron.describe.galvatron_config import write_galvatron_config
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.describe.profile_store import default_directory
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.checks import shown
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.document import SUFFIXES, check_target
from galvatron_megatron.plan.plan import Fingerprints
from galvatron_megatron.plan.runnable import HIGHEST_STOCK_ZERO, HIGHEST_ZERO
from galvatron_megatron.plan.serialization import write_plan
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel
from galvatron_megatron.report.search_report import print_search, print_space, search_document
from galvatron_megatron.report.terminal import terminal
from galvatron_megatron.search.decision_tree import Space
from galvatron_megatron.search.engine import Progress as SearchProgress
from galvatron_megatron.search.explanation import explain
from galvatron_megatron.search.host_memory import offloading_no_more
from galvatron_megatron.search.job import find_plan, job_request
from galvatron_megatron.search.request import UNIFORM_MARGIN, SearchRequest

EPILOG = """\
examples:
  galvatron search --model llama2-7b --cluster a100-80g --nodes 2 --global-batch-size 64
  galvatron search --model config.json --cluster c.yaml --global-batch-size 64 --output plan.yaml --json
  galvatron search --model M.yaml --global-batch-size 64
      on the ranks and at the prices that galvatron profile has measured
  galvatron search -- pretrain_gpt.py --num-layers 32 ... --global-batch-size 64
      the plan of a job with this command line under --galvatron-auto, from what was measured
  galvatron search --model M.yaml --cluster C.yaml --global-batch-size 64 --show-space
  galvatron search --model M.yaml --cluster C.yaml --global-batch-size 64 --explain
"""

_MOST_SAMPLES = 2**24
"""No job is known to train on batches near it; beyond, the sizes of micro-batches are too many to list."""
_MOST_BATCH_SIZES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    what = parser.add_argument_group("what to plan for")
    what.add_argument(
        "what",
        nargs="*",
        metavar="-- SCRIPT ARGS",
        help="a Megatron command line, instead of --model and all that the line says itself",
    )
    what.add_argument("--model", help="model file, Hugging Face config.json, or a shipped name")
    what.add_argument(
        "--cluster",
        help="cluster file, or a shipped name: prices are modelled; without it, a plan is made for the ranks "
        "on which galvatron profile has measured this model, at measured prices",
    )
    what.add_argument("--nodes", type=int, help="nodes, instead of what the cluster file says")
    what.add_argument("--seq-length", type=int, help="tokens of a sample, instead of what the model file says")
    what.add_argument(
        "--vocab-size", type=int, help="entries of the vocabulary, where a command line does not say it"
    )
    what.add_argument(
        "--memory-gb", type=float, help="memory of a device that a plan may use, in GB of 2**30 bytes"
    )
    what.add_argument("--global-batch-size", metavar="B", help="samples a step, or a range FIRST:LAST[:STEP]")
    what.add_argument(
        "--profile",
        metavar="FINGERPRINT|FILE",
        help="which measured profile, where the newest of the model is not meant",
    )
    what.add_argument(
        "--profile-dir",
        type=Path,
        metavar="DIR",
        help=f"the store of profiles (default: {default_directory()})",
    )
    what.add_argument(
        "--galvatron-profile",
        action="append",
        metavar="DIR|FINGERPRINT",
        help="prices from Hetu-Galvatron's profile files, in a directory or imported by galvatron profile; "
        "repeatable, where machine and model are apart; without context parallelism and without tp on an "
        "unsplit sequence, which they do not hold",
    )
    limits = parser.add_argument_group("limits of the space")
    limits.add_argument("--uniform", action="store_true", help="only plans that stock Megatron can run")
    limits.add_argument(
        "--max-zero",
        type=int,
        help=f"highest ZeRO stage (default: {HIGHEST_ZERO}, the highest that jobs can be trained with here; "
        f"with --uniform {HIGHEST_STOCK_ZERO}, the highest of stock Megatron)",
    )
    limits.add_argument("--no-ulysses", action="store_true", help="no Ulysses sequence parallelism")
    limits.add_argument("--no-context-parallel", action="store_true", help="no context parallelism")
    limits.add_argument("--no-expert-parallel", action="store_true", help="no expert parallelism")
    limits.add_argument("--no-interleaving", action="store_true", help="one virtual stage per rank")
    limits.add_argument("--no-recompute", action="store_true", help="no recomputation")
    limits.add_argument(
        "--offload",
        choices=[Offload.OPTIMIZER.value, Offload.PARAMETERS.value],
        help="states may lie in host memory: those of the optimizer, or (ZeRO 3) the parameters' as well",
    )
    limits.add_argument("--tp-across-nodes", action="store_true", help="tp groups may span nodes")
    fixed = parser.add_argument_group("decisions made by hand")
    for name in ("pp", "tp", "cp", "zero", "virtual-stages", "micro-batch-size"):
        fixed.add_argument(f"--{name}", type=int)
    fixed.add_argument("--ep", type=int, help="expert parallelism of layers with experts")
    fixed.add_argument("--etp", type=int, help="in how many parts each expert is split")
    fixed.add_argument("--sequence-parallel", choices=[kind.value for kind in SequenceParallel])
    fixed.add_argument("--recompute", choices=[kind.value for kind in Recompute])
    add_switches(parser)
    output = parser.add_argument_group("answer")
    output.add_argument(
        "--uniform-margin",
        type=float,
        default=UNIFORM_MARGIN,
        help="prefer the best uniform plan unless a layer-wise one is faster by more than this fraction; "
        "0 takes the fastest (default: %(default)s)",
    )
    output.add_argument("--runners-up", type=int, default=5, help="how many competitors to show (default: 5)")
    output.add_argument("--explain", action="store_true", help="what limits the plan and what would help")
    output.add_argument("--show-space", action="store_true", help="print the decision tree and stop")
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--output", type=Path, metavar="FILE", help="write the plan to FILE (.yaml or .json)")
    output.add_argument(
        "--galvatron-config",
        type=Path,
        metavar="FILE",
        help="write the plan for Hetu-Galvatron (galvatron_config JSON)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Searches and prints.

    Returns:
        0.

    Raises:
        GalvatronError: an input cannot be read, or nothing fits.
    """
    _check_targets(arguments)
    job = _job(arguments)
    model = read_model(arguments.model, seq_length=arguments.seq_length) if job is None else job.model
    constraints = _constraints(arguments) if job is None else job.constraints
    decided = _decided(constraints, job)
    _check_decisions(arguments, model, decided)
    prices = prices_of(arguments, model, decided, job)
    model, cluster, cost_model, options = prices.model, prices.cluster, prices.costs, prices.options
    request = _request(arguments, model, cluster, constraints)
    request = replace(request, **prices.limits)
    console = terminal()
    if arguments.show_space:
        print_space(console, Space(request=request))
        return 0
    profile = cost_model.profile if isinstance(cost_model, MeasuredCostModel) else None
    host_bytes = free_host_bytes(cluster, profile, request.memory_bytes)
    with _ProgressBar(quiet=arguments.json) as bar:
        result, note = find_plan(request, cost_model, host_bytes, progress=bar.show)
    if note is not None:
        print(f"galvatron: {note}", file=sys.stderr)
    marks = Fingerprints(model=model.fingerprint(), cluster=cluster.fingerprint(), profile=prices.profile)
    result = replace(result, plan=replace(result.plan, fingerprints=marks))
    lines = [line for line in (*prices.lines, prices.left_out, prices.measured_share(result.plan)) if line]
    explanation = None
    if arguments.explain:
        is_modelled = isinstance(cost_model, AnalyticCostModel)
        others = _alternatives(request, cluster, options) if is_modelled else []
        # Where a host is full, what would help is asked with no more in it.
        asked = request if note is None else offloading_no_more(request, result.plan)
        explanation = explain(asked, cost_model, result, others)
    if arguments.output is not None:
        write_plan(result.plan, arguments.output)
    if arguments.galvatron_config is not None:
        write_galvatron_config(result.plan, arguments.galvatron_config)
    if arguments.json:
        document = search_document(result, request, explanation) | {"prices": lines}
        print(json.dumps(document, indent=2))
    else:
        print_search(console, result, request, explanation)
        for line in lines:
            console.print(f"prices: {line}", highlight=False, markup=False, soft_wrap=True)
        if arguments.output is not None:
            console.print(
                f"plan written to {arguments.output}; to train under it: --galvatron-plan {arguments.output}",
                highlight=False,
                soft_wrap=True,
            )
    return 0


def _max_zero(arguments: argparse.Namespace) -> int:
    """The highest ZeRO stage: as asked, else the highest that the plans asked for can be trained with."""
    if arguments.max_zero is not None:
        return arguments.max_zero
    by_megatron = arguments.uniform or arguments.zero_backend == "megatron"
    return HIGHEST_STOCK_ZERO if by_megatron else HIGHEST_ZERO


def _check_targets(arguments: argparse.Namespace) -> None:
    """Refuses files that could not be written, before the search."""
    for flag, path, suffixes in (
        ("--output", arguments.output, SUFFIXES),
        ("--galvatron-config", arguments.galvatron_config, (".json",)),
    ):
        if path is not None:
            if arguments.show_space:
                raise SearchError(f"{flag}: --show-space finds no plan to write; valid: one of the two")
            check_target(path, flag, SearchError, suffixes=suffixes)


def _job(arguments: argparse.Namespace) -> JobLine | None:
    """The Megatron command line that was given, None where a model file was.

    What our own flags on it say counts where the flags of this command say nothing: they are filled in.

    Raises:
        GalvatronError: neither or both are given, or the line cannot be read.
    """
    words = arguments.what
    if not words:
        for name in ("model", "global_batch_size"):
            if getattr(arguments, name) is None:
                flag = f"--{name.replace('_', '-')}"
                raise SearchError(f"{flag}: missing; valid: {flag}, or -- followed by a Megatron command line")
        if arguments.vocab_size is not None:
            raise SearchError("--vocab-size: unused beside a model file, which says it itself")
        return None
    if not is_job_line(words):
        raise SearchError(f"{shown(words[0])}: no flag; valid: -- followed by a Megatron command line")
    refuse_beside_job_line(
        arguments, ("model", "seq_length", "global_batch_size", *_DECISIONS, *given_switches(arguments))
    )
    job = read_job_line(words, vocab_size=arguments.vocab_size)
    if job.flags.plan_file is not None:
        raise SearchError(
            f"--galvatron-plan {job.flags.plan_file}: the plan is given, nothing is searched; valid: galvatron "
            "estimate, or leave it out"
        )
    if job.constraints.global_batch_size is None:
        raise SearchError("--global-batch-size: missing; a plan is made for a batch; valid: an integer >= 1")
    arguments.global_batch_size = str(job.constraints.global_batch_size)
    arguments.uniform = arguments.uniform or job.flags.uniform
    arguments.zero_backend = job.flags.zero_backend
    arguments.offload = arguments.offload or _asked(job.flags.offload)
    arguments.memory_gb = job.flags.memory_gb if arguments.memory_gb is None else arguments.memory_gb
    arguments.profile_dir = arguments.profile_dir or job.flags.profile_directory
    return job


_DECISIONS = {
    "pp": ("pp", "--pipeline-model-parallel-size"),
    "tp": ("tp", "--tensor-model-parallel-size"),
    "cp": ("cp", "--context-parallel-size"),
    "zero": ("zero", "--use-distributed-optimizer"),
    "virtual_stages": ("virtual_stages", "--num-virtual-stages-per-pipeline-rank"),
    "micro_batch_size": ("micro_batch_size", "--micro-batch-size"),
    "ep": ("expert_parallel", "--expert-model-parallel-size"),
    "etp": ("expert_tensor_parallel", "--expert-tensor-parallel-size"),
    "sequence_parallel": ("sequence_parallel", "--sequence-parallel"),
    "recompute": ("recompute", "--recompute-granularity"),
}
"""Flag of this command -> constraint, and Megatron's flag for it."""


def _asked(offload: Offload) -> str | None:
    return None if offload is Offload.NONE else offload.value


def _decided(constraints: Constraints, job: JobLine | None) -> dict[str, tuple[str, object]]:
    """Decisions made by hand: name -> the flag as it was given, and the value."""
    found = {}
    for name, (field, flag) in _DECISIONS.items():
        value = getattr(constraints, field)
        if value is not None:
            found[name] = (f"--{name.replace('_', '-')}" if job is None else flag, value)
    return found


def _check_decisions(
    arguments: argparse.Namespace, model: Model, decided: Mapping[str, tuple[str, object]]
) -> None:
    """Refuses decisions made by hand that a limit of the space or the model contradicts."""
    for limit, name, allowed in (
        ("no_ulysses", "sequence_parallel", ("none", "megatron")),
        ("no_context_parallel", "cp", (1,)),
        ("no_expert_parallel", "ep", (1,)),
        ("no_interleaving", "virtual_stages", (1,)),
        ("no_recompute", "recompute", ("none",)),
    ):
        flag, value = decided.get(name, ("", None))
        if getattr(arguments, limit) and value not in (None, *allowed):
            raise SearchError(f"{flag} {value}: --{limit.replace('_', '-')} forbids it; valid: one of the two")
    if not any(layer.kind.has_experts for layer in model.layers):
        for name in ("ep", "etp"):
            flag, value = decided.get(name, ("", None))
            if value not in (None, 1):
                raise SearchError(f"{flag} {value}: model {model.name!r} has no experts; valid: leave it out")


def _constraints(arguments: argparse.Namespace) -> Constraints:
    kind = arguments.sequence_parallel
    return Constraints(
        tp=arguments.tp,
        cp=arguments.cp,
        pp=arguments.pp,
        zero=arguments.zero,
        expert_parallel=arguments.ep,
        expert_tensor_parallel=arguments.etp,
        sequence_parallel=None if kind is None else SequenceParallel(kind),
        recompute=None if arguments.recompute is None else Recompute(arguments.recompute),
        virtual_stages=arguments.virtual_stages,
        micro_batch_size=arguments.micro_batch_size,
    )


def _request(
    arguments: argparse.Namespace, model: Model, cluster: Cluster, constraints: Constraints
) -> SearchRequest:
    """The question of a job on these devices, with the limits that flags of this command set."""
    batches = _batch_sizes(arguments.global_batch_size)
    request = job_request(
        model,
        world_size=cluster.world_size,
        devices_per_node=cluster.devices_per_node,
        memory_bytes=usable_memory_bytes(cluster, arguments.memory_gb),
        global_batch_size=batches[0],
        constraints=constraints,
        uniform=arguments.uniform,
        offload=_offload(arguments, constraints),
        max_zero=_max_zero(arguments),
    )
    return replace(
        request,
        global_batch_size=batches[0] if len(batches) == 1 else None,
        global_batch_sizes=() if len(batches) == 1 else batches,
        allow_ulysses=not arguments.no_ulysses,
        allow_cp=not arguments.no_context_parallel,
        allow_expert_parallel=not arguments.no_expert_parallel,
        allow_interleaving=request.allow_interleaving and not arguments.no_interleaving,
        tp_across_nodes=arguments.tp_across_nodes,
        recompute_kinds=(Recompute.NONE,) if arguments.no_recompute else tuple(Recompute),
        uniform_margin=arguments.uniform_margin,
        runners_up=arguments.runners_up,
    )


def _offload(arguments: argparse.Namespace, constraints: Constraints) -> Offload:
    if arguments.offload is None:
        return Offload.NONE
    if arguments.galvatron_profile is not None:
        raise SearchError(
            "--offload: Hetu-Galvatron's profiles hold no price of it; valid: one of the two flags"
        )
    if arguments.zero_backend == "megatron":
        raise SearchError(
            f"--offload {arguments.offload}: beside --zero-backend megatron, and DeepSpeed does it; valid: one "
            "of the two flags"
        )
    highest = _max_zero(arguments) if constraints.zero is None else constraints.zero
    if arguments.offload == Offload.PARAMETERS and highest < 3:
        raise SearchError(
            f"--offload parameters: needs ZeRO 3, up to {highest} may be used; valid: --max-zero 3"
        )
    return Offload(arguments.offload)


def _batch_sizes(text: str) -> tuple[int, ...]:
    found: Sequence[int] = ()
    with suppress(ValueError):
        parts = [int(part) for part in text.split(":")]
        if len(parts) == 1:
            found = parts
        elif len(parts) <= 3:
            first, last, step = (*parts, parts[0])[:3]
            found = range(first, last + 1, step)
    if not found or not 1 <= found[0] <= found[-1] <= _MOST_SAMPLES or len(found) > _MOST_BATCH_SIZES:
        raise SearchError(
            f"--global-batch-size: {shown(text)}; valid: a number from 1 to {_MOST_SAMPLES}, or "
            f"FIRST:LAST:STEP for up to {_MOST_BATCH_SIZES} of them, STEP = FIRST where left out"
        )
    return tuple(found)


def _alternatives(
    request: SearchRequest, cluster: Cluster, options: RunOptions
) -> list[tuple[str, SearchRequest, CostModel]]:
    """One more node, and links of twice the bandwidth."""
    found = []
    larger = cluster.with_nodes(cluster.nodes + 1)
    wider = replace(request, world_size=larger.world_size)
    found.append(("one more node", wider, AnalyticCostModel(request.model, larger, options)))
    levels = [("intra_node", "a link inside nodes twice as fast")]
    if cluster.nodes > 1:
        levels.append(("inter_node", "a link between nodes twice as fast"))
    for level, change in levels:
        link = getattr(cluster, level)
        faster = replace(cluster, **{level: replace(link, gb_per_second=link.gb_per_second * 2)})
        found.append((change, request, AnalyticCostModel(request.model, faster, options)))
    return found


class _ProgressBar:
    """A bar with the best plan so far, on standard error; silent where nobody looks."""

    def __init__(self, *, quiet: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} outer points"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task("searching", total=None)

    def __enter__(self) -> "_ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, state: SearchProgress) -> None:
        """Shows a state of the search."""
        if not self._progress.disable:
            best = (
                "nothing yet"
                if state.best is None
                else f"{state.step_seconds:.4f} s, at most {state.gap:.1%} off"
            )
            self._progress.update(self._task, description=best, completed=state.done, total=state.total)
