"""Hetu-Galvatron's strategy files (``galvatron_config_*.json``), read and written.

Version 2.4 calls the sharding of the vocabulary ``embed_sdp``. The search of the main branch writes that name
too, its runtime reads ``vocab_sdp``: both are read, and both are written.
"""

import json
from pathlib import Path

from galvatron_megatron.describe.galvatron_files import read_object
from galvatron_megatron.errors import DescriptionError, PlanError, did_you_mean
from galvatron_megatron.plan.document import write_document
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy

_VOCABULARY_SHARDED = ("embed_sdp", "vocab_sdp")

_REQUIRED = ("pp_deg", "tp_sizes_enc", "dp_types_enc", "global_bsz", "chunks")


def read_galvatron_config(path: Path | str, world_size: int) -> Plan:
    """Reads a ``galvatron_config_*.json`` as a plan.

    Tensor parallelism without ``use_sp`` is read as Megatron's with sequence parallelism, as
    Hetu-Galvatron runs it; ``use_sp`` is Ulysses. ``dp_types_enc`` 1 is ZeRO 3, 0 is ``default_dp_type``.

    Without ``pp_division`` the stages are equal and the last takes the rest, as in its runtime.

    Args:
        path: the file.
        world_size: devices, which the file does not say.

    Raises:
        PlanError: the file is malformed, no plan (a batch that its degrees do not divide), or asks for what
            a plan has no word for (strided tensor-parallel groups, expert parallelism).
    """
    path = Path(path)
    try:
        document = read_object(path)
    except DescriptionError as error:
        raise PlanError(str(error)) from error
    for key in _REQUIRED:
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
        columns[key] = _column(document, key, missing, len(tps), path)
    _refuse_without_words(document, tps, path)

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
    sharded = _vocabulary_sharded(document, path)
    vtp = _whole(document.get("vtp", 1), path, "vtp")
    vcp = _whole(document.get("vcp", 1), path, "vcp")
    base = strategy(vtp, vcp, 3 if sharded else default, int(document.get("vsp", 0)), 0, "vocabulary")
    even = [len(layers) // pp] * (pp - 1) + [len(layers) - len(layers) // pp * (pp - 1)]
    counts = _list(document["pp_division"], path, "pp_division") if "pp_division" in document else even
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


def galvatron_config(plan: Plan) -> dict[str, object]:
    """A plan as the content of a ``galvatron_config_*.json``.

    Raises:
        PlanError: Hetu-Galvatron has no word for something in the plan.
    """
    if plan.virtual_stages > 1:
        raise PlanError("plan.virtual_stages: Hetu-Galvatron has no interleaving; valid: 1")
    every = [*(layer.strategy for layer in plan.layers), plan.base]
    for strategy in every:
        if strategy.offload is not Offload.NONE:
            raise PlanError("plan offload: Hetu-Galvatron keeps everything on the device; valid: none")
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
        **dict.fromkeys(_VOCABULARY_SHARDED, int(plan.base.zero == 3)),
    }
    if any(strategy.cp > 1 for strategy in every):
        found["cp_sizes_enc"] = joined(s.cp for s in layers)
        found["vcp"] = plan.base.cp
    return found


def write_galvatron_config(plan: Plan, path: Path | str) -> None:
    """Writes a plan as a ``galvatron_config_*.json``, atomically.

    Raises:
        PlanError: see :func:`galvatron_config`, or the file cannot be written.
    """
    write_document(json.dumps(galvatron_config(plan), indent=4) + "\n", path)


def _column(document: dict, key: str, missing: int, layers: int, path: Path) -> list[int]:
    """One number a layer; ``missing`` for all where the file has no such key."""
    found = _list(document[key], path, key) if key in document else [missing] * layers
    if len(found) != layers:
        raise PlanError(f"{path}: {key} has {len(found)} entries; valid: {layers}, one a layer")
    return found


def _refuse_without_words(document: dict, tps: list[int], path: Path) -> None:
    """Names what the file asks for and a plan cannot say, instead of dropping it."""
    consecutive = _column(document, "tp_consecutive_flags", 1, len(tps), path)
    for index, (tp, flag) in enumerate(zip(tps, consecutive, strict=True)):
        if tp > 1 and flag != 1:
            raise PlanError(
                f"{path}: layer {index}: tp_consecutive_flags {flag}; valid: 1, tp groups of consecutive ranks"
            )
    for key in ("ep_sizes_enc", "tp_of_ep_sizes_enc"):
        if set(_column(document, key, 1, len(tps), path)) != {1}:
            raise PlanError(f"{path}: {key} {document[key]!r}; valid: 1 for every layer, no expert parallelism")


def _vocabulary_sharded(document: dict, path: Path) -> bool:
    """Whether embedding and head run under ZeRO 3, in either spelling."""
    found = {key: document[key] for key in _VOCABULARY_SHARDED if key in document}
    if len(set(found.values())) > 1:
        raise PlanError(f"{path}: {found} contradict each other; valid: the same value, or one of them")
    return bool(next(iter(found.values()), 0))


def _whole(value: object, path: Path, key: str) -> int:
    if type(value) is not int or value < 1:
        raise PlanError(f"{path}: {key} {value!r}; valid: an integer >= 1")
    return value


def _list(value: object, path: Path, key: str) -> list[int]:
    try:
        return [int(part) for part in str(value).split(",")]
    except ValueError as error:
        raise PlanError(f"{path}: {key} {value!r}; valid: integers joined by commas") from error
