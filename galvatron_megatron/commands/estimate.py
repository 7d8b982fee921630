"""``galvatron estimate``: step time and memory of a plan or of a Megatron command line."""

import argparse
import json
from pathlib import Path

from galvatron_megatron.commands.device_memory import usable_memory_bytes
from galvatron_megatron.commands.job_line import JobLine, is_job_line, read_job_line, refuse_beside_job_line
from galvatron_megatron.commands.job_switches import add_switches, given_switches, options_of
from galvatron_megatron.commands.plan_file import read_plan_file
from galvatron_megatron.commands.search_prices import measured_prices
from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.count_source import CountSource
from galvatron_megatron.cost.estimate import Estimate, TermCostModel, estimate_plan, simulate_estimate
from galvatron_megatron.cost.host_memory import HostUse
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.schedule import ScheduleKind
from galvatron_megatron.describe.cluster import Cluster, read_cluster
from galvatron_megatron.describe.command_plan import plan_from_command_line
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.describe.plan_check import check_plan
from galvatron_megatron.describe.profile_store import default_directory
from galvatron_megatron.errors import DescriptionError, PlanError
from galvatron_megatron.plan.checks import shown
from galvatron_megatron.plan.document import SUFFIXES, check_target
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.report.estimate_report import (
    compare_document,
    estimate_document,
    print_comparison,
    print_estimate,
)
from galvatron_megatron.report.terminal import terminal
from galvatron_megatron.report.trace import write_chrome_trace

EPILOG = """\
examples:
  galvatron estimate plan.yaml --model llama2-7b --cluster a100-80g --nodes 2
  galvatron estimate plan.yaml --compare other.yaml --model M.yaml --cluster C.yaml
      the two side by side, the largest difference first
  galvatron estimate --cluster h100 -- pretrain_gpt.py --num-layers 32 ...
      a Megatron command line as it stands
  galvatron estimate -- pretrain_gpt.py --num-layers 32 ...
      on the ranks and at the prices that galvatron profile has measured
  galvatron estimate plan.yaml --model M.yaml --cluster C.yaml --trace out.json
      the simulated schedule, to open in ui.perfetto.dev
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "what",
        nargs="*",
        metavar="PLAN | -- SCRIPT ARGS",
        help="plan file (.yaml or .json), or a Megatron command line behind --",
    )
    parser.add_argument("--model", type=Path, help="model file, Hugging Face config.json, or a shipped name")
    parser.add_argument(
        "--cluster",
        type=Path,
        help="cluster file, or a shipped name: prices are modelled; without it, they are those that galvatron "
        "profile has measured for this model, on the ranks that it has measured",
    )
    parser.add_argument("--nodes", type=int, help="nodes, instead of what the cluster file says")
    parser.add_argument(
        "--seq-length", type=int, help="tokens of a sample, instead of what the model file says"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="entries of the vocabulary, where a command line does not say it",
    )
    parser.add_argument("--memory-gb", type=float, help="usable memory of a device in GiB")
    parser.add_argument("--compare", type=Path, metavar="PLAN", help="a second plan to show beside the first")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the simulated schedule to FILE")
    parser.add_argument(
        "--schedule",
        choices=[kind.value for kind in ScheduleKind],
        help="order of passes to simulate (default: 1f1b)",
    )
    add_switches(parser)
    parser.add_argument(
        "--profile",
        metavar="FINGERPRINT|FILE",
        help="which measured profile, where the newest of the model is not meant",
    )
    parser.add_argument(
        "--profile-dir",
        type=Path,
        metavar="DIR",
        help=f"the store of profiles (default: {default_directory()})",
    )
    parser.add_argument(
        "--traced",
        action="store_true",
        help="count by tracing the real Megatron layers of the command line (needs torch and megatron-core)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Predicts and prints.

    Returns:
        0.

    Raises:
        GalvatronError: an input cannot be read or does not fit the others.
    """
    _check_used(arguments)
    if arguments.trace is not None:
        check_target(arguments.trace, "--trace", DescriptionError)
    model, job = _model(arguments)
    plan, name, costs, prices = _priced_plan(arguments, model, job)
    model, cluster = costs.model, costs.cluster
    memory_bytes = usable_memory_bytes(cluster, arguments.memory_gb)
    estimate = _estimate(plan, costs)
    host = HostUse.of(plan, costs, cluster)
    console = terminal()
    if arguments.compare is not None:
        other = _checked(
            read_plan_file(arguments.compare, cluster.world_size), model, cluster, str(arguments.compare)
        )
        document = compare_document(
            (name, str(arguments.compare)),
            (estimate, _estimate(other, costs)),
            (plan.micro_batches, other.micro_batches),
        )
        if arguments.json:
            print(json.dumps(document, indent=2))
        else:
            print_comparison(console, document)
        return 0
    schedule = ScheduleKind.ONE_F_ONE_B if arguments.schedule is None else ScheduleKind(arguments.schedule)
    simulation = simulate_estimate(estimate, plan.micro_batches, schedule)
    if arguments.trace is not None:
        write_chrome_trace(simulation, arguments.trace)
    if arguments.json:
        document = estimate_document(estimate, cluster, simulation, host) | {"prices": prices}
        document["fits"] = estimate.peak_bytes <= memory_bytes and host.fits
        print(json.dumps(document, indent=2))
        return 0
    title = f"{name} on {_place(cluster, plan)}"
    print_estimate(console, title, estimate, cluster, memory_bytes, simulation, host, prices)
    if arguments.trace is not None:
        console.print(f"schedule written to {arguments.trace}")
    return 0


