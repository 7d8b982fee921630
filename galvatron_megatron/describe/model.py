"""The model to plan for: a sequence of typed layers between an embedding and a head."""

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import groupby

from galvatron_megatron.describe.layer import (
    Attention,
    Experts,
    Layer,
    Mamba,
    Mlp,
    norm_parameter_count,
    require_positive,
)
from galvatron_megatron.errors import DescriptionError, did_you_mean
from galvatron_megatron.plan.checks import shown

__all__ = ["Attention", "Experts", "Layer", "Mamba", "Mlp", "Model"]

PRECISIONS = ("bf16", "fp16", "fp32")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")
POSITION_EMBEDDINGS = ("learned_absolute", "rope", "none")


@dataclass(kw_only=True, frozen=True, slots=True)
class Model:
    """A model to plan for."""

    name: str
    hidden_size: int
    seq_length: int
    """Tokens of one training sample."""
    vocab_size: int
    """Before padding."""
    layers: tuple[Layer, ...]
    """In order, embedding and head not counted."""
    normalization: str = "LayerNorm"
    """``LayerNorm`` or ``RMSNorm``."""
    position_embedding: str = "learned_absolute"
    """``learned_absolute``, ``rope`` or ``none``, as in ``--position-embedding-type``."""
    max_position_embeddings: int = 0
    """Rows of a learned position embedding; 0 means seq_length."""
    tied_embeddings: bool = True
    """The output layer shares the word embedding (no ``--untie-embeddings-and-output-weights``)."""
    vocab_divisor: int = 128
    """``--make-vocab-size-divisible-by``: the vocabulary is padded to a multiple of this times tp."""
    precision: str = "bf16"
    """``bf16``, ``fp16`` or ``fp32``."""
    hidden_dropout: float = 0.0
    """Probability, 0 to 1."""
    attention_dropout: float = 0.0
    """Probability, 0 to 1."""
    fused_attention: bool = True
    """Flash or fused attention: no seq x seq score matrix is kept."""

    def __post_init__(self) -> None:
        require_positive(self, "hidden_size", "seq_length", "vocab_size", "vocab_divisor")
        require_positive(self, "max_position_embeddings", least=0)
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise DescriptionError(f"model {name}: {shown(value)}; valid: a number from 0 to 1")
        if not self.layers:
            raise DescriptionError("model layers: none; valid: at least one layer")
        for name, choices in (
            ("precision", PRECISIONS),
            ("normalization", NORMALIZATIONS),
            ("position_embedding", POSITION_EMBEDDINGS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise DescriptionError(
                    f"model {name}: {shown(value)} is unknown; {did_you_mean(value, choices)}"
                )

    def padded_vocab_size(self, tp: int) -> int:
        """Vocabulary rows after Megatron's padding to a multiple of vocab_divisor * tp."""
        multiple = self.vocab_divisor * tp
        return -(-self.vocab_size // multiple) * multiple

    def parameter_count(self, tp: int | None = None) -> int:
        """Parameters of the whole model.

        Args:
            tp: tensor-parallel degree that the vocabulary is padded for; None counts it without padding.
        """
        rows = self.vocab_size if tp is None else self.padded_vocab_size(tp)
        count = rows * self.hidden_size * (1 if self.tied_embeddings else 2)
        if self.position_embedding == "learned_absolute":
            count += (self.max_position_embeddings or self.seq_length) * self.hidden_size
        count += norm_parameter_count(self.hidden_size, self.normalization)
        for layer, times in self.layer_runs():
            count += times * layer.parameter_count(self.hidden_size, self.normalization)
        return count

    def layer_runs(self) -> tuple[tuple[Layer, int], ...]:
        """Runs of consecutive identical layers: (layer, how many), in order."""
        return tuple((layer, len(list(run))) for layer, run in groupby(self.layers))

    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes cost; the name does not count."""
        content = asdict(self)
        del content["name"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
