"""The ``--galvatron-*`` flags of a training job."""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from galvatron_megatron.describe.profile_store import default_directory
from galvatron_megatron.errors import GalvatronError, did_you_mean
from galvatron_megatron.integration.start_up import FLAG_PREFIX
from galvatron_megatron.plan.document import SUFFIXES, check_target
from galvatron_megatron.plan.runnable import ZERO_BACKENDS
from galvatron_megatron.plan.strategy import Offload

DEVICES = ("cuda", "cpu")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, in a group of their own.

    Values are taken as text and checked by ``Options``, so that a wrong one is reported in one line and not
    behind the usage of Megatron's several hundred flags.

    Args:
        parser: Megatron's.
    """
    group = parser.add_argument_group(title="galvatron", description="How the job is planned.")
    group.add_argument(
        "--galvatron-auto",
        action="store_true",
        help="Plan the job: measure the ranks (once; the profile is kept), search the fastest parallel plan "
        "that fits, and train under it. Parallelism, recomputation and batch flags given by hand are kept.",
    )
    group.add_argument("--galvatron-plan", metavar="FILE", help="Train under the plan in FILE; search nothing.")
    group.add_argument(
        "--galvatron-memory-gb",
        metavar="GB",
        help="Memory of one device that a searched plan may use, in GiB. Default: all of it.",
    )
    group.add_argument(
        "--galvatron-profile-dir",
        metavar="DIRECTORY",
        help=f"Where profiles and plans are kept; must exist. Default: {default_directory()}",
    )
    group.add_argument(
        "--galvatron-again", action="store_true", help="Measure and search again, whatever is kept."
    )
    group.add_argument(
        "--galvatron-uniform",
        action="store_true",
        help="Only plans in which all layers run alike, on Megatron's own code alone.",
    )
    group.add_argument(
        "--galvatron-offload",
        metavar="STATES",
        help="What a searched plan may keep in host memory, where that gains or alone fits: none (default), "
        "optimizer (states of Adam and main weights), or parameters as well (with ZeRO 3).",
    )
    group.add_argument("--galvatron-plan-only", action="store_true", help="Print the plan and end.")
    group.add_argument("--galvatron-save-plan", metavar="FILE", help="Write the plan to FILE (.yaml or .json).")
    group.add_argument(
        "--galvatron-report",
        metavar="FILE",
        help="Write plan, prediction, measured step times and losses to FILE (JSON), after 10 iterations and "
        "at the end.",
    )
    group.add_argument(
        "--galvatron-observe",
        metavar="DIRECTORY",
        help="With or without a plan: measure every layer while the job trains (20 steps, then no more), one "
        "file per rank; galvatron calibrate merges them into the profile that the next search prices with.",
    )
    group.add_argument(
        "--galvatron-load-universal",
        metavar="DIRECTORY",
        help="Go on from DeepSpeed's universal checkpoint in DIRECTORY (the output of ds_to_universal), "
        "until the job has a checkpoint of its own in --load. With a plan.",
    )
    group.add_argument(
        "--galvatron-zero-backend",
        metavar="NAME",
        help="Who shards: deepspeed, all of it; megatron, optimizer states alone (ZeRO 1), so that nothing "
        "else is planned or accepted. Default: megatron ZeRO 1, deepspeed 2, 3 and what lies in host memory.",
    )
    group.add_argument(
        "--galvatron-device",
        metavar="DEVICE",
        default="cuda",
        help="cuda (default), or cpu: train on CPU ranks over gloo.",
    )
    group.add_argument(
        "--galvatron-ignore-gpus",
        action="store_true",
        help="With --galvatron-device cpu: also where a GPU is visible.",
    )


def check_flag_names(words: Sequence[str]) -> None:
    """Refuses a misspelt flag of ours before Megatron's parser answers with its whole usage.

    Args:
        words: the command line.

    Raises:
        GalvatronError: names the flag and the nearest valid one.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    valid = set(parser._option_string_actions)
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith(FLAG_PREFIX) and name not in valid:
            raise GalvatronError(f"{name}: unknown flag; {did_you_mean(name, valid)}")


