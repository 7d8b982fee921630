"""The descriptions that come with the package, by name: ``llama2-7b``, ``a100-80g``."""

from pathlib import Path

import galvatron_megatron
from galvatron_megatron.errors import DescriptionError, did_you_mean


def shipped_directory(kind: str) -> Path:
    """Directory of the shipped ``models``, ``clusters`` or ``plans``.

    An installed package holds them inside; in a checkout they lie beside the package.
    """
    package = Path(galvatron_megatron.__file__).parent
    inside = package / "configs" / kind
    return inside if inside.is_dir() else package.parent / "configs" / kind


def find_description(kind: str, path: Path | str) -> Path:
    """Finds a description by path, or by the name of a shipped one.

    Args:
        kind: ``models``, ``clusters`` or ``plans``.
        path: a path, or a bare name without directory and suffix.

    Returns:
        The path as it is where it exists or is no bare name; else that of the shipped file.

    Raises:
        DescriptionError: a bare name that is neither a file here nor shipped; names the nearest one.
    """
    path = Path(path)
    if path.exists() or path.name != str(path) or path.suffix in (".yaml", ".yml", ".json"):
        return path
    names = {file.stem: file for file in shipped_directory(kind).glob("*.yaml")}
    if str(path) not in names:
        raise DescriptionError(
            f"{kind.removesuffix('s')} {str(path)!r}: no such file, and none shipped under that name; "
            f"{did_you_mean(str(path), names)}"
        )
    return names[str(path)]