def _check_used(arguments: argparse.Namespace) -> None:
    """Refuses what this estimate would not look at: what is asked for and not done misleads.

    Raises:
        DescriptionError: names the flag and what it does not go with.
    """
    words = arguments.what
    if len(words) > 1 and Path(words[0]).suffix in SUFFIXES:
        raise DescriptionError(
            f"{shown(' '.join(words[1:]))}: too much behind {words[0]}; valid: --compare for a second plan"
        )
    unused: list[tuple[str, str]] = []
    if is_job_line(words):
        refuse_beside_job_line(arguments, ("model", "seq_length", *given_switches(arguments)))
    else:
        unused.append(("vocab_size", "a model file, which says it itself"))
    if arguments.compare is not None:
        unused += [(name, "--compare, which shows no schedule") for name in ("trace", "schedule")]
        unused.append(("memory_gb", "--compare, which holds memory against no limit"))
    if arguments.cluster is None:
        unused.append(("traced", "measured prices"))
    else:
        unused += [(name, "--cluster, whose prices are modelled") for name in ("profile", "profile_dir")]
    for name, why in unused:
        if getattr(arguments, name) not in (None, False):
            raise DescriptionError(f"--{name.replace('_', '-')}: unused beside {why}; valid: one of the two")


def _place(cluster: Cluster, plan: Plan) -> str:
    return f"{plan.world_size} of {cluster.world_size} devices of {cluster.name}"


def _model(arguments: argparse.Namespace) -> tuple[Model, JobLine | None]:
    """The model, and the Megatron command line that describes it where one was given.

    What our own flags on such a line say of memory and store is filled in where the command says nothing.

    Raises:
        GalvatronError: nothing is given, or it cannot be read.
    """
    words = arguments.what
    if not is_job_line(words):
        if not words or arguments.model is None:
            raise DescriptionError(
                "nothing to estimate; valid: PLAN --model MODEL, or -- followed by a Megatron command line"
            )
        return read_model(arguments.model, seq_length=arguments.seq_length), None
    if "--galvatron-auto" in words:
        raise DescriptionError(
            "--galvatron-auto: its plan is yet to be found; valid: galvatron search -- SCRIPT ARGS, "
            "or leave it out"
        )
    job = read_job_line(words, vocab_size=arguments.vocab_size)
    arguments.memory_gb = job.flags.memory_gb if arguments.memory_gb is None else arguments.memory_gb
    if arguments.cluster is None:
        arguments.profile_dir = arguments.profile_dir or job.flags.profile_directory
    return job.model, job


def _priced_plan(
    arguments: argparse.Namespace, model: Model, job: JobLine | None
) -> tuple[Plan, str, AnalyticCostModel | MeasuredCostModel, list[str]]:
    """The plan, its name, and the prices asked for: measured, from traced counts, or from closed forms.

    Measured ones come with lines that say where they come from.

    Raises:
        GalvatronError: the profile or the trace is missing, or the plan does not fit the rest.
    """
    if arguments.cluster is None:
        prices = measured_prices(arguments, model, {}, job)
        plan, name = _plan(arguments, prices.model, job, prices.cluster)
        # What has no price is refused before shares of the time are told.
        _estimate(plan, prices.costs)
        return plan, name, prices.costs, [*prices.lines, prices.measured_share(plan)]
    cluster = read_cluster(arguments.cluster, nodes=arguments.nodes)
    plan, name = _plan(arguments, model, job, cluster)
    options = options_of(arguments, model) if job is None else job.options
    counts = _traced(arguments, model, plan) if arguments.traced else None
    return plan, name, AnalyticCostModel(model, cluster, options, counts), []


def _plan(
    arguments: argparse.Namespace, model: Model, job: JobLine | None, cluster: Cluster
) -> tuple[Plan, str]:
    """The plan and what to call it: of the file that was given, or the one that a command line stands for."""
    name = arguments.what[0]
    path = name if job is None else job.flags.plan_file
    if path is None:
        return plan_from_command_line(job.words, model, cluster.world_size), name
    plan = _checked(read_plan_file(path, cluster.world_size), model, cluster, str(path))
    if job is not None:
        job.constraints.check(plan)
    return plan, name


def _estimate(plan: Plan, costs: TermCostModel) -> Estimate:
    """The estimate.

    Raises:
        PlanError: the profile lacks a part of the plan.
    """
    estimate = estimate_plan(plan, costs)
    if isinstance(costs, MeasuredCostModel) and costs.refusals:
        what, reason = next(iter(costs.refusals.items()))
        raise PlanError(f"profile: {what}: {reason}; valid: a plan of what was measured, or --cluster FILE")
    return estimate


def _traced(arguments: argparse.Namespace, model: Model, plan: Plan) -> CountSource:
    """Counts of the plan's strategies, traced from the layers that the command line makes Megatron build.

    Raises:
        GalvatronError: there is no command line, or the trace failed.
    """
    if len(arguments.what) < 2:
        raise DescriptionError("--traced: needs a Megatron command line; valid: -- SCRIPT ARGS")
    # Tracing is the one part of this command that needs torch.
    from galvatron_megatron.profiler.trace import trace_layers

    return trace_layers(
        arguments.what[1:],
        [plan.base, *plan.strategies],
        [plan.micro_batch_size],
        vocab_size=model.vocab_size,
    )


def _checked(plan: Plan, model: Model, cluster: Cluster, where: str) -> Plan:
    check_plan(plan, model=model, where=where)
    if plan.world_size > cluster.world_size:
        raise PlanError(
            f"{where}: made for {plan.world_size} devices, but {cluster.name} has {cluster.world_size}; valid: "
            f"a cluster of {-(-plan.world_size // cluster.devices_per_node)} nodes (--nodes beside --cluster)"
        )
    return plan
