"""The model to plan for: a sequence of typed layers between an embedding and a head."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from itertools import groupby

from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.layer_kind import LayerKind

PRECISIONS = ("bf16", "fp16", "fp32")


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int or value < 1:
            raise DescriptionError(f"model {name}: {value!r}; valid: an integer >= 1")


@dataclass(kw_only=True, frozen=True, slots=True)
class Attention:
    """Self-attention of a layer."""

    heads: int
    query_groups: int
    """Key/value heads; equal to heads without grouped-query attention."""
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_layernorm: bool = False
    # Multi-latent attention; zero where it is not used.
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "heads", "query_groups", "head_dim")
        if self.heads % self.query_groups:
            raise DescriptionError(
                f"model query_groups: {self.query_groups} does not divide the {self.heads} attention heads"
            )

    @property
    def is_latent(self) -> bool:
        """True for multi-latent attention."""
        return self.kv_lora_rank > 0


@dataclass(kw_only=True, frozen=True, slots=True)
class Mlp:
    """Dense feed-forward part of a layer."""

    ffn_hidden_size: int
    gated: bool = False
    """SwiGLU-like: the first linear is twice as wide."""
    bias: bool = False
    activation: str = "gelu"

    def __post_init__(self) -> None:
        _require_positive(self, "ffn_hidden_size")


@dataclass(kw_only=True, frozen=True, slots=True)
class Experts:
    """Mixture-of-experts part of a layer."""

    count: int
    top_k: int
    ffn_hidden_size: int
    """Of one expert."""
    shared_ffn_hidden_size: int = 0
    """Of all shared experts together; 0 without them."""
    shared_gate: bool = False
    """A learned gate scales the output of the shared experts."""
    gated: bool = True
    bias: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        _require_positive(self, "count", "top_k", "ffn_hidden_size")
        if self.top_k > self.count:
            raise DescriptionError(f"model top_k: {self.top_k} is more than the {self.count} experts")


@dataclass(kw_only=True, frozen=True, slots=True)
class Mamba:
    """Mamba mixer of a layer."""

    state_dim: int = 128
    head_dim: int = 64
    groups: int = 8
    heads: int = 0
    """0 means expand * hidden_size / head_dim."""
    expand: int = 2
    conv_kernel: int = 4

    def __post_init__(self) -> None:
        _require_positive(self, "state_dim", "head_dim", "groups", "expand", "conv_kernel")

    def inner_size(self, hidden_size: int) -> int:
        """Width inside the mixer: heads * head_dim, or expand * hidden_size where heads are not given."""
        return self.heads * self.head_dim if self.heads else self.expand * hidden_size

    def head_count(self, hidden_size: int) -> int:
        """Heads of the mixer."""
        return self.heads or self.expand * hidden_size // self.head_dim


@dataclass(kw_only=True, frozen=True, slots=True)
class Layer:
    """One layer; equal layers compare equal, so runs of identical layers can be found."""

    kind: LayerKind
    attention: Attention | None = None
    mlp: Mlp | None = None
    experts: Experts | None = None
    mamba: Mamba | None = None

    def __post_init__(self) -> None:
        needed = {
            LayerKind.BLOCK: {"attention", "mlp"},
            LayerKind.MOE_BLOCK: {"attention", "experts"},
            LayerKind.ATTENTION: {"attention"},
            LayerKind.MLP: {"mlp"},
            LayerKind.MOE: {"experts"},
            LayerKind.MAMBA: {"mamba"},
        }[self.kind]
        present = {f.name for f in fields(self) if f.name != "kind" and getattr(self, f.name) is not None}
        if present != needed:
            raise DescriptionError(
                f"layer of kind {self.kind.value!r} has {sorted(present)}; valid: exactly {sorted(needed)}"
            )


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
    attention_dropout: float = 0.0
    fused_attention: bool = True
    """Flash or fused attention: no seq x seq score matrix is kept."""

    def __post_init__(self) -> None:
        _require_positive(self, "hidden_size", "seq_length", "vocab_size", "vocab_divisor")
        if not self.layers:
            raise DescriptionError("model layers: none; valid: at least one layer")
        if self.precision not in PRECISIONS:
            raise DescriptionError(
                f"model precision: {self.precision!r} is unknown; valid: {', '.join(PRECISIONS)}"
            )

    def padded_vocab_size(self, tp: int) -> int:
        """Vocabulary rows after Megatron's padding to a multiple of vocab_divisor * tp."""
        multiple = self.vocab_divisor * tp
        return -(-self.vocab_size // multiple) * multiple

    def layer_runs(self) -> tuple[tuple[Layer, int], ...]:
        """Runs of consecutive identical layers: (layer, how many), in order."""
        return tuple((layer, len(list(run))) for layer, run in groupby(self.layers))

    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes cost; the name does not count."""
        content = asdict(self)
        del content["name"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
