"""Digests of layers and model shapes under which measurements are filed."""

from dataclasses import asdict, replace

from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.describe.profile import Profile, digest


def layer_digest(layer: Layer) -> str:
    """16 hex digits that identify a layer's shape inside the profile of its model."""
    return digest(asdict(layer))


def shape_digest(model: Model) -> str:
    """16 hex digits of everything that changes the cost of a layer, the embedding or the head.

    The number and order of layers do not count, so that a profile made for 32 layers serves 48.
    """
    content = asdict(model)
    del content["name"]
    content["layers"] = sorted({layer_digest(layer) for layer in model.layers})
    return digest(content)


def measured_model(model: Model, profile: Profile) -> Model | None:
    """The model as a profile measured it, or None where it measured another one.

    A model file does not say which attention kernels a job runs; the profile does.
    """
    for fused in (model.fused_attention, not model.fused_attention):
        found = replace(model, fused_attention=fused)
        if shape_digest(found) == profile.provenance.model:
            return found
    return None
