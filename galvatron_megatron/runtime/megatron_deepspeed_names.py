"""Parameters of Megatron-DeepSpeed's GPT by the names of Megatron-core.

Source: ``megatron/model/`` of deepspeedai/Megatron-DeepSpeed at the commit that ``describe.megatron_deepspeed``
names. Its pipeline model numbers modules, the first one being what stands in front of the layers; without a
pipeline they have names. All tensors but one stand in the same order as in Megatron-core.

The exception is the fused projection to queries, keys and values. Up to 3 December 2024 its rows go by head
(all queries of a key-value head, its key, its value), as in Megatron-core. Commit 676a482c, which also brought
the argument ``ds_sequence_parallel_fpdt``, splits what a tensor-parallel rank holds into three equal parts
instead: its queries, its keys, its values. Both call themselves checkpoint version 3.0; the arguments in the
checkpoint tell them apart.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from galvatron_megatron.errors import PlanError

_NAMED = "language_model."
_IN_BLOCKS_SINCE = "ds_sequence_parallel_fpdt"
_LAYER = re.compile(r"(?:language_model\.encoder\.layers\.)?(\d+)\.self_attention\.dense\.weight")
_CORE_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_IN_LAYER = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("input_layernorm.", "input_layernorm."),
    ("self_attention.linear_qkv.", "self_attention.query_key_value."),
    ("self_attention.linear_proj.", "self_attention.dense."),
    ("mlp.linear_fc1.layer_norm_", "post_attention_layernorm."),
    ("pre_mlp_layernorm.", "post_attention_layernorm."),
    ("mlp.linear_fc1.", "mlp.dense_h_to_4h."),
    ("mlp.linear_fc2.", "mlp.dense_4h_to_h."),
)
"""Beginnings of names inside a layer: Megatron-core's, Megatron-DeepSpeed's."""
_QKV = "self_attention.linear_qkv."


@dataclass(kw_only=True, frozen=True, slots=True)
class MegatronDeepSpeedNames:
    """How the parameters of one checkpoint are called, and in what order their rows stand."""

    names: frozenset[str]
    """Folders of the checkpoint."""
    first_layer: int
    """Number of the first layer's module."""
    last_layer: int
    arguments: Callable[[], Any]
    """Gives the arguments of the job that saved it, as an object with them as fields, or None."""

    @classmethod
    def of(cls, names: Iterable[str], arguments: Callable[[], Any]) -> "MegatronDeepSpeedNames | None":
        """The names of a checkpoint, or None where it is not Megatron-DeepSpeed's.

        Args:
            names: folders of the checkpoint.
            arguments: gives those of the job that saved it.
        """
        layers = [int(found[1]) for name in names if (found := _LAYER.fullmatch(name))]
        if not layers:
            return None
        return cls(names=frozenset(names), first_layer=min(layers), last_layer=max(layers), arguments=arguments)

    def folder_of(self, name: str) -> str | None:
        """The folder of a parameter, None where there is none.

        Args:
            name: in Megatron-core's distributed checkpoint.
        """
        return next((each for each in self._candidates(name) if each in self.names), None)

    def _candidates(self, name: str) -> list[str]:
        inside = _CORE_LAYER.fullmatch(name)
        if inside:
            rest = inside[2]
            for core, ours in _IN_LAYER:
                if rest.startswith(core):
                    rest = ours + rest.removeprefix(core)
                    break
            number = self.first_layer + int(inside[1])
            return [f"{_NAMED}encoder.layers.{number}.{rest}", f"{number}.{rest}"]
        if name.startswith("decoder.final_layernorm."):
            kind = name.rpartition(".")[2]
            modules = [f"{number}.{kind}" for number in self._behind()]
            return [f"{_NAMED}encoder.final_layernorm.{kind}", *modules]
        if name.startswith("embedding."):
            rest = name.removeprefix("embedding.")
            front = [f"{number}.{rest}" for number in range(self.first_layer)]
            return [f"{_NAMED}{name}", f"tied_modules.embed.{rest}", *front]
        if name == "output_layer.weight":
            behind = [f"{number}.lm_head.weight" for number in self._behind()]
            return [f"{_NAMED}{name}", *behind]
        return []

    def _behind(self) -> range:
        """Numbers of the modules behind the layers: norm and head."""
        return range(self.last_layer + 1, self.last_layer + 3)

    def warning(self) -> str | None:
        """What of the job that saved it Megatron-core does otherwise; None where nothing is known.

        Since the commit that brought the argument named above, its rotary embedding gives out cosines and
        sines, which its attention without sequence parallelism takes for the angles of queries and of keys.
        """
        fields = fields_of(self.arguments())
        turned = fields.get("use_rotary_position_embeddings") and _IN_BLOCKS_SINCE in fields
        apart = fields.get(_IN_BLOCKS_SINCE) or (fields.get("ds_sequence_parallel_size") or 1) > 1
        if not turned or apart:
            return None
        return (
            "since December 2024 Megatron-DeepSpeed turns queries and keys by other angles than Megatron-core "
            "(--use-rotary-position-embeddings): the loss jumps unless its source was mended"
        )

    def in_order(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with its rows in Megatron-core's order.

        Args:
            name: of its parameter in Megatron-core's distributed checkpoint.
            tensor: as it was read.

        Raises:
            PlanError: the checkpoint does not tell the order.
        """
        if f".{_QKV}" not in name or f"{_QKV}layer_norm" in name:
            return tensor
        fields = fields_of(self.arguments())
        if not isinstance(fields.get("num_attention_heads"), int):
            raise PlanError(
                f"universal checkpoint: {name}: the order of Megatron-DeepSpeed's queries, keys and values is "
                "told by the arguments that its own checkpoints hold, which are missing here; valid: one that "
                "its save_checkpoint wrote, with the *_model_states.pt"
            )
        if _IN_BLOCKS_SINCE not in fields:
            return tensor
        heads, splits = fields["num_attention_heads"], fields.get("tensor_model_parallel_size") or 1
        if fields.get("num_key_value_heads") not in (None, heads):
            raise PlanError(
                f"universal checkpoint: {name}: {fields['num_key_value_heads']} key-value heads for {heads} "
                "heads, which Megatron-DeepSpeed has not told apart since December 2024; valid: as many as "
                "heads"
            )
        if tensor.shape[0] % (3 * heads) or heads % splits:
            raise PlanError(
                f"universal checkpoint: {name} has {tensor.shape[0]} rows for {heads} heads over {splits} "
                "ranks; valid: three times as many as all heads are wide"
            )
        rest = tensor.shape[1:]
        by_head = tensor.reshape(splits, 3, heads // splits, -1, *rest).transpose(1, 2)
        return by_head.reshape(tensor.shape)


def fields_of(found: Any) -> dict[str, Any]:
    """Fields of an object that was read, as itself or as a stand-in; empty for what has none."""
    return vars(found) if hasattr(found, "__dict__") else {}
