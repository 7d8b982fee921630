"""Hetu-Galvatron's files: profiles of hardware and model (JSON), and its strategy files, read and written.

Spellings of v2.4 and of the main branch are understood: layer tables with or without a level for the
sequence length (``layertype_0`` and ``layertype_0_sp``), ``embed_sdp`` and ``vocab_sdp`` in strategy files.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from galvatron_megatron.errors import DescriptionError, PlanError, did_you_mean
from galvatron_megatron.plan.document import write_document
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

_MB = 2**20


@dataclass(kw_only=True, frozen=True, slots=True)
class EndMemory:
    """Embedding or head by vocabulary tp degree."""

    state_mb: dict[int, float]
    """Weights, gradients and optimizer states of one rank, unsharded over data parallelism."""
    activation_mb: dict[int, float]
    """Per sample."""


@dataclass(kw_only=True, frozen=True, slots=True)
class GalvatronProfile:
    """One model on one machine, as Hetu-Galvatron's profilers wrote it."""

    name: str
    seq_length: int
    world_size: int
    layer_ms: dict[int, float]
    """Forward milliseconds of one sample in one layer, by batch size, tp 1."""
    other_ms: dict[int, float]
    """The same for embedding and head together."""
    parameter_mb: float
    """Parameters of one layer in fp32."""
    activation_mb: dict[int, float]
    """Activations of one layer and sample by tp degree, sequence split."""
    checkpoint_mb: float
    """Activations kept of a layer and sample under full recomputation, tp 1."""
    other_alone: EndMemory
    """Embedding and head together, without a pipeline."""
    other_first: EndMemory
    other_last: EndMemory
    all_reduce_gb_per_second: dict[tuple[int, bool], float]
    """Bus bandwidth by (ranks, consecutive ranks)."""
    send_gb_per_second: dict[int, float]
    """By pipeline degree."""
    all_reduce_ms: dict[int, dict[int, float]]
    """By ranks and message in MB."""
    all_to_all_ms: dict[int, dict[int, float]]
    overlap_slowdown: float


