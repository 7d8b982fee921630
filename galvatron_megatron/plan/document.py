"""YAML and JSON files that people write: strict reading, atomic writing."""

import json
import os
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from galvatron_megatron.errors import GalvatronError, PlanError, did_you_mean
from galvatron_megatron.plan.checks import shown

SUFFIXES = (".yaml", ".yml", ".json")
_MOST_KEYS = 10_000


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, which YAML would let the later one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            # An unhashable key is refused by the safe loader itself.
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            # Merges of merges ("<<") can grow without bound from a few lines.
            raise yaml.constructor.ConstructorError(
                None, None, f"a mapping of {len(node.value)} keys", node.start_mark
            )


def read_document(path: Path | str, error: type[GalvatronError] = PlanError) -> dict[str, object]:
    """Reads a YAML or JSON file whose top level is a mapping.

    JSON is read as YAML where the suffix is not ``.json``.

    Args:
        path: the file; its suffix is ``.yaml``, ``.yml`` or ``.json``.
        error: what to raise.

    Raises:
        GalvatronError: of the given class; names the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise error(f"{path}: unknown kind of file; valid: a name that ends with {', '.join(SUFFIXES)}")
    try:
        # Some editors put a byte order mark in front.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); valid: a readable file") from None
    except UnicodeDecodeError:
        raise error(f"{path}: is not text; valid: YAML or JSON in UTF-8") from None
    except ValueError as cause:
        raise error(f"{str(path)!r}: cannot be a file ({cause}); valid: a readable file") from None
    try:
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=_mapping_without_duplicates)
        else:
            content = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as cause:
        mark = cause.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = " ".join(f"{cause.problem or cause}".split())
        raise error(f"{path}: is not YAML{place}: {problem}; valid: well-formed YAML, every key once") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as cause:
        # PyYAML lets such errors out of values with a tag that does not fit them, e.g. "!!timestamp x".
        kind = "JSON" if path.suffix == ".json" else "YAML"
        problem = " ".join(str(cause).split())
        if isinstance(cause, LookupError | TypeError | AttributeError):
            problem = "a value does not fit its tag"
        raise error(f"{path}: is not {kind}: {problem}; valid: well-formed {kind}, every key once") from None
    if content is None:
        raise error(f"{path}: is empty; valid: a mapping at the top level")
    if not isinstance(content, dict):
        raise error(f"{path}: holds a {type(content).__name__}; valid: a mapping at the top level")
    return content


def _mapping_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return mapping


def check_keys(
    mapping: object,
    where: str,
    *,
    required: Collection[str] = (),
    optional: Collection[str] = (),
    error: type[GalvatronError] = PlanError,
) -> Mapping[str, object]:
    """Makes sure that a value is a mapping with the right keys.

    Args:
        mapping: what was read.
        where: file and place inside it, for the message.
        required: keys that must be there.
        optional: keys that may be there.
        error: what to raise.

    Returns:
        The mapping.

    Raises:
        GalvatronError: of the given class, for an unknown or missing key, or a value that is no mapping.
    """
    if not isinstance(mapping, Mapping):
        raise error(f"{where}: {shown(mapping)}; valid: a mapping with {', '.join(required) or 'known keys'}")
    known = {*required, *optional}
    for key in mapping:
        if key not in known:
            raise error(f"{where}: unknown key {shown(key)}; {did_you_mean(key, known)}")
    for key in required:
        if key not in mapping:
            raise error(f"{where}.{key}: missing; valid: {', '.join(required)} all given")
    return mapping


def check_target(
    path: Path, where: str, error: type[GalvatronError] = PlanError, *, suffixes: Collection[str] = ()
) -> None:
    """Refuses a file that ``write_document`` could not write, before work is done for its content.

    Args:
        path: the file, which need not exist.
        where: the flag that names it, for the message.
        error: what to raise.
        suffixes: what its name must end with; anything where empty.

    Raises:
        GalvatronError: of the given class; names the flag, the file and what is wrong.
    """
    if suffixes and path.suffix not in suffixes:
        raise error(f"{where} {path}: unknown kind of file; valid: a name that ends with {', '.join(suffixes)}")
    try:
        if not path.parent.is_dir():
            problem = f"directory {path.parent} does not exist"
        elif path.is_dir():
            problem = "is a directory"
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            problem = f"directory {path.parent} is not writable"
        else:
            return
    except OSError as cause:
        # A name that is too long, or a directory above that may not be looked into.
        problem = f"cannot be written ({cause.strerror})"
    raise error(f"{where} {path}: {problem}; valid: a file in a writable directory")


def write_document(text: str, path: Path | str, error: type[GalvatronError] = PlanError) -> None:
    """Writes a text file so that a reader sees the old content or the new, never a part.

    Raises:
        GalvatronError: of the given class, where the file cannot be written; the old one is untouched.
    """
    path = Path(path)
    # Not from tempfile, whose files only their owner may read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as cause:
        raise error(
            f"{path}: cannot be written ({cause.strerror}); valid: a writable directory with free space"
        ) from None
    finally:
        # Gone already where all went well; what could not be made cannot be removed either.
        with suppress(OSError):
            temporary.unlink()
