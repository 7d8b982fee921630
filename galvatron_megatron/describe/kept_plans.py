"""Plans that training jobs keep beside the profiles they were priced with."""

import json
from pathlib import Path


def forget_plans(directory: Path, profile_fingerprint: str) -> list[Path]:
    """Removes kept plans that were priced with a profile, so that the next job searches with its new numbers.

    Args:
        directory: the profile directory.
        profile_fingerprint: of the profile whose numbers changed.

    Returns:
        The files removed; what is no kept plan, or a damaged one, is left alone.
    """
    removed = []
    for path in sorted(directory.glob("plan-*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            priced_with = document["decision"]["plan"]["fingerprints"]["profile"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if priced_with == profile_fingerprint:
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed
