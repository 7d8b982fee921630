"""Plans that training jobs keep beside the profiles they were priced with."""

import json
from pathlib import Path

from galvatron_megatron.errors import DescriptionError


def forget_plans(directory: Path, profile_fingerprint: str) -> list[Path]:
    """Removes kept plans that were priced with a profile, so that the next job searches with its new numbers.

    Args:
        directory: the profile directory.
        profile_fingerprint: of the profile whose numbers changed.

    Returns:
        The files removed; what is no kept plan, or a damaged one, is left alone.

    Raises:
        DescriptionError: a kept plan cannot be removed; the next job would go on with it.
    """
    removed = []
    for path in sorted(directory.glob("plan-*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            priced_with = document["decision"]["plan"]["fingerprints"]["profile"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if priced_with == profile_fingerprint:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise DescriptionError(
                    f"kept plan {path}: cannot be removed ({error.strerror}), and was priced with the old "
                    "numbers; valid: a writable profile directory, or --galvatron-again"
                ) from None
            removed.append(path)
    return removed
