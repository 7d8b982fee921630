"""Hetu-Galvatron's profiles of hardware and model (JSON files), read.

Spellings of v2.4 and of the main branch are understood: layer tables with or without a level for the
sequence length (``layertype_0`` and ``layertype_0_sp``).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from galvatron_megatron.errors import DescriptionError, did_you_mean


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
    links, sends = read_object(reduce_file), read_object(send_file)
    sp_times, sp_file = _find(directory, "sp_time_*.json", "allreduce_size_\\d+_\\d+MB_time$")
    overlap_file = directory / "overlap_coefficient.json"
    overlap = _number(
        _get(read_object(overlap_file), "overlap_coe", overlap_file), f"{overlap_file}: overlap_coe"
    )
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


def read_object(path: Path) -> dict:
    """Reads a JSON file that holds an object.

    Raises:
        DescriptionError: it cannot be read, is not JSON, or holds something else.
    """
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
        document = read_object(path)
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
