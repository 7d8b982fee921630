"""``galvatron export``: a plan as Megatron arguments, YAML or JSON."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from galvatron_megatron.commands.plan_file import is_galvatron_config, read_plan_file
from galvatron_megatron.describe.deepspeed_config import PRECISIONS, deepspeed_config, deepspeed_json
from galvatron_megatron.describe.megatron_deepspeed import megatron_deepspeed_arguments
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.describe.plan_check import check_plan
from galvatron_megatron.describe.shipped import find_description
from galvatron_megatron.errors import DescriptionError, PlanError
from galvatron_megatron.plan.document import write_document
from galvatron_megatron.plan.megatron_arguments import command_line, runs_on_stock_megatron, shell_line
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.serialization import plan_to_json, plan_to_yaml

EPILOG = """\
examples:
  galvatron export plan.yaml
      prints the flags for pretrain_gpt.py, in one line to paste into a shell
  galvatron export plan.json --format yaml --output plan.yaml
      turns a JSON plan into YAML
  galvatron export plan.yaml --model configs/models/llama2-7b.yaml
      also checks that the plan fits the model
  galvatron export plan.yaml --model llama2-7b --deepspeed ds_config.json
      writes DeepSpeed's configuration file, for deepspeed.initialize(..., config="ds_config.json")
  galvatron export plan.yaml --model llama2-7b --megatron-deepspeed ds_config.json
      the same, and prints the flags for Megatron-DeepSpeed's pretrain_gpt.py

A plan whose layers differ is more than Megatron's flags can say. For such a plan --galvatron-plan PLAN is
printed, under which the training job gives every layer its own strategy, and the batch sizes that it needs.
"""


def _megatron(plan: Plan, path: Path, model: Model | None) -> str:
    if runs_on_stock_megatron(plan):
        return shell_line(command_line(plan, model)) + "\n"
    print(
        f"{path}: the layers differ in more than Megatron's flags can say; train with this package installed",
        file=sys.stderr,
    )
    if is_galvatron_config(path):
        raise PlanError(
            f"{path}: its layers differ, which only a plan file can say to a job; valid: --format yaml "
            "--output plan.yaml first"
        )
    # No degree is given: what stands on the command line holds for every layer.
    batch = [
        "--micro-batch-size",
        str(plan.micro_batch_size),
        "--global-batch-size",
        str(plan.global_batch_size),
    ]
    return shell_line([*batch, "--galvatron-plan", str(path)]) + "\n"


def _deepspeed(plan: Plan, model: Model | None, arguments: argparse.Namespace, target: Path) -> str:
    """Writes DeepSpeed's configuration file.

    Returns:
        What to print beside it.

    Raises:
        PlanError: the plan is more than ``deepspeed.initialize``, or Megatron-DeepSpeed, can run.
    """
    if arguments.megatron_deepspeed is None and plan.pp > 1:
        raise PlanError(
            f"--deepspeed: pp {plan.pp}, which deepspeed.initialize cannot run around a Megatron model; valid: "
            "a plan with pp 1, --megatron-deepspeed, or Megatron's own arguments (without --deepspeed)"
        )
    document = deepspeed_config(
        plan,
        precision=arguments.precision or (model.precision if model is not None else "bf16"),
        clip_grad=1.0 if arguments.clip_grad is None else arguments.clip_grad,
        model=model,
    )
    words = []
    if arguments.megatron_deepspeed is not None:
        stage = document["zero_optimization"]["stage"]
        words = megatron_deepspeed_arguments(plan, target, stage=stage)
    write_document(deepspeed_json(document), target)
    return shell_line(words) + "\n" if words else ""


FORMATS: dict[str, Callable[[Plan, Path, Model | None], str]] = {
    "megatron": _megatron,
    "yaml": lambda plan, path, model: plan_to_yaml(plan),
    "json": lambda plan, path, model: plan_to_json(plan),
}
"""Format -> function that makes the text from the plan, its file and the model, where one was given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "plan", type=Path, metavar="PLAN", help="plan file, .yaml or .json, or the name of a shipped one"
    )
    parser.add_argument(
        "--format",
        choices=sorted(FORMATS),
        default="megatron",
        help="what to write: flags for Megatron's pretrain scripts, or the plan itself (default: megatron)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="model the plan is for (our YAML or a Hugging Face config.json); checked against the plan",
    )
    parser.add_argument(
        "--seq-length", type=int, metavar="TOKENS", help="sequence length, instead of the model file's"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="devices, where PLAN is a galvatron_config of Hetu-Galvatron"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    engine = parser.add_argument_group("DeepSpeed's own engine, for plans in which all layers run alike")
    target = engine.add_mutually_exclusive_group()
    target.add_argument(
        "--deepspeed", type=Path, metavar="OUT.json", help="write DeepSpeed's configuration file, print nothing"
    )
    target.add_argument(
        "--megatron-deepspeed",
        type=Path,
        metavar="OUT.json",
        help="write DeepSpeed's configuration file and print the flags for Megatron-DeepSpeed",
    )
    engine.add_argument(
        "--precision", choices=PRECISIONS, help="of the weights (default: the model's, or bf16)"
    )
    engine.add_argument(
        "--clip-grad", type=float, metavar="NORM", help="largest gradient norm, 0 for no limit (default: 1.0)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        GalvatronError: a file that cannot be read or written, or a plan that does not fit the model.
    """
    if arguments.seq_length is not None and arguments.model is None:
        raise DescriptionError("--seq-length: without a model to check; valid: --model FILE beside it")
    if arguments.format == "yaml" and arguments.output is not None and arguments.output.suffix == ".json":
        raise PlanError(f"--output {arguments.output}: would hold YAML; valid: a name that ends with .yaml")
    target = arguments.deepspeed or arguments.megatron_deepspeed
    if target is None:
        for flag in ("precision", "clip_grad"):
            if getattr(arguments, flag) is not None:
                raise PlanError(
                    f"--{flag.replace('_', '-')}: belongs into DeepSpeed's configuration file; valid: with "
                    "--deepspeed or --megatron-deepspeed OUT.json"
                )
    elif arguments.format != "megatron" or (arguments.deepspeed and arguments.output):
        raise PlanError("--deepspeed: an answer of its own; valid: without --format and --output")
    path = find_description("plans", arguments.plan)
    if arguments.devices is not None and not is_galvatron_config(path):
        raise PlanError(f"--devices {arguments.devices}: the plan says its devices itself; valid: leave it out")
    plan = read_plan_file(path, arguments.devices)
    model = None
    if arguments.model is not None:
        model = read_model(arguments.model, seq_length=arguments.seq_length)
        check_plan(plan, model=model, where=str(path))
    if target is not None:
        text = _deepspeed(plan, model, arguments, target)
    else:
        text = FORMATS[arguments.format](plan, path, model)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        write_document(text, arguments.output)
    return 0
