"""Optional acceleration packages: found, missing, or an unrelated package of the same name."""

from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from galvatron_megatron.errors import GalvatronError

WRONG_APEX = (
    "package apex: the one installed is not NVIDIA Apex (PyPI's apex is unrelated), and Megatron takes it for "
    "NVIDIA's; valid: pip uninstall apex, or NVIDIA's from https://github.com/NVIDIA/apex"
)


def apex_kind() -> str:
    """Which package called apex is installed.

    NVIDIA's has the fused Adam optimizer; nothing is imported to find out, since the other one runs code that
    may fail.

    Returns:
        ``"nvidia"``, ``"other"`` or ``"none"``.
    """
    if find_spec("amp_C") is not None:
        return "nvidia"
    spec = find_spec("apex")
    if spec is None:
        return "none"
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    return "nvidia" if any((place / "optimizers" / "fused_adam.py").is_file() for place in places) else "other"


def transformer_engine_version() -> str | None:
    """Version of Transformer Engine, or None where it is not installed."""
    if find_spec("transformer_engine") is None:
        return None
    for name in ("transformer-engine", "transformer_engine"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def check_dependencies(args: Namespace) -> str:
    """Makes sure that the job's modules can be built with what is installed.

    Args:
        args: Megatron's parsed arguments.

    Returns:
        A warning to show, or "".

    Raises:
        GalvatronError: the job needs a package that is missing or is another one of the same name.
    """
    is_local = args.transformer_impl == "local"
    if not is_local and transformer_engine_version() is None:
        raise GalvatronError(
            f"--transformer-impl {args.transformer_impl}: Transformer Engine is not installed; "
            "valid: --transformer-impl local, or install transformer-engine"
        )
    if apex_kind() != "other":
        return ""
    if is_local:
        # Megatron's local layers take their norms from whatever is called apex.
        raise GalvatronError(WRONG_APEX)
    return WRONG_APEX
