"""Traces the layers of a Megatron command line without a GPU: the real modules on tensors without data.

The work runs in a process of its own (``trace_worker``), so that Megatron's parallel state, its random states
and the stand-ins for CUDA never touch the caller; this module itself imports no torch.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from galvatron_megatron.cost.counts import layer_counts
from galvatron_megatron.cost.counts_values import LayerCounts
from galvatron_megatron.describe.megatron_args import model_from_arguments, parse_command_line
from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.describe.profile import EMBEDDING, HEAD, digest
from galvatron_megatron.describe.profile_key import layer_digest
from galvatron_megatron.describe.profile_store import default_directory, write_atomically
from galvatron_megatron.errors import DescriptionError, GalvatronError, UnsupportedPlanError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

SCHEMA_VERSION = 2
_WORKER = "galvatron_megatron.profiler.trace_worker"

type Layout = tuple[int, str, int, int]
"""tp, sequence parallelism, expert parallelism, parts of an expert."""
type _Setting = tuple[Layout, str, int]
"""Layout, recompute, samples."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Trace:
    """Counts of every part of a model under the strategies and micro-batches that were traced."""

    model: Model
    """What the command line describes."""
    counted: dict[tuple[str, _Setting], LayerCounts]
    """By part (``embedding``, ``head`` or a layer's digest) and setting."""
    refused: dict[Layout, str]
    """Layout that Megatron does not run -> its reason."""

    def layer(self, layer: Layer, strategy: Strategy, samples: int) -> LayerCounts:
        """Counts of a layer; ``samples`` are those of the micro-batch on one data-parallel rank.

        A Mamba layer's are closed forms: its kernels exist for CUDA alone, so that nothing can be traced.

        Raises:
            UnsupportedPlanError: Megatron refuses the setting.
            DescriptionError: it was not traced.
        """
        if layer.kind is LayerKind.MAMBA:
            return layer_counts(self.model, layer, strategy, samples)
        return self._get(layer_digest(layer), strategy, samples, strategy.recompute)

    def embedding(self, base: Strategy, samples: int) -> LayerCounts:
        """Counts of the embedding; errors as in :meth:`layer`."""
        return self._get(EMBEDDING, base, samples, Recompute.NONE)

    def head(self, base: Strategy, samples: int) -> LayerCounts:
        """Counts of final norm, output layer and loss; errors as in :meth:`layer`."""
        return self._get(HEAD, base, samples, Recompute.NONE)

    def _get(self, part: str, strategy: Strategy, samples: int, recompute: Recompute) -> LayerCounts:
        setting = (layout_of(self.model, strategy), recompute.value, samples)
        found = self.counted.get((part, setting))
        if found is not None:
            return found
        if setting[0] in self.refused:
            raise UnsupportedPlanError(f"trace {strategy}: Megatron refuses it: {self.refused[setting[0]]}")
        raise DescriptionError(f"trace: {part} under {strategy} with {samples} samples was not asked for")


def layout_of(model: Model, strategy: Strategy) -> Layout:
    """What of a strategy changes the modules of a model: degrees of experts count where it has some."""
    experts = (1, 1)
    if any(layer.experts is not None for layer in model.layers):
        experts = (strategy.expert_parallel, strategy.expert_shards)
    return (strategy.tp, strategy.sequence_parallel.value, *experts)


def settings_of(model: Model, strategies: Iterable[Strategy], samples: Iterable[int]) -> tuple[_Setting, ...]:
    """What to trace: data parallelism and ZeRO do not change a layer's counts and drop out.

    Raises:
        UnsupportedPlanError: a strategy has no counterpart in Megatron's local layers, or experts are reached
            by an exchange that cannot be traced.
    """
    gathers = any(
        layer.experts is not None and layer.experts.dispatcher == "allgather" for layer in model.layers
    )
    made = []
    sizes = tuple(samples)
    for strategy in strategies:
        if strategy.cp > 1 or strategy.sequence_parallel is SequenceParallel.ULYSSES:
            raise UnsupportedPlanError(
                f"trace {strategy}: Megatron's local layers have neither context parallelism nor Ulysses; "
                "valid: cp 1 with sequence parallelism none or megatron"
            )
        if gathers and strategy.expert_ranks > 1:
            raise UnsupportedPlanError(
                f"trace {strategy}: --moe-token-dispatcher-type allgather picks rows by the values of tokens, "
                "which a trace does not have; valid: alltoall, or closed-form counts"
            )
        for size in sizes:
            made.append((layout_of(model, strategy), strategy.recompute.value, size))
    return tuple(dict.fromkeys(made))


