"""Reads the plan that a command line names: ours, or a strategy file of Hetu-Galvatron."""

import json
from pathlib import Path

from galvatron_megatron.describe.galvatron_config import read_galvatron_config
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.serialization import read_plan


def read_plan_file(path: Path | str, world_size: int | None) -> Plan:
    """Reads a plan.

    Args:
        path: a plan file (.yaml, .json) or a ``galvatron_config_*.json``.
        world_size: devices, which a ``galvatron_config_*.json`` does not say; None where unknown.

    Raises:
        PlanError: the file is no plan, or the number of devices is needed and unknown.
    """
    if not is_galvatron_config(Path(path)):
        return read_plan(path)
    if world_size is None:
        raise PlanError(f"{path}: a strategy file of Hetu-Galvatron; valid: --devices N beside it")
    return read_galvatron_config(path, world_size)


def is_galvatron_config(path: Path) -> bool:
    """True for a JSON object with Hetu-Galvatron's first key; what cannot be read is for the reader to name."""
    if path.suffix != ".json":
        return False
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "tp_sizes_enc" in document
