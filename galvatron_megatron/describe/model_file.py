"""Model files: our own YAML or JSON, or a Hugging Face ``config.json``.

Our own files hold the fields of ``Model``; ``layers`` is a list of runs of equal layers::

    name: llama2-7b
    hidden_size: 4096
    seq_length: 4096
    vocab_size: 32000
    normalization: RMSNorm
    position_embedding: rope
    tied_embeddings: false
    layers:
    - count: 32
      kind: block
      attention: {heads: 32, query_groups: 32, head_dim: 128}
      mlp: {ffn_hidden_size: 11008, gated: true, activation: silu}

A field that has its default may be left out; ``source`` says where the sizes come from and is not read.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path

import yaml

from galvatron_megatron.describe.hf_config import model_from_hf_config
from galvatron_megatron.describe.model import Attention, Experts, Layer, Mamba, Mlp, Model
from galvatron_megatron.describe.shipped import find_description
from galvatron_megatron.errors import DescriptionError, did_you_mean
from galvatron_megatron.plan.checks import MOST_LAYERS, shown
from galvatron_megatron.plan.document import check_keys, read_document, write_document
from galvatron_megatron.plan.layer_kind import LayerKind

_PARTS: dict[str, type] = {"attention": Attention, "mlp": Mlp, "experts": Experts, "mamba": Mamba}
_TYPES: dict[str, type] = {"int": int, "bool": bool, "str": str, "float": float}


def read_model(path: Path | str, *, seq_length: int | None = None) -> Model:
    """Reads a model file.

    Args:
        path: our own ``.yaml``, ``.yml`` or ``.json``, a Hugging Face ``config.json``, or the directory of one;
            or the name of a shipped model, such as ``llama2-7b``.
        seq_length: tokens of one training sample, instead of what the file says.

    Raises:
        DescriptionError: the file cannot be read, or names the field that is wrong and what would be valid.
    """
    path = find_description("models", path)
    if path.is_dir():
        return model_from_hf_config(path, seq_length=seq_length)
    document = read_document(path, DescriptionError)
    if "model_type" in document or "architectures" in document:
        return model_from_hf_config(path, seq_length=seq_length)
    model = model_from_dict(document, where=str(path))
    return model if seq_length is None else with_seq_length(model, seq_length)


def with_seq_length(model: Model, seq_length: int) -> Model:
    """The same model trained on samples of another length.

    Raises:
        DescriptionError: more tokens than a learned position embedding has rows.
    """
    positions = model.max_position_embeddings
    if model.position_embedding == "learned_absolute" and positions and seq_length > positions:
        raise DescriptionError(
            f"model {model.name!r}: {seq_length} tokens a sample, but {positions} learned positions; "
            f"valid: a sequence length up to {positions}"
        )
    return replace(model, seq_length=seq_length, max_position_embeddings=max(positions, seq_length))


def model_from_dict(document: Mapping[str, object], where: str = "model") -> Model:
    """The model that a document of our own describes.

    Raises:
        DescriptionError: names the document, the field, its value and what would be valid.
    """
    required = [entry.name for entry in fields(Model) if entry.default is MISSING]
    optional = [entry.name for entry in fields(Model) if entry.default is not MISSING]
    mapping = check_keys(
        document, where, required=required, optional=[*optional, "source"], error=DescriptionError
    )
    runs = mapping["layers"]
    if not isinstance(runs, list):
        raise DescriptionError(f"{where}.layers: {shown(runs)}; valid: a list of layers")
    layers: list[Layer] = []
    for index, run in enumerate(runs):
        layers += _run_from_dict(run, f"{where}.layers[{index}]", MOST_LAYERS - len(layers))
    values = _typed_values(Model, {key: mapping[key] for key in mapping if key != "source"}, where)
    try:
        return Model(**(values | {"layers": tuple(layers)}))
    except DescriptionError as error:
        raise DescriptionError(f"{where}: {error}") from None


def model_to_dict(model: Model) -> dict[str, object]:
    """A model as mappings, lists, strings and numbers; ``model_from_dict`` gives the equal model back."""
    document = {entry.name: getattr(model, entry.name) for entry in fields(Model) if entry.name != "layers"}
    document["layers"] = [
        {
            "count": count,
            "kind": layer.kind.value,
            **{
                name: {entry.name: getattr(part, entry.name) for entry in fields(kind)}
                for name, kind in _PARTS.items()
                if (part := getattr(layer, name)) is not None
            },
        }
        for layer, count in model.layer_runs()
    ]
    return document


def write_model(model: Model, path: Path | str) -> None:
    """Writes a model file in YAML, atomically.

    Raises:
        DescriptionError: the file cannot be written.
    """
    write_document(yaml.safe_dump(model_to_dict(model), sort_keys=False, width=110), path, DescriptionError)


def _run_from_dict(run: object, where: str, most: int) -> list[Layer]:
    mapping = check_keys(run, where, required=("kind",), optional=("count", *_PARTS), error=DescriptionError)
    count = mapping.get("count", 1)
    if type(count) is not int or not 1 <= count <= most:
        raise DescriptionError(f"{where}.count: {shown(count)}; valid: an integer from 1 to {max(1, most)}")
    kinds = [member.value for member in LayerKind]
    if mapping["kind"] not in kinds:
        raise DescriptionError(
            f"{where}.kind: {shown(mapping['kind'])} is unknown; {did_you_mean(mapping['kind'], kinds)}"
        )
    parts = {}
    for name, kind in _PARTS.items():
        if name in mapping:
            parts[name] = _part_from_dict(kind, mapping[name], f"{where}.{name}")
    try:
        return [Layer(kind=LayerKind(mapping["kind"]), **parts)] * count
    except DescriptionError as error:
        raise DescriptionError(f"{where}: {error}") from None


def _part_from_dict(kind: type, document: object, where: str) -> object:
    required = [entry.name for entry in fields(kind) if entry.default is MISSING]
    optional = [entry.name for entry in fields(kind) if entry.default is not MISSING]
    mapping = check_keys(document, where, required=required, optional=optional, error=DescriptionError)
    values = _typed_values(kind, mapping, where)
    try:
        return kind(**values)
    except DescriptionError as error:
        raise DescriptionError(f"{where}: {error}") from None


def _typed_values(kind: type, mapping: Mapping[str, object], where: str) -> dict[str, object]:
    """The values of a value's fields, held against the types of the fields."""
    values = {}
    for entry in fields(kind):
        if entry.name not in mapping:
            continue
        value, wanted = mapping[entry.name], _TYPES.get(getattr(entry.type, "__name__", str(entry.type)))
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted is not None and type(value) is not wanted:
            raise DescriptionError(f"{where}.{entry.name}: {shown(value)}; valid: of type {wanted.__name__}")
        values[entry.name] = value
    return values
