"""Plans as YAML and JSON documents, exact in both directions.

A document holds the fields of ``Plan``; a stage is a list of runs of equal layers::

    schema_version: 1
    pp: 2
    micro_batch_size: 1
    micro_batches: 8
    base: {tp: 2, dp: 2, sequence_parallel: megatron, zero: 1}
    stages:
    - - {count: 12, kind: block, tp: 2, dp: 2, sequence_parallel: megatron, zero: 1}
    - - {count: 12, kind: block, tp: 2, dp: 2, sequence_parallel: megatron, zero: 1}

A field that has its default may be left out.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from enum import StrEnum
from itertools import groupby
from pathlib import Path

import yaml

from galvatron_megatron.errors import PlanError, did_you_mean
from galvatron_megatron.plan.checks import MOST_LAYERS, shown
from galvatron_megatron.plan.document import check_keys, read_document, write_document
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import SCHEMA_VERSION, Fingerprints, LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy

_STRATEGY_FIELDS = tuple(entry.name for entry in fields(Strategy))
_STRATEGY_KINDS: dict[str, type[StrEnum]] = {
    "sequence_parallel": SequenceParallel,
    "recompute": Recompute,
    "offload": Offload,
}
_SELDOM = {"expert_parallel": 1, "expert_tensor_parallel": None, "offload": Offload.NONE}
"""Fields that are written only where they differ from their default: most models have no experts, and most
plans need no host memory."""
_FINGERPRINT_FIELDS = tuple(entry.name for entry in fields(Fingerprints))
_REQUIRED = ("schema_version", "pp", "micro_batch_size", "micro_batches", "base", "stages")
_OPTIONAL = ("virtual_stages", "fingerprints")


def plan_to_dict(plan: Plan) -> dict[str, object]:
    """A plan as mappings, lists, strings and integers; ``plan_from_dict`` gives the equal plan back."""
    return {
        "schema_version": plan.schema_version,
        "pp": plan.pp,
        "virtual_stages": plan.virtual_stages,
        "micro_batch_size": plan.micro_batch_size,
        "micro_batches": plan.micro_batches,
        "base": _strategy_to_dict(plan.base),
        "stages": [
            [
                {"count": len(list(run)), "kind": layer.kind.value, **_strategy_to_dict(layer.strategy)}
                for layer, run in groupby(stage.layers)
            ]
            for stage in plan.stages
        ],
        "fingerprints": asdict(plan.fingerprints),
    }


def plan_from_dict(document: object, where: str = "plan") -> Plan:
    """The plan that a document describes.

    Args:
        document: as made by ``plan_to_dict``, or read from a file.
        where: what to call the document in messages, usually its file.

    Raises:
        PlanError: names the document, the field, its value and what would be valid.
    """
    # The version is looked at first: another version may well have other keys.
    version = (
        document.get("schema_version", SCHEMA_VERSION) if isinstance(document, Mapping) else SCHEMA_VERSION
    )
    if type(version) is not int or version != SCHEMA_VERSION:
        raise PlanError(
            f"{where}.schema_version: {shown(version)} is not readable here; valid: {SCHEMA_VERSION}"
        )
    mapping = check_keys(document, where, required=_REQUIRED, optional=_OPTIONAL)
    stages = mapping["stages"]
    if not isinstance(stages, list):
        raise PlanError(f"{where}.stages: {shown(stages)}; valid: a list of stages, each a list of layers")
    budget = [MOST_LAYERS]
    stage_plans = tuple(
        _stage_from_list(stage, f"{where}.stages[{index}]", budget) for index, stage in enumerate(stages)
    )
    base_fields = check_keys(mapping["base"], f"{where}.base", optional=_STRATEGY_FIELDS)
    base = _strategy_from_dict(base_fields, f"{where}.base")
    fingerprints = _fingerprints_from_dict(mapping.get("fingerprints", {}), f"{where}.fingerprints")
    try:
        return Plan(
            pp=mapping["pp"],
            virtual_stages=mapping.get("virtual_stages", 1),
            micro_batch_size=mapping["micro_batch_size"],
            micro_batches=mapping["micro_batches"],
            base=base,
            stages=stage_plans,
            fingerprints=fingerprints,
        )
    except PlanError as error:
        raise PlanError(_placed(error, where)) from None


def plan_to_yaml(plan: Plan) -> str:
    """A plan as YAML text, one run of equal layers a line."""
    return yaml.dump(plan_to_dict(plan), Dumper=_PlanDumper, sort_keys=False, width=1000)


def plan_to_json(plan: Plan) -> str:
    """A plan as JSON text."""
    return json.dumps(plan_to_dict(plan), indent=2) + "\n"


def read_plan(path: Path | str) -> Plan:
    """Reads a plan file, or the plan in what ``galvatron search --json`` prints.

    Args:
        path: ``.yaml``, ``.yml`` or ``.json``.

    Raises:
        PlanError: the file cannot be read, or names the field that is wrong and what would be valid.
    """
    document = read_document(path)
    if "plan" in document and "predicted" in document:
        return plan_from_dict(document["plan"], where=f"{path}.plan")
    return plan_from_dict(document, where=str(path))


def write_plan(plan: Plan, path: Path | str) -> None:
    """Writes a plan file atomically, as JSON or YAML by its suffix.

    Raises:
        PlanError: another suffix, or the file cannot be written.
    """
    writers = {".json": plan_to_json, ".yaml": plan_to_yaml, ".yml": plan_to_yaml}
    suffix = Path(path).suffix
    if suffix not in writers:
        raise PlanError(f"{path}: unknown kind of file; valid: a name that ends with {', '.join(writers)}")
    write_document(writers[suffix](plan), path)


class _PlanDumper(yaml.SafeDumper):
    """Writes mappings of plain values in one line, so that a run of layers is a line."""

    def represent_dict(self, data: dict) -> yaml.Node:
        node = super().represent_dict(data)
        node.flow_style = all(isinstance(value, yaml.ScalarNode) for _, value in node.value)
        return node


_PlanDumper.add_representer(dict, _PlanDumper.represent_dict)


def _strategy_to_dict(strategy: Strategy) -> dict[str, object]:
    values = {
        name: getattr(strategy, name)
        for name in _STRATEGY_FIELDS
        if name not in _SELDOM or getattr(strategy, name) != _SELDOM[name]
    }
    return {name: value.value if isinstance(value, StrEnum) else value for name, value in values.items()}


def _strategy_from_dict(mapping: Mapping[str, object], where: str) -> Strategy:
    values: dict[str, object] = {name: mapping[name] for name in _STRATEGY_FIELDS if name in mapping}
    for name, kind in _STRATEGY_KINDS.items():
        if name in values:
            values[name] = _member(kind, values[name], f"{where}.{name}")
    try:
        return Strategy(**values)
    except PlanError as error:
        raise PlanError(_placed(error, where)) from None


def _stage_from_list(stage: object, where: str, budget: list[int]) -> StagePlan:
    """``budget`` holds how many layers the plan may still have, over all stages."""
    if not isinstance(stage, list) or not stage:
        raise PlanError(f"{where}: {shown(stage)}; valid: a list of at least one layer")
    layers: list[LayerPlan] = []
    for index, entry in enumerate(stage):
        place = f"{where}[{index}]"
        run = check_keys(entry, place, required=("kind",), optional=("count", *_STRATEGY_FIELDS))
        count = run.get("count", 1)
        if type(count) is not int or not 1 <= count <= budget[0]:
            raise PlanError(f"{place}.count: {shown(count)}; valid: an integer from 1 to {max(1, budget[0])}")
        budget[0] -= count
        kind = _member(LayerKind, run["kind"], f"{place}.kind")
        layers += [LayerPlan(kind=kind, strategy=_strategy_from_dict(run, place))] * count
    return StagePlan(layers=tuple(layers))


def _fingerprints_from_dict(document: object, where: str) -> Fingerprints:
    mapping = check_keys(document, where, optional=_FINGERPRINT_FIELDS)
    for name, value in mapping.items():
        if not isinstance(value, str):
            raise PlanError(f"{where}.{name}: {shown(value)}; valid: text in quotes, empty where unknown")
    return Fingerprints(**mapping)


def _member(kind: type[StrEnum], value: object, where: str) -> StrEnum:
    try:
        return kind(value)
    except ValueError:
        choices = [member.value for member in kind]
        raise PlanError(f"{where}: {shown(value)} is unknown; {did_you_mean(value, choices)}") from None


def _placed(error: PlanError, where: str) -> str:
    """The message of a value's own check, with the place in the document instead of the value's type."""
    message = str(error)
    for prefix in ("strategy.", "plan."):
        if message.startswith(prefix):
            return f"{where}.{message.removeprefix(prefix)}"
    return f"{where}: {message}"
