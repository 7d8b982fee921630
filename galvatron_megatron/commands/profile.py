"""``galvatron profile``: measures on the ranks at hand, and manages stored profiles."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from galvatron_megatron.commands.job_line import without_own_flags
from galvatron_megatron.commands.profile_worker import RANK_TIMEOUT_SECONDS
from galvatron_megatron.commands.stored_profiles import export, find_stored, import_stored, list_stored, show
from galvatron_megatron.describe.galvatron_store import GalvatronImport
from galvatron_megatron.describe.host import gpus, processor_name, software_versions
from galvatron_megatron.describe.kept_plans import forget_plans
from galvatron_megatron.describe.megatron_flags_of import flags_of
from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.describe.profile import Profile, digest
from galvatron_megatron.describe.profile_store import (
    check_directory,
    default_directory,
    read_profile,
    write_atomically,
)
from galvatron_megatron.errors import DescriptionError, GalvatronError, did_you_mean
from galvatron_megatron.integration.launcher import adopt_environment
from galvatron_megatron.plan.document import check_target
from galvatron_megatron.plan.strategy import Offload

ACTIONS = ("measure", "list", "show", "export", "import")
LEAST_WORDS = {"export": 2, "import": 1}
"""Arguments that an action needs."""

EPILOG = """\
actions:
  measure             (default) measure what the store lacks and show it
  list                the stored profiles, newest first
  show FINGERPRINT    one of them, in full (the newest one without FINGERPRINT)
  export FINGERPRINT FILE
  import FILE         merge a profile that was exported elsewhere into the store
  import DIR...       put the profiles of Hetu-Galvatron in these directories into the store (of a machine:
                      profile_hardware/hardware_configs; of models: models/*/configs)

examples:
  galvatron profile --ranks 4 --model configs/models/gpt3-125m.yaml
  galvatron profile --ranks 4 -- pretrain_gpt.py --num-layers 4 --hidden-size 256 --num-attention-heads 4 \\
      --seq-length 256 --max-position-embeddings 256 --vocab-size 1000 --tokenizer-type NullTokenizer
  torchrun --nproc-per-node 8 -m galvatron_megatron profile --model configs/models/llama2-7b.yaml
      on the ranks that torchrun, deepspeed or srun have started
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("words", nargs="*", metavar="ACTION", help="what to do, see below")
    _keep_words_after_dashes(parser)
    parser.add_argument("--model", type=Path, help="model file, Hugging Face config.json, or a shipped name")
    parser.add_argument(
        "--seq-length", type=int, help="tokens of a sample, instead of what the model file says"
    )
    parser.add_argument("--ranks", type=int, help="ranks to start here; by default one per GPU, or per core")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where ranks run; by default GPUs where there are any"
    )
    parser.add_argument("--directory", type=Path, help=f"the store (default: {default_directory()})")
    parser.add_argument("--global-batch-size", type=int, help="samples per step: bounds the micro-batch sizes")
    parser.add_argument("--micro-batch-size", type=int, action="append", help="a size to measure; repeatable")
    parser.add_argument(
        "--tp", type=int, action="append", help="a tensor-parallel degree to measure; repeatable"
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="measure a step over states in host memory, too, for galvatron search --offload; on GPUs "
        "DeepSpeed compiles its optimizer for hosts, once for minutes",
    )
    parser.add_argument("--again", action="store_true", help="measure also what the store has")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw points and curves into FILE")
    parser.add_argument("--json", action="store_true", help="print the profile as JSON")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds after which ranks are ended")
    parser.add_argument(
        "--rank-timeout",
        type=int,
        default=RANK_TIMEOUT_SECONDS,
        help="seconds that ranks wait for one that does not answer",
    )


def _keep_words_after_dashes(parser: argparse.ArgumentParser) -> None:
    """Lets a Megatron command line follow ``--``, behind an action and options, as ``arguments.megatron``.

    argparse gives all positional words to the first run of them and refuses later ones.
    """
    parse = parser.parse_known_args

    def split(
        words: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(sys.argv[1:] if words is None else words)
        end = words.index("--") if "--" in words else len(words)
        found, unknown = parse(words[:end], namespace)
        found.megatron = words[end + 1 :]
        return found, unknown

    parser.parse_known_args = split  # type: ignore[method-assign]


def run(arguments: argparse.Namespace) -> int:
    """Runs the action.

    Returns:
        The exit code.

    Raises:
        GalvatronError: bad arguments, an unusable store, or ranks that failed.
    """
    words = list(arguments.words)
    action = words.pop(0) if words else "measure"
    if action not in ACTIONS:
        raise GalvatronError(f"action {action!r} is unknown; {did_you_mean(action, ACTIONS)}")
    _read_job_flags(arguments)
    directory = check_directory(
        arguments.directory or default_directory(),
        create=arguments.directory is None,
        write=action == "import",
    )
    limit = {"measure": 0, "list": 0, "show": 1, "export": 2, "import": len(words)}[action]
    unused = (
        () if action == "measure" else ("model", "seq_length", "ranks", "tp", "offload", "again", "megatron")
    )
    unused += () if action in ("measure", "show") else ("plot",)
    for name in unused:
        if getattr(arguments, name):
            given = "--" if name == "megatron" else f"--{name.replace('_', '-')}"
            raise GalvatronError(f"profile {action}: {given}: unused; valid: with galvatron profile measure")
    if arguments.plot is not None:
        check_target(arguments.plot, "--plot", GalvatronError)
    if len(words) > limit:
        raise GalvatronError(f"profile {action}: {' '.join(words[limit:])!r} is too much; see --help")
    if action == "measure":
        return _measure(arguments, directory, arguments.megatron)
    if action == "list":
        list_stored(directory, as_json=arguments.json)
        return 0
    if action == "show":
        return _show(find_stored(directory, words[0] if words else None), arguments)
    if len(words) < LEAST_WORDS[action]:
        raise GalvatronError(f"profile {action}: needs {LEAST_WORDS[action]} argument(s); see --help")
    if action == "export":
        export(find_stored(directory, words[0]), Path(words[1]))
    else:
        import_stored(directory, [Path(word) for word in words])
    return 0


def _read_job_flags(arguments: argparse.Namespace) -> None:
    """Takes the script and our flags off the words behind ``--``, which may be a job's line as it stands.

    Where the command itself does not say device, store and offloading, those flags do.
    """
    words, own = without_own_flags(arguments.megatron)
    arguments.megatron = words[1:] if words and words[0].endswith(".py") else words
    if own.galvatron_device == "cpu":
        arguments.device = arguments.device or "cpu"
    if own.galvatron_profile_dir:
        arguments.directory = arguments.directory or Path(own.galvatron_profile_dir)
    arguments.offload = arguments.offload or own.galvatron_offload not in (None, Offload.NONE)


def _show(profile: Profile | GalvatronImport, arguments: argparse.Namespace) -> int:
    show(profile, plot=arguments.plot, as_json=arguments.json)
    return 0


def _measure(arguments: argparse.Namespace, directory: Path, megatron: list[str]) -> int:
    if arguments.model is not None:
        model = read_model(arguments.model, seq_length=arguments.seq_length)
        megatron = [*flags_of(model), *megatron]
    if not megatron:
        raise GalvatronError("profile: no model; valid: --model FILE, or Megatron's own arguments after --")
    for name in ("ranks", "global_batch_size", "timeout", "rank_timeout"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise GalvatronError(f"--{name.replace('_', '-')}: {value}; valid: an integer >= 1")
    for name in ("tp", "micro_batch_size"):
        for value in getattr(arguments, name) or ():
            if value < 1:
                raise GalvatronError(f"--{name.replace('_', '-')}: {value}; valid: an integer >= 1")
    for module, package in (("torch", "torch"), ("megatron", "megatron-core")):
        if find_spec(module) is None:
            raise GalvatronError(
                f"{package} is not installed; valid: pip install 'galvatron_megatron[train]' to measure"
            )
    device = arguments.device or ("cuda" if gpus() else "cpu")
    request = {
        "megatron": megatron,
        "directory": str(directory.resolve()),
        "device": device,
        "global_batch_size": arguments.global_batch_size,
        "micro_batch_sizes": arguments.micro_batch_size,
        "tps": arguments.tp,
        "offload": arguments.offload,
        "again": arguments.again,
        "rank_timeout": arguments.rank_timeout,
    }
    # srun and mpirun have names of their own for what torchrun says; a batch script under Slurm is no rank.
    adopt_environment()
    if "RANK" in os.environ:
        from galvatron_megatron.commands.profile_worker import run_rank

        fingerprint = run_rank(request)
        if int(os.environ["RANK"]):
            return 0
    else:
        count = arguments.ranks or (gpus() if device == "cuda" else len(os.sched_getaffinity(0)))
        for tp in arguments.tp or ():
            if count % tp:
                valid = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
                raise GalvatronError(f"--tp: {tp} does not divide {count} ranks; valid: {valid}")
        answered = directory / f"answered-{_digest_of(request, count)}.json"
        profile = None if arguments.again else _answered(directory, answered)
        if profile is not None:
            return _show(profile, arguments)
        fingerprint = _start_ranks(request, count, arguments.timeout)
        with suppress(DescriptionError):
            # It only spares the next call the start of ranks; a store that is complete may be read-only.
            write_atomically(answered, json.dumps(fingerprint) + "\n")
    if arguments.again:
        forget_plans(directory, fingerprint)
    profile, _ = read_profile(directory, fingerprint)
    if profile is None:
        raise GalvatronError(f"profile {fingerprint}: vanished from {directory}; valid: measure again")
    return _show(profile, arguments)


def _digest_of(request: dict, count: int) -> str:
    """Changes with everything that decides what a request measures on this host."""
    asked = {name: value for name, value in request.items() if name != "rank_timeout"}
    return digest([asked, count, processor_name(), gpus(), len(os.sched_getaffinity(0)), software_versions()])


def _answered(directory: Path, answered: Path) -> Profile | None:
    """The profile that an equal request was answered with before, where it is still stored."""
    try:
        fingerprint = json.loads(answered.read_text())
    except (OSError, ValueError):
        return None
    return read_profile(directory, fingerprint)[0] if isinstance(fingerprint, str) else None


def _start_ranks(request: dict, count: int, timeout_seconds: float) -> str:
    """Starts ranks on this machine, waits for them and returns the profile's fingerprint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request))
        command = [sys.executable, "-m", "galvatron_megatron.commands.profile_worker", str(path)]
        common = os.environ | {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
        }
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(count)]
        ranks = []
        try:
            for rank, log in enumerate(logs):
                place = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # Rank 0 shows progress; what it and the others say else is kept for the case of a failure.
                with log.open("w") as stream:
                    error = None if rank == 0 else stream
                    ranks.append(subprocess.Popen(command, env=place, stdout=stream, stderr=error))
            bad = _wait(ranks, timeout_seconds)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
            for process in ranks:
                process.wait()
        done = path.with_suffix(".done")
        if done.exists():
            return done.read_text()
        said = _first_error(path, count, bad)
        if said:
            raise GalvatronError(said)
        last = (logs[bad].read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise GalvatronError(
            f"profile: rank {bad} of {count} ended with exit code {ranks[bad].returncode} ({last}); "
            "valid: run again, what was measured is kept"
        )


def _first_error(request: Path, count: int, bad: int) -> str:
    """What the first rank that failed says, else the one of the others that spoke first, else nothing.

    Ranks that wait for another one fail after it, with a line about it.
    """
    errors = [request.with_suffix(f".error{rank}") for rank in range(count)]
    said = [path for path in errors if path.exists()]
    if not said:
        return ""
    first = errors[bad] if errors[bad] in said else min(said, key=lambda path: path.stat().st_mtime_ns)
    return first.read_text()


def _wait(ranks: list[subprocess.Popen], timeout_seconds: float) -> int:
    """Returns when all ranks have ended, or when one has failed: the first that failed, else 0.

    Raises:
        GalvatronError: time is up.
    """
    deadline = time.monotonic() + timeout_seconds
    while any(process.poll() is None for process in ranks):
        failed = next((rank for rank, process in enumerate(ranks) if process.poll()), None)
        if failed is not None:
            # The others wait for the one that failed; they get a moment to say why.
            time.sleep(1.0)
            return failed
        if time.monotonic() > deadline:
            raise GalvatronError(
                f"profile: not done after {timeout_seconds:.0f} s; valid: a larger --timeout, or run again, "
                "what was measured is kept"
            )
        time.sleep(0.05)
    return next((rank for rank, process in enumerate(ranks) if process.returncode), 0)