@dataclass(kw_only=True, frozen=True, slots=True)
class Options:
    """The flags of a job, checked."""

    auto: bool = False
    plan_file: Path | None = None
    memory_gb: float | None = None
    profile_directory: Path | None = None
    """None: the default one, made at first use."""
    again: bool = False
    uniform: bool = False
    offload: Offload = Offload.NONE
    """The most that a searched plan may keep in host memory."""
    plan_only: bool = False
    save_plan: Path | None = None
    report: Path | None = None
    observe: Path | None = None
    """Directory for what layers take while the job trains."""
    load_universal: Path | None = None
    """DeepSpeed's universal checkpoint from which the job goes on."""
    device: str = "cuda"
    ignore_gpus: bool = False
    zero_backend: str | None = None
    """Who shards; None leaves it to the plan."""

    @property
    def plans(self) -> bool:
        """True where the job is to run under a plan."""
        return self.auto or self.plan_file is not None

    @staticmethod
    def from_arguments(args: Namespace) -> "Options":
        """Reads and checks the flags.

        Args:
            args: Megatron's parsed arguments.

        Raises:
            GalvatronError: a value is wrong; names the flag, the value and what is valid.
        """
        if args.galvatron_device not in DEVICES:
            raise GalvatronError(
                f"--galvatron-device: {args.galvatron_device!r} is unknown; "
                f"{did_you_mean(args.galvatron_device, DEVICES)}"
            )
        backend = args.galvatron_zero_backend
        if backend is not None and backend not in ZERO_BACKENDS:
            raise GalvatronError(
                f"--galvatron-zero-backend: {backend!r} is unknown; {did_you_mean(backend, ZERO_BACKENDS)}"
            )
        offload = args.galvatron_offload
        if offload is not None and offload not in list(Offload):
            raise GalvatronError(
                f"--galvatron-offload: {offload!r} is unknown; {did_you_mean(offload, list(Offload))}"
            )
        options = Options(
            auto=args.galvatron_auto,
            plan_file=_path("plan", args.galvatron_plan),
            memory_gb=_memory(args.galvatron_memory_gb),
            profile_directory=_path("profile-dir", args.galvatron_profile_dir),
            again=args.galvatron_again,
            uniform=args.galvatron_uniform,
            offload=Offload(offload or Offload.NONE),
            plan_only=args.galvatron_plan_only,
            save_plan=_path("save-plan", args.galvatron_save_plan),
            report=_path("report", args.galvatron_report),
            observe=_path("observe", args.galvatron_observe),
            load_universal=_path("load-universal", args.galvatron_load_universal),
            device=args.galvatron_device,
            ignore_gpus=args.galvatron_ignore_gpus,
            zero_backend=backend,
        )
        if options.auto and options.plan_file is not None:
            raise GalvatronError("--galvatron-plan and --galvatron-auto: both given; valid: one of them")
        _check_used(args, options)
        if options.uniform and options.offload is not Offload.NONE:
            raise GalvatronError(
                f"--galvatron-offload {offload}: beside --galvatron-uniform, whose plans Megatron's own code "
                "runs, on the device; valid: one of them"
            )
        if options.observe is not None and options.observe.exists() and not options.observe.is_dir():
            raise GalvatronError(
                f"--galvatron-observe: {options.observe} is a file; valid: a directory, made if need be"
            )
        if options.save_plan is not None:
            check_target(options.save_plan, "--galvatron-save-plan", GalvatronError, suffixes=SUFFIXES)
        if options.report is not None:
            check_target(options.report, "--galvatron-report", GalvatronError)
        return options


_OF_A_SEARCH = ("memory_gb", "again", "uniform", "offload")
_OF_A_PLAN = ("plan_only", "save_plan", "profile_dir", "report", "load_universal")
_BESIDE_UNIVERSAL = (
    ("pretrained_checkpoint", "both say where to go on from"),
    ("finetune", "takes weights alone"),
    ("no_load_optim", "takes weights alone"),
    ("skip_train", "nothing is trained"),
)
"""Arguments of Megatron that do not go with a universal checkpoint, and why."""


def _check_used(args: Namespace, options: Options) -> None:
    """Refuses flags that the job would not look at: what is asked for and not done misleads."""
    if options.ignore_gpus and options.device != "cpu":
        raise GalvatronError(
            "--galvatron-ignore-gpus: the job runs on GPUs; valid: beside --galvatron-device cpu"
        )
    unused = () if options.auto else _OF_A_SEARCH if options.plans else (*_OF_A_SEARCH, *_OF_A_PLAN)
    why = "the plan is given, nothing is searched" if options.plans else "nothing is planned"
    for name in unused:
        if getattr(args, f"galvatron_{name}"):
            also = " or --galvatron-plan" if name in _OF_A_PLAN else ""
            raise GalvatronError(
                f"{FLAG_PREFIX}{name.replace('_', '-')}: {why}; valid: with --galvatron-auto{also}"
            )
    if options.zero_backend is not None and not options.plans:
        raise GalvatronError(
            f"--galvatron-zero-backend {options.zero_backend}: nothing is planned; "
            "valid: with --galvatron-auto or --galvatron-plan"
        )
    if options.zero_backend == "deepspeed" and options.uniform:
        raise GalvatronError(
            "--galvatron-zero-backend deepspeed: beside --galvatron-uniform, whose plans Megatron's own code "
            "runs; valid: one of them"
        )
    if options.zero_backend == "megatron" and options.offload is not Offload.NONE:
        raise GalvatronError(
            f"--galvatron-zero-backend megatron: beside --galvatron-offload {options.offload.value}, which "
            "DeepSpeed does; valid: one of them"
        )
    if options.load_universal is not None:
        for name, reason in _BESIDE_UNIVERSAL:
            if getattr(args, name, None):
                raise GalvatronError(
                    f"--galvatron-load-universal: beside --{name.replace('_', '-')}, {reason}; "
                    "valid: one of them"
                )


def _path(flag: str, text: str | None) -> Path | None:
    if text == "":
        # An unset variable of a launch script, which must not turn planning off in silence.
        raise GalvatronError(f"{FLAG_PREFIX}{flag}: is empty; valid: a path, or leave the flag out")
    return None if text is None else Path(text).expanduser()


def _memory(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise GalvatronError(f"--galvatron-memory-gb: {text!r}; valid: GiB of one device, a number > 0")
    return value
