"""The tables in Hetu-Galvatron's profiles of a machine and a model.

Spellings of v2.4 and of the main branch are understood: layer tables with or without a level for the
sequence length (``layertype_0`` and ``layertype_0_sp``).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galvatron_megatron.describe.galvatron_files import (
    HARDWARE,
    MODEL,
    GalvatronFiles,
    machine_files,
    read_galvatron_directory,
)
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


def check_tables(files: GalvatronFiles) -> None:
    """Makes sure that what is here can be used: every table of every machine size and sequence length.

    Raises:
        DescriptionError: the files of a machine or of a model are partial, or an entry is damaged.
    """
    lacks_hardware, lacks_model = files.lacks(HARDWARE), files.lacks(MODEL)
    for what, lacks, patterns in (("machine", lacks_hardware, HARDWARE), ("model", lacks_model, MODEL)):
        if lacks and len(lacks) < len(patterns):
            raise DescriptionError(
                f"{files.where}: profile of a {what} is partial, no {', '.join(lacks)}; valid: "
                f"{', '.join(patterns)}, from several directories if need be"
            )
    if not lacks_hardware:
        for nodes, devices in files.machines():
            machine_tables(files, nodes * devices, nodes)
    if not lacks_model:
        for model in files.models:
            one = files.of_model(model)
            if one.lacks(MODEL):
                raise DescriptionError(
                    f"{files.where}: profile of model {model} is partial, no {one.lacks(MODEL)[0]} of it; "
                    f"valid: {', '.join(MODEL)} of the same name"
                )
            # Without any, the error says so.
            for seq_length in one.seq_lengths() or [0]:
                model_tables(one, seq_length)


def read_galvatron_profile(directory: Path | str, *, seq_length: int, world_size: int) -> GalvatronProfile:
    """Reads a directory of profile files; see :func:`galvatron_profile`."""
    return galvatron_profile(read_galvatron_directory(directory), seq_length=seq_length, world_size=world_size)


def galvatron_profile(
    files: GalvatronFiles, *, seq_length: int, world_size: int, nodes: int | None = None
) -> GalvatronProfile:
    """The tables for one sequence length and machine size.

    Args:
        files: ``computation_profiling_*.json``, ``memory_profiling_*.json``, ``allreduce_bandwidth_*.json``,
            ``p2p_bandwidth_*.json``, ``sp_time_*.json`` and ``overlap_coefficient.json``.
        seq_length: tokens of a sample; must be one that was profiled.
        world_size: devices; selects the bandwidth files.
        nodes: over which the devices are spread; needed where files differ in nothing else.

    Raises:
        DescriptionError: a file or an entry is missing, a number is NaN, negative or no number, or there are
            several models to choose from.
    """
    if lacks := files.lacks(HARDWARE + MODEL):
        raise DescriptionError(
            f"{files.where}: no {', '.join(lacks)}; valid: profiles of a machine and of a model, "
            "together or by one --galvatron-profile each"
        )
    if len(files.models) > 1:
        raise DescriptionError(
            f"{files.where}: holds several models ({', '.join(files.models)}); valid: galvatron "
            "profile import, and --galvatron-profile with the fingerprint of one"
        )
    model = model_tables(files, seq_length)
    return GalvatronProfile(
        seq_length=seq_length, world_size=world_size, **model, **machine_tables(files, world_size, nodes)
    )


def model_tables(files: GalvatronFiles, seq_length: int) -> dict[str, Any]:
    """The fields of a :class:`GalvatronProfile` that describe a model, of files that have one.

    Raises:
        DescriptionError: an entry is missing or damaged.
    """
    (times_name, *_), (memory_name, *_) = files.names(MODEL[0]), files.names(MODEL[1])
    times, memory = files.documents[times_name], files.documents[memory_name]
    times_file, memory_file = (f"{files.where}/{name}" for name in (times_name, memory_name))
    if any(key.startswith("layertype_1_") for key in times):
        raise DescriptionError(f"{times_file}: has layertype_1; valid: a model with one kind of layer")
    if seq_length not in files.seq_lengths():
        valid = ", ".join(map(str, files.seq_lengths())) or "none, profile it first"
        raise DescriptionError(f"{times_file}: no key like layertype_0_bsz*_seq{seq_length}; valid: {valid}")
    suffix = "_sp" if "layertype_0_sp" in memory else ""

    def table(name: str) -> Mapping:
        found = memory.get(name + suffix)
        if not isinstance(found, dict):
            raise DescriptionError(
                f"{memory_file}: no {name + suffix!r}; {did_you_mean(name + suffix, memory)}"
            )
        if "model_states" in found or "parameter_size" in found:
            return found
        if not isinstance(found.get(str(seq_length)), dict):
            raise DescriptionError(
                f"{memory_file}: {name + suffix} has no sequence length {seq_length}; valid: {', '.join(found)}"
            )
        return found[str(seq_length)]

    layer = table("layertype_0")
    where = f"{memory_file}: tp_activation_per_bsz_dict"
    activation = _get(layer, "tp_activation_per_bsz_dict", memory_file)
    if not isinstance(activation, Mapping):
        raise DescriptionError(f"{where}: {activation!r}; valid: numbers by degree")
    activation = dict(activation)
    checkpoint = _number(activation.pop("checkpoint", None), f"{memory_file}: checkpoint")
    parameter = _get(layer, "parameter_size", memory_file)
    return {
        "name": times_name.removesuffix(".json"),
        "layer_ms": _by_number(times, rf"layertype_0_bsz(\d+)_seq{seq_length}$", times_file),
        "other_ms": _by_number(times, rf"layertype_other_bsz(\d+)_seq{seq_length}$", times_file),
        "parameter_mb": _number(parameter, f"{memory_file}: parameter_size", positive=True),
        "activation_mb": _degrees(activation, where),
        "checkpoint_mb": checkpoint,
        "other_alone": _end(table("other_memory_pp_off"), memory_file),
        "other_first": _end(table("other_memory_pp_on_first"), memory_file),
        "other_last": _end(table("other_memory_pp_on_last"), memory_file),
    }


def machine_tables(files: GalvatronFiles, world_size: int, nodes: int | None) -> dict[str, Any]:
    """The fields of a :class:`GalvatronProfile` that describe a machine, of files that have one.

    Raises:
        DescriptionError: an entry is missing or damaged.
    """
    reduce_name = _machine_file(files, "allreduce_bandwidth", world_size, nodes)
    send_name = _machine_file(files, "p2p_bandwidth", world_size, nodes)
    reduce_file, send_file = f"{files.where}/{reduce_name}", f"{files.where}/{send_name}"
    overlap_file = f"{files.where}/{HARDWARE[3]}"
    overlap = _get(files.documents[HARDWARE[3]], "overlap_coe", overlap_file)
    times_name = _times_file(files, world_size)
    times, times_file = files.documents[times_name], f"{files.where}/{times_name}"
    links = {
        (int(match[1]), match[2] == "1"): _number(value, f"{reduce_file}: {key}", positive=True)
        for key, value in files.documents[reduce_name].items()
        if (match := re.fullmatch(r"allreduce_size_(\d+)_consec_([01])", key))
    }
    sends = {
        int(match[1]): _number(value, f"{send_file}: {key}", positive=True)
        for key, value in files.documents[send_name].items()
        if (match := re.fullmatch(r"pp_size_(\d+)", key))
    }
    for found, file, example in (
        (links, reduce_file, "allreduce_size_2_consec_1"),
        (sends, send_file, "pp_size_2"),
    ):
        if not found and world_size > 1:
            raise DescriptionError(f"{file}: no bandwidth; valid: keys like {example}")
    return {
        "all_reduce_gb_per_second": links,
        "send_gb_per_second": sends,
        "all_reduce_ms": _collective(times, "allreduce", times_file),
        "all_to_all_ms": _collective(times, "all2all", times_file),
        "overlap_slowdown": max(1.0, _number(overlap, f"{overlap_file}: overlap_coe")),
    }


def _machine_file(files: GalvatronFiles, prefix: str, world_size: int, nodes: int | None) -> str:
    sizes = machine_files(files, prefix)
    fitting = [size for size in sizes if size[0] * size[1] == world_size]
    if len(fitting) > 1 and nodes is not None:
        fitting = [size for size in fitting if size[0] == nodes]
    if not fitting:
        valid = ", ".join(str(count) for count in sorted({a * b for a, b in sizes})) or "none"
        raise DescriptionError(f"{files.where}: no {prefix} file for {world_size} devices; valid: {valid}")
    if len(fitting) > 1:
        names = ", ".join(sizes[size] for size in sorted(fitting))
        raise DescriptionError(f"{files.where}: {names} are all of {world_size} devices; valid: one of them")
    return sizes[fitting[0]]


def _times_file(files: GalvatronFiles, world_size: int) -> str:
    """Times of collectives: of as many devices, else of the largest machine with fewer, else the smallest."""
    counts = {
        nodes * devices: name for (nodes, devices), name in sorted(machine_files(files, "sp_time").items())
    }
    smaller = [count for count in counts if count <= world_size]
    return counts[max(smaller) if smaller else min(counts)]


def _get(mapping: Mapping, key: str, path: str) -> object:
    if key not in mapping:
        raise DescriptionError(f"{path}: no {key!r}; {did_you_mean(key, map(str, mapping))}")
    return mapping[key]


def _number(value: object, where: str, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DescriptionError(f"{where}: {value!r}; valid: a finite number >= 0")
    if positive and value == 0:
        raise DescriptionError(f"{where}: 0; valid: a number above 0")
    return float(value)


def _by_number(document: Mapping, expression: str, path: str) -> dict[int, float]:
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
    for key in mapping:
        if not str(key).isdecimal():
            raise DescriptionError(f"{where}: key {key!r}; valid: degrees")
    return {int(key): _number(value, f"{where}[{key}]") for key, value in mapping.items()}


def _end(mapping: Mapping, path: str) -> EndMemory:
    return EndMemory(
        state_mb=_degrees(_get(mapping, "model_states", path), f"{path}: model_states"),
        activation_mb=_degrees(_get(mapping, "activation", path), f"{path}: activation"),
    )


def _collective(document: Mapping, name: str, path: str) -> dict[int, dict[int, float]]:
    found: dict[int, dict[int, float]] = {}
    for key, value in document.items():
        match = re.fullmatch(rf"{name}_size_(\d+)_(\d+)MB_time", key)
        if match:
            found.setdefault(int(match[1]), {})[int(match[2])] = _number(value, f"{path}: {key}")
    if not found:
        raise DescriptionError(f"{path}: no {name} times; valid: keys like {name}_size_8_64MB_time")
    return {ranks: dict(sorted(times.items())) for ranks, times in found.items()}
