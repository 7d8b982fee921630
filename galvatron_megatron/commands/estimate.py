"""``galvatron estimate``: step time and memory of a plan or of a Megatron command line."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from galvatron_megatron.commands.device_memory import usable_memory_bytes
from galvatron_megatron.commands.plan_file import read_plan_file
from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.count_source import CountSource
from galvatron_megatron.cost.estimate import Estimate, TermCostModel, estimate_plan, simulate_estimate
from galvatron_megatron.cost.host_memory import HostUse
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.schedule import ScheduleKind
from galvatron_megatron.describe.cluster import Cluster, read_cluster
from galvatron_megatron.describe.command_line import read_command_line
from galvatron_megatron.describe.command_plan import plan_from_command_line
from galvatron_megatron.describe.megatron_args import model_from_arguments
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.describe.plan_check import check_plan
from galvatron_megatron.describe.profile_key import measured_model
from galvatron_megatron.describe.profile_store import check_directory, list_profiles
from galvatron_megatron.describe.vocabulary import USUAL_SIZES, UnknownVocabularyError
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
    parser.add_argument("--cluster", type=Path, required=True, help="cluster file, or a shipped name")
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
    parser.add_argument("--overlap-grad-reduce", action="store_true", help="as Megatron's flag of this name")
    parser.add_argument("--overlap-param-gather", action="store_true", help="as Megatron's flag of this name")
    parser.add_argument(
        "--profile-dir",
        type=Path,
        help="price from the newest profile of the model in this directory (galvatron profile makes it)",
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
    cluster = read_cluster(arguments.cluster, nodes=arguments.nodes)
    memory_bytes = usable_memory_bytes(cluster, arguments.memory_gb)
    model, plan, options, name = _what(arguments, cluster)
    costs = _costs(arguments, model, cluster, plan, options)
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
        document = estimate_document(estimate, cluster, simulation, host)
        document["fits"] = estimate.peak_bytes <= memory_bytes and host.fits
        print(json.dumps(document, indent=2))
        return 0
    title = f"{name} on {_place(cluster, plan)}"
    print_estimate(console, title, estimate, cluster, memory_bytes, simulation, host)
    if arguments.trace is not None:
        console.print(f"schedule written to {arguments.trace}")
    return 0


def _is_command_line(words: Sequence[str]) -> bool:
    """Whether a script and its arguments were given instead of a plan file."""
    return len(words) > 1 or (bool(words) and words[0].endswith(".py"))


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
    if _is_command_line(words):
        names = ("model", "seq_length", "overlap_grad_reduce", "overlap_param_gather")
        unused += [(name, "a Megatron command line, which says it itself") for name in names]
    else:
        unused.append(("vocab_size", "a model file, which says it itself"))
    if arguments.compare is not None:
        unused += [(name, "--compare, which shows no schedule") for name in ("trace", "schedule")]
        unused.append(("memory_gb", "--compare, which holds memory against no limit"))
    if arguments.profile_dir is not None:
        unused.append(("traced", "--profile-dir, which has measured it"))
    for name, why in unused:
        if getattr(arguments, name) not in (None, False):
            raise DescriptionError(f"--{name.replace('_', '-')}: unused beside {why}; valid: one of the two")


def _place(cluster: Cluster, plan: Plan) -> str:
    return f"{plan.world_size} of {cluster.world_size} devices of {cluster.name}"


def _what(arguments: argparse.Namespace, cluster: Cluster) -> tuple[Model, Plan, RunOptions, str]:
    """Model, plan, options and a name, from files or from a Megatron command line."""
    words = arguments.what
    if _is_command_line(words):
        line = read_command_line(words)
        model = _described(line.arguments, arguments.vocab_size, Path(words[0]).stem)
        plan = plan_from_command_line(words, model, cluster.world_size)
        return model, plan, options_from_arguments(line.arguments, line.unknown), words[0]
    if not words or arguments.model is None:
        raise DescriptionError(
            "nothing to estimate; valid: PLAN --model MODEL, or -- followed by a Megatron command line"
        )
    model = read_model(arguments.model, seq_length=arguments.seq_length)
    plan = _checked(read_plan_file(words[0], cluster.world_size), model, cluster, words[0])
    options = RunOptions(
        overlap_gradients=arguments.overlap_grad_reduce, overlap_parameters=arguments.overlap_param_gather
    )
    return model, plan, options, words[0]


def _described(given: Mapping[str, object], vocab_size: int | None, name: str) -> Model:
    """The model of a command line; its vocabulary is of the usual size where only files elsewhere tell it.

    Raises:
        DescriptionError: the command line describes no model that can be planned for.
    """
    try:
        return model_from_arguments(given, name=name, vocab_size=vocab_size)
    except UnknownVocabularyError:
        # Megatron's own examples for GPT give the files of GPT-2's tokenizer and no kind.
        kind = given["tokenizer_type"] or ("GPT2BPETokenizer" if given["vocab_file"] else None)
        if kind not in USUAL_SIZES:
            raise
        Console(stderr=True).print(
            f"galvatron estimate: {kind}: its files are not at hand; {USUAL_SIZES[kind]} entries are assumed "
            "(--vocab-size says otherwise)"
        )
        return model_from_arguments(given, name=name, vocab_size=USUAL_SIZES[kind])


def _costs(
    arguments: argparse.Namespace, model: Model, cluster: Cluster, plan: Plan, options: RunOptions
) -> TermCostModel:
    """The cost model that was asked for: measured, from traced counts, or from closed forms.

    Raises:
        GalvatronError: the profile or the trace is missing.
    """
    if arguments.profile_dir is None:
        counts = _traced(arguments, model, plan) if arguments.traced else None
        return AnalyticCostModel(model, cluster, options, counts)
    directory = check_directory(arguments.profile_dir, write=False)
    for profile in list_profiles(directory):
        found = measured_model(model, profile)
        if found is not None:
            return MeasuredCostModel(found, cluster, profile, options)
    raise DescriptionError(
        f"--profile-dir {directory}: no profile of model {model.name}; valid: a directory "
        "in which galvatron profile has measured this model"
    )


def _estimate(plan: Plan, costs: TermCostModel) -> Estimate:
    """The estimate.

    Raises:
        PlanError: the profile lacks a part of the plan.
    """
    estimate = estimate_plan(plan, costs)
    if isinstance(costs, MeasuredCostModel) and costs.refusals:
        what, reason = next(iter(costs.refusals.items()))
        raise PlanError(f"profile: {what}: {reason}; valid: a plan of what was measured, or no --profile-dir")
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
            f"--nodes {-(-plan.world_size // cluster.devices_per_node)}"
        )
    return plan


def options_from_arguments(arguments: Mapping[str, object], unknown: Sequence[str]) -> RunOptions:
    """The switches of a Megatron command line that change time or memory."""

    def has(flag: str) -> bool:
        return flag in unknown or bool(arguments.get(flag.removeprefix("--").replace("-", "_")))

    is_local = arguments.get("transformer_impl") == "local"
    return RunOptions(
        implementation="local" if is_local else "transformer_engine",
        gradients_in_fp32=has("--accumulate-allreduce-grads-in-fp32")
        or (bool(arguments.get("bf16")) and not has("--grad-reduce-in-bf16")),
        overlap_gradients=has("--overlap-grad-reduce"),
        overlap_parameters=has("--overlap-param-gather"),
        overlap_tensor_parallel=has("--tp-comm-overlap"),
        optimizer_instances=arguments.get("num_distributed_optimizer_instances") or 1,
        bucket_elements=arguments.get("ddp_bucket_size") if has("--overlap-grad-reduce") else None,
    )
