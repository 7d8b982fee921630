"""The files of Hetu-Galvatron's profilers: found in directories, put together, taken apart by model."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from galvatron_megatron.errors import DescriptionError

_LAYER_TIME = r"layertype_0_bsz\d+_seq(\d+)"

HARDWARE = ("allreduce_bandwidth_*.json", "p2p_bandwidth_*.json", "sp_time_*.json", "overlap_coefficient.json")
"""Files that describe a machine."""
MODEL = ("computation_profiling_*.json", "memory_profiling_*.json")
"""Files that describe a model on it."""


@dataclass(kw_only=True, frozen=True, slots=True)
class GalvatronFiles:
    """What Hetu-Galvatron's profilers wrote: of a machine, of a model, or of both.

    Their tree keeps machines (``profile_hardware/hardware_configs``) and models (``models/*/configs``) apart.
    """

    where: str
    """Directory or other source, for errors."""
    documents: dict[str, dict]
    """Content by file name."""

    def names(self, pattern: str) -> list[str]:
        """File names of a pattern, sorted."""
        return sorted(name for name in self.documents if fnmatchcase(name, pattern))

    def lacks(self, patterns: Sequence[str]) -> list[str]:
        """Patterns without a file."""
        return [pattern for pattern in patterns if not self.names(pattern)]

    @property
    def models(self) -> list[str]:
        """The models that are described, as precision and name of their files (``bf16_llama2-7b_all``)."""
        return sorted({_model_name(name) for name in self.documents if _is_model(name)})

    def of_model(self, model: str | None) -> "GalvatronFiles":
        """The machine's files with those of one model, or with none."""
        kept = {name: doc for name, doc in self.documents.items() if not _is_model(name)}
        kept |= {
            name: doc for name, doc in self.documents.items() if _is_model(name) and _model_name(name) == model
        }
        return replace(self, documents=kept)

    def merged(self, other: "GalvatronFiles") -> "GalvatronFiles":
        """The files of both.

        Raises:
            DescriptionError: both have a file of the same name with other content.
        """
        for name, document in other.documents.items():
            if self.documents.get(name, document) != document:
                raise DescriptionError(
                    f"{name}: {self.where} and {other.where} differ in it; valid: profiles of one machine"
                )
        return GalvatronFiles(
            where=f"{self.where} and {other.where}", documents={**self.documents, **other.documents}
        )

    def machines(self) -> list[tuple[int, int]]:
        """(nodes, devices of a node) for which bandwidths are there."""
        return sorted(machine_files(self, "allreduce_bandwidth"))

    def seq_lengths(self) -> list[int]:
        """Sequence lengths for which layers were timed."""
        keys = (key for name in self.names(MODEL[0]) for key in self.documents[name])
        return sorted({int(match[1]) for key in keys if (match := re.fullmatch(_LAYER_TIME, key))})


def read_galvatron_directory(directory: Path | str) -> GalvatronFiles:
    """Reads the profile files of a directory; those without tables (raw measurements) are left out.

    Raises:
        DescriptionError: no directory, a file cannot be read or is no JSON, or there is nothing of use.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DescriptionError(f"{directory}: no such directory; valid: a directory of Hetu-Galvatron profiles")
    documents, raw = {}, []
    for path in sorted(path for pattern in (*HARDWARE, *MODEL) for path in directory.glob(pattern)):
        document = read_object(path)
        if _is_model(path.name) and not any(key.startswith("layertype_") for key in document):
            raw.append(path.name)
            continue
        documents[path.name] = document
    if not documents:
        depths = ("*", "*/*", "*/*/*", "*/*/*/*")
        patterns = [f"{depth}/{pattern}" for depth in depths for pattern in (*HARDWARE, *MODEL)]
        near = sorted({str(path.parent) for pattern in patterns for path in directory.glob(pattern)})
        found = f"only raw measurements ({', '.join(raw)})" if raw else "no profile of Hetu-Galvatron"
        valid = (
            f"below it: {', '.join(near[:4])}" if near else f"a directory with {', '.join(HARDWARE + MODEL)}"
        )
        raise DescriptionError(f"{directory}: {found}; valid: {valid}")
    return GalvatronFiles(where=str(directory), documents=documents)


def read_object(path: Path) -> dict:
    """Reads a JSON file that holds an object.

    Raises:
        DescriptionError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DescriptionError(f"{path}: cannot be read ({error.strerror}); valid: a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise DescriptionError(f"{path}: is not JSON ({error}); valid: a JSON object") from error
    if not isinstance(document, dict):
        raise DescriptionError(f"{path}: holds {type(document).__name__}; valid: a JSON object")
    return document


def machine_files(files: GalvatronFiles, prefix: str) -> dict[tuple[int, int], str]:
    """File names of a kind by (nodes, devices of a node)."""
    found = {}
    for name in files.names(f"{prefix}_*.json"):
        match = re.fullmatch(rf"{prefix}_(\d+)nodes_(\d+)gpus_per_node\.json", name)
        if match is None:
            raise DescriptionError(
                f"{files.where}/{name}: does not say for which machine; valid: a name like "
                f"{prefix}_1nodes_8gpus_per_node.json"
            )
        found[int(match[1]), int(match[2])] = name
    return found


def _is_model(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in MODEL)


def _model_name(name: str) -> str:
    return name.partition("_profiling_")[2].removesuffix(".json")