def trace_layers(
    argv: Sequence[str],
    strategies: Iterable[Strategy],
    samples: Iterable[int],
    *,
    vocab_size: int | None = None,
    kernels: str = "gpu",
    fused_attention: bool | None = None,
    world_size: int = 0,
    cache_directory: Path | None = None,
    timeout_seconds: float = 600.0,
) -> Trace:
    """Traces embedding, every kind of layer and head of a Megatron command line.

    Args:
        argv: Megatron's arguments, without the script; its parallel degrees and recomputation do not count.
        strategies: how layers may run; only tp, sequence parallelism, the degrees of experts and recomputation
            matter.
        samples: micro-batch samples on one data-parallel rank.
        vocab_size: size of the vocabulary where the command line does not say it.
        kernels: ``gpu``: keep the tensors that CUDA kernels keep; ``cpu``: those of the CPU's kernels.
        fused_attention: keep no score matrix; by default as the command line's run would.
        world_size: ranks of the fake job, rounded down to what the degrees divide; by default the fewest.
        cache_directory: where earlier traces lie; by default in the user's cache.
        timeout_seconds: after this long the trace is given up.

    Returns:
        The counts; settings that Megatron refuses are named in ``refused``.

    Raises:
        DescriptionError: the command line describes no model that can be traced.
        GalvatronError: torch or megatron-core is missing, or the trace failed.
    """
    model = model_from_arguments(parse_command_line(list(argv)), vocab_size=vocab_size)
    fused = model.fused_attention if fused_attention is None else fused_attention
    wanted = settings_of(model, strategies, samples)
    request = {
        "argv": list(argv),
        "vocab_size": vocab_size,
        "kernels": kernels,
        "fused_attention": fused,
        "world_size": world_size,
    }
    path = _cache_path(request, cache_directory)
    rows = _read(path)
    known = {_setting(row) for row in rows}
    refused = {setting[0] for setting in known if setting[1] == ""}
    missing = [setting for setting in wanted if setting not in known and setting[0] not in refused]
    if missing:
        rows = [*rows, *run_worker(request | {"settings": missing}, timeout_seconds)]
        write_atomically(path, json.dumps({"schema_version": SCHEMA_VERSION, "rows": rows}))
    return Trace(
        model=model,
        counted={
            (row["part"], _setting(row)): LayerCounts.from_json(row["counts"])
            for row in rows
            if "counts" in row
        },
        refused={_setting(row)[0]: row["refused"] for row in rows if "refused" in row},
    )


def _setting(row: dict) -> _Setting:
    return (tuple(row["layout"]), row.get("recompute", ""), row.get("samples", 0))


def _cache_path(request: dict, directory: Path | None) -> Path:
    if directory is None:
        directory = default_directory().parent / "traces"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DescriptionError(
            f"trace cache {directory}: {error.strerror}; valid: a writable directory"
        ) from None
    try:
        software = [version(name) for name in ("torch", "megatron-core")]
    except PackageNotFoundError as error:
        raise GalvatronError(
            f"trace: {error.name} is not installed; valid: pip install 'galvatron_megatron[train]', "
            "or closed-form counts"
        ) from None
    return directory / f"trace-{digest([request, software, SCHEMA_VERSION])}.json"


def _read(path: Path) -> list[dict]:
    """Rows of an earlier trace; none where the file is missing, damaged or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        path.replace(path.with_suffix(".damaged"))
        return []
    return content["rows"]


def run_worker(request: dict, timeout_seconds: float, environment: dict[str, str] | None = None) -> list[dict]:
    """Runs the worker process.

    Args:
        request: fields of ``trace_worker.Request`` without ``answer``.
        timeout_seconds: after this long it is ended.
        environment: further environment variables (ranks of a real run).

    Returns:
        Its rows.

    Raises:
        GalvatronError: user errors as the worker reports them; a failure with the last line of its output.
    """
    with tempfile.TemporaryDirectory(prefix="galvatron-trace-") as scratch:
        answer = Path(scratch) / "answer.json"
        try:
            finished = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", _WORKER],
                input=json.dumps(request | {"answer": str(answer)}),
                text=True,
                capture_output=True,
                timeout=timeout_seconds,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            )
        except subprocess.TimeoutExpired:
            raise GalvatronError(
                f"trace: no answer after {timeout_seconds:.0f} s; valid: fewer strategies at once"
            ) from None
        if finished.returncode or not answer.exists():
            lines = finished.stderr.strip().splitlines() or ["no output"]
            raise GalvatronError(f"trace: ended with code {finished.returncode}: {lines[-1]}")
        content = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in content:
        raise GalvatronError(content["error"])
    return content["rows"]