def read_galvatron_profile(directory: Path | str, *, seq_length: int, world_size: int) -> GalvatronProfile:
    """Reads a directory of profile files.

    Args:
        directory: with ``computation_profiling_*.json``, ``memory_profiling_*.json``,
            ``allreduce_bandwidth_*.json``,
            ``p2p_bandwidth_*.json``, ``sp_time_*.json`` and ``overlap_coefficient.json``.
        seq_length: tokens of a sample; must be one that was profiled.
        world_size: devices; selects the bandwidth files.

    Raises:
        DescriptionError: a file or an entry is missing, or a number is NaN, negative or no number.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DescriptionError(f"{directory}: no such directory; valid: a directory of Hetu-Galvatron profiles")
    times, times_file = _find(
        directory, "computation_profiling_*.json", f"layertype_0_bsz\\d+_seq{seq_length}$"
    )
    memory, memory_file = _find(directory, "memory_profiling_*.json", "layertype_0(_sp)?$")
    suffix = "_sp" if "layertype_0_sp" in memory else ""

    def table(name: str) -> Mapping:
        found = memory.get(name + suffix)
        if not isinstance(found, dict):
            raise DescriptionError(
                f"{memory_file}: no {name + suffix!r}; {did_you_mean(name + suffix, memory)}"
            )
        if "model_states" in found or "parameter_size" in found:
            return found
        if str(seq_length) not in found:
            raise DescriptionError(
                f"{memory_file}: {name + suffix} has no sequence length {seq_length}; valid: {', '.join(found)}"
            )
        return found[str(seq_length)]

    layer = table("layertype_0")
    activation = dict(_get(layer, "tp_activation_per_bsz_dict", memory_file))
    checkpoint = _number(activation.pop("checkpoint", None), f"{memory_file}: checkpoint")
    reduce_file = _machine_file(directory, "allreduce_bandwidth", world_size)
    send_file = _machine_file(directory, "p2p_bandwidth", world_size)
    links, sends = _load(reduce_file), _load(send_file)
    sp_times, sp_file = _find(directory, "sp_time_*.json", "allreduce_size_\\d+_\\d+MB_time$")
    overlap_file = directory / "overlap_coefficient.json"
    overlap = _number(_get(_load(overlap_file), "overlap_coe", overlap_file), f"{overlap_file}: overlap_coe")
    return GalvatronProfile(
        name=times_file.stem,
        seq_length=seq_length,
        world_size=world_size,
        layer_ms=_by_number(times, f"layertype_0_bsz(\\d+)_seq{seq_length}$", times_file),
        other_ms=_by_number(times, f"layertype_other_bsz(\\d+)_seq{seq_length}$", times_file),
        parameter_mb=_number(_get(layer, "parameter_size", memory_file), f"{memory_file}: parameter_size"),
        activation_mb=_degrees(activation, f"{memory_file}: tp_activation_per_bsz_dict"),
        checkpoint_mb=checkpoint,
        other_alone=_end(table("other_memory_pp_off"), memory_file),
        other_first=_end(table("other_memory_pp_on_first"), memory_file),
        other_last=_end(table("other_memory_pp_on_last"), memory_file),
        all_reduce_gb_per_second={
            (int(match[1]), match[2] == "1"): _number(value, f"{reduce_file}: {key}", positive=True)
            for key, value in links.items()
            if (match := re.fullmatch(r"allreduce_size_(\d+)_consec_([01])", key))
        },
        send_gb_per_second={
            int(match[1]): _number(value, f"{send_file}: {key}", positive=True)
            for key, value in sends.items()
            if (match := re.fullmatch(r"pp_size_(\d+)", key))
        },
        all_reduce_ms=_collective(sp_times, "allreduce", sp_file),
        all_to_all_ms=_collective(sp_times, "all2all", sp_file),
        overlap_slowdown=max(1.0, overlap),
    )


def _load(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DescriptionError(f"{path}: cannot be read ({error.strerror}); valid: a JSON file") from error
    except ValueError as error:
        raise DescriptionError(f"{path}: is not JSON ({error}); valid: a JSON object") from error
    if not isinstance(document, dict):
        raise DescriptionError(f"{path}: holds {type(document).__name__}; valid: a JSON object")
    return document


def _find(directory: Path, pattern: str, key: str) -> tuple[dict, Path]:
    """The first file of a pattern that has a key matching an expression."""
    files = sorted(directory.glob(pattern))
    for path in files:
        document = _load(path)
        if any(re.match(key, name) for name in document):
            return document, path
    names = ", ".join(path.name for path in files) or "no such file"
    raise DescriptionError(
        f"{directory}: no {pattern} with a key like {key!r} ({names}); valid: profile it first"
    )


def _machine_file(directory: Path, prefix: str, world_size: int) -> Path:
    sizes = {}
    for path in sorted(directory.glob(f"{prefix}_*nodes_*gpus_per_node.json")):
        nodes, devices = re.findall(r"(\d+)nodes_(\d+)gpus", path.name)[0]
        sizes[int(nodes) * int(devices)] = path
    if world_size not in sizes:
        valid = ", ".join(map(str, sorted(sizes))) or "none"
        raise DescriptionError(f"{directory}: no {prefix} file for {world_size} devices; valid: {valid}")
    return sizes[world_size]


def _get(mapping: Mapping, key: str, path: Path) -> object:
    if key not in mapping:
        raise DescriptionError(f"{path}: no {key!r}; {did_you_mean(key, map(str, mapping))}")
    return mapping[key]


def _number(value: object, where: str, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DescriptionError(f"{where}: {value!r}; valid: a finite number >= 0")
    if positive and value == 0:
        raise DescriptionError(f"{where}: 0; valid: a number above 0")
    return float(value)


def _by_number(document: Mapping, expression: str, path: Path) -> dict[int, float]:
    found = {
        int(match[1]): _number(value, f"{path}: {key}", positive=True)
        for key, value in document.items()
        if (match := re.match(expression, key))
    }
    if not found:
        raise DescriptionError(f"{path}: no key like {expression!r}; valid: profile it first")
    return dict(sorted(found.items()))


def _degrees(mapping: object, where: str) -> dict[int, float]:
    if not isinstance(mapping, Mapping) or not mapping:
        raise DescriptionError(f"{where}: {mapping!r}; valid: numbers by degree")
    return {int(key): _number(value, f"{where}[{key}]") for key, value in mapping.items()}


def _end(mapping: Mapping, path: Path) -> EndMemory:
    return EndMemory(
        state_mb=_degrees(_get(mapping, "model_states", path), f"{path}: model_states"),
        activation_mb=_degrees(_get(mapping, "activation", path), f"{path}: activation"),
    )


def _collective(document: Mapping, name: str, path: Path) -> dict[int, dict[int, float]]:
    found: dict[int, dict[int, float]] = {}
    for key, value in document.items():
        match = re.fullmatch(rf"{name}_size_(\d+)_(\d+)MB_time", key)
        if match:
            found.setdefault(int(match[1]), {})[int(match[2])] = _number(value, f"{path}: {key}")
    if not found:
        raise DescriptionError(f"{path}: no {name} times; valid: keys like {name}_size_8_64MB_time")
    return {ranks: dict(sorted(times.items())) for ranks, times in found.items()}


# ---- strategy files
# ------------------------------------------------------------------------------------------------

_CONFIG_KEYS = ("pp_deg", "tp_sizes_enc", "dp_types_enc", "checkpoint", "global_bsz", "chunks", "pp_division")


def read_galvatron_config(path: Path | str, world_size: int) -> Plan:
    """Reads a ``galvatron_config_*.json`` as a plan.

    Tensor parallelism without ``use_sp`` is read as Megatron's with sequence parallelism, as
    Hetu-Galvatron runs it; ``use_sp`` is Ulysses. ``dp_types_enc`` 1 is ZeRO 3, 0 is ``default_dp_type``.

    Args:
        path: the file.
        world_size: devices, which the file does not say.

    Raises:
        PlanError: the file is malformed, or no plan (a batch that its degrees do not divide).
    """
    path = Path(path)
    try:
        document = _load(path)
    except DescriptionError as error:
        raise PlanError(str(error)) from error
    for key in _CONFIG_KEYS:
        if key not in document:
            raise PlanError(f"{path}: no {key!r}; {did_you_mean(key, document)}")
    default = {"ddp": 0, "zero2": 2, "zero3": 3}.get(str(document.get("default_dp_type", "ddp")))
    if default is None:
        raise PlanError(f"{path}: default_dp_type {document['default_dp_type']!r}; valid: ddp, zero2, zero3")
    pp = _whole(document["pp_deg"], path, "pp_deg")
    if world_size % pp:
        raise PlanError(f"{path}: pp_deg {pp} does not divide {world_size} devices")
    ranks = world_size // pp
    tps = _list(document["tp_sizes_enc"], path, "tp_sizes_enc")
    columns = {"tp_sizes_enc": tps}
    for key, missing in (("dp_types_enc", 0), ("use_sp", 0), ("checkpoint", 0), ("cp_sizes_enc", 1)):
        columns[key] = _list(document[key], path, key) if key in document else [missing] * len(tps)
        if len(columns[key]) != len(tps):
            raise PlanError(f"{path}: {key} has {len(columns[key])} entries; valid: {len(tps)}, one a layer")

    def strategy(tp: int, cp: int, zero: int, ulysses: int, checkpoint: int, where: str) -> Strategy:
        if tp < 1 or cp < 1 or ranks % (tp * cp):
            raise PlanError(f"{path}: {where}: tp {tp} x cp {cp} does not divide the {ranks} ranks of a stage")
        kind = SequenceParallel.ULYSSES if ulysses else SequenceParallel.MEGATRON
        return Strategy(
            tp=tp,
            sequence_parallel=kind if tp > 1 else SequenceParallel.NONE,
            cp=cp,
            dp=ranks // tp // cp,
            zero=zero,
            recompute=Recompute.FULL if checkpoint else Recompute.NONE,
        )

    layers = [
        LayerPlan(
            kind=LayerKind.BLOCK,
            strategy=strategy(tp, cp, 3 if sharded else default, ulysses, checkpoint, f"layer {index}"),
        )
        for index, (tp, sharded, ulysses, checkpoint, cp) in enumerate(zip(*columns.values(), strict=True))
    ]
    sharded = document.get("embed_sdp", document.get("vocab_sdp", 0))
    vtp = _whole(document.get("vtp", 1), path, "vtp")
    vcp = _whole(document.get("vcp", 1), path, "vcp")
    base = strategy(vtp, vcp, 3 if sharded else default, int(document.get("vsp", 0)), 0, "vocabulary")
    counts = _list(document["pp_division"], path, "pp_division")
    if sum(counts) != len(layers) or len(counts) != pp or min(counts) < 1:
        raise PlanError(f"{path}: pp_division {counts} does not share out {len(layers)} layers to {pp} stages")
    micro_batches = _whole(document["chunks"], path, "chunks")
    batch = _whole(document["global_bsz"], path, "global_bsz")
    if batch % (micro_batches * base.dp):
        raise PlanError(
            f"{path}: global_bsz {batch} is not a multiple of chunks {micro_batches} x vocabulary dp "
            f"{base.dp}; "
            f"valid: {micro_batches * base.dp * max(1, batch // (micro_batches * base.dp))}"
        )
    rest = iter(layers)
    return Plan(
        pp=pp,
        micro_batch_size=batch // micro_batches // base.dp,
        micro_batches=micro_batches,
        base=base,
        stages=tuple(StagePlan(layers=tuple(next(rest) for _ in range(count))) for count in counts),
    )


def galvatron_config(plan: Plan, *, sharded_vocabulary_key: str = "embed_sdp") -> dict[str, object]:
    """A plan as the content of a ``galvatron_config_*.json``.

    Args:
        plan: the plan.
        sharded_vocabulary_key: ``embed_sdp`` (v2.4) or ``vocab_sdp`` (main branch).

    Raises:
        PlanError: Hetu-Galvatron has no word for something in the plan.
    """
    if plan.virtual_stages > 1:
        raise PlanError("plan.virtual_stages: Hetu-Galvatron has no interleaving; valid: 1")
    every = [*(layer.strategy for layer in plan.layers), plan.base]
    for strategy in every:
        if strategy.recompute is Recompute.SELECTIVE:
            raise PlanError("plan recompute: Hetu-Galvatron has no selective recomputation; valid: none, full")
        if strategy.tp > 1 and strategy.sequence_parallel is SequenceParallel.NONE:
            raise PlanError(
                "plan sequence_parallel: Hetu-Galvatron splits the sequence; valid: megatron, ulysses"
            )
    rest = {strategy.zero for strategy in every} - {3}
    if len(rest) > 1 or rest - {0, 2}:
        raise PlanError(
            f"plan zero: {sorted(rest)} beside 3; Hetu-Galvatron has one of them; valid: only 0 or only 2"
        )
    layers = [layer.strategy for layer in plan.layers]

    def joined(values) -> str:
        return ",".join(str(int(value)) for value in values)

    found: dict[str, object] = {
        "pp_deg": plan.pp,
        "tp_sizes_enc": joined(s.tp for s in layers),
        "tp_consecutive_flags": joined(1 for _ in layers),
        "dp_types_enc": joined(s.zero == 3 for s in layers),
        "use_sp": joined(s.sequence_parallel is SequenceParallel.ULYSSES for s in layers),
        "checkpoint": joined(s.recompute is Recompute.FULL for s in layers),
        "global_bsz": plan.global_batch_size,
        "chunks": plan.micro_batches,
        "pp_division": joined(len(stage.layers) for stage in plan.stages),
        "pipeline_type": "pipedream_flush",
        "default_dp_type": "ddp" if rest == {0} else "zero2",
        "vtp": plan.base.tp,
        "vsp": int(plan.base.sequence_parallel is SequenceParallel.ULYSSES),
        sharded_vocabulary_key: int(plan.base.zero == 3),
    }
    if any(strategy.cp > 1 for strategy in every):
        found["cp_sizes_enc"] = joined(s.cp for s in layers)
        found["vcp"] = plan.base.cp
    return found


def write_galvatron_config(plan: Plan, path: Path | str, *, sharded_vocabulary_key: str = "embed_sdp") -> None:
    """Writes a plan as a ``galvatron_config_*.json``, atomically.

    Raises:
        PlanError: see :func:`galvatron_config`, or the file cannot be written.
    """
    content = galvatron_config(plan, sharded_vocabulary_key=sharded_vocabulary_key)
    write_document(json.dumps(content, indent=4) + "\n", path)


def _whole(value: object, path: Path, key: str) -> int:
    if type(value) is not int or value < 1:
        raise PlanError(f"{path}: {key} {value!r}; valid: an integer >= 1")
    return value


def _list(value: object, path: Path, key: str) -> list[int]:
    try:
        return [int(part) for part in str(value).split(",")]
    except ValueError as error:
        raise PlanError(f"{path}: {key} {value!r}; valid: integers joined by commas") from error
