"""One typed layer of a model, its parts and how many parameters they have."""

from dataclasses import dataclass, fields

from galvatron_megatron.errors import DescriptionError, did_you_mean
from galvatron_megatron.plan.checks import require_count, shown
from galvatron_megatron.plan.layer_kind import LayerKind


def require_positive(owner: object, *names: str, least: int = 1) -> None:
    """Raises a DescriptionError that names the first of the fields that is no integer of at least ``least``."""
    for name in names:
        require_count(getattr(owner, name), f"model {name}", least=least, error=DescriptionError)


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
        require_positive(self, "heads", "query_groups", "head_dim")
        require_positive(self, "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", least=0)
        require_positive(self, "qk_head_dim", "v_head_dim", least=1 if self.is_latent else 0)
        if self.heads % self.query_groups:
            raise DescriptionError(
                f"model query_groups: {self.query_groups} does not divide the {self.heads} attention heads; "
                f"valid: a divisor of {self.heads}"
            )

    @property
    def is_latent(self) -> bool:
        """True for multi-latent attention."""
        return self.kv_lora_rank > 0

    def parameter_count(self, hidden_size: int, normalization: str) -> int:
        """Parameters, without the norm in front: projections, their biases and the norms of query and key."""
        if self.is_latent:
            return self._latent_parameter_count(hidden_size, normalization)
        query, key_value = self.heads * self.head_dim, 2 * self.query_groups * self.head_dim
        count = hidden_size * (query + key_value) + query * hidden_size
        count += (query + key_value) * self.qkv_bias + hidden_size * self.output_bias
        return count + self.head_norm_parameter_count(normalization)

    def head_norm_parameter_count(self, normalization: str) -> int:
        """Parameters of the norms over the features of a head, which tp ranks all have and apply to theirs."""
        if self.is_latent or not self.qk_layernorm:
            return 0
        return 2 * norm_parameter_count(self.head_dim, normalization)

    def _latent_parameter_count(self, hidden_size: int, normalization: str) -> int:
        query = self.heads * (self.qk_head_dim + self.qk_rope_head_dim)
        key_value = self.heads * (self.qk_head_dim + self.v_head_dim)
        count = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank * key_value
        if self.q_lora_rank:
            count += hidden_size * self.q_lora_rank + self.q_lora_rank * query
        else:
            count += hidden_size * query
        count += self.heads * self.v_head_dim * hidden_size + hidden_size * self.output_bias
        if self.qk_layernorm:
            count += norm_parameter_count(self.kv_lora_rank, normalization)
            count += norm_parameter_count(self.q_lora_rank, normalization)
        return count


@dataclass(kw_only=True, frozen=True, slots=True)
class Mlp:
    """Dense feed-forward part of a layer."""

    ffn_hidden_size: int
    gated: bool = False
    """SwiGLU-like: the first linear is twice as wide."""
    bias: bool = False
    activation: str = "gelu"

    def __post_init__(self) -> None:
        require_positive(self, "ffn_hidden_size")

    def parameter_count(self, hidden_size: int) -> int:
        """Parameters, without the norm in front."""
        widths = (2 if self.gated else 1) * self.ffn_hidden_size
        return hidden_size * (widths + self.ffn_hidden_size) + (widths + hidden_size) * self.bias


DISPATCHERS = ("allgather", "alltoall", "flex")


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
    dispatcher: str = "alltoall"
    """How tokens reach experts on other ranks (``--moe-token-dispatcher-type``): ``allgather`` of all tokens,
    ``alltoall`` of the routed ones, or ``flex`` (DeepEP and the like, which move what ``alltoall`` moves)."""

    def __post_init__(self) -> None:
        require_positive(self, "count", "top_k", "ffn_hidden_size")
        if self.dispatcher not in DISPATCHERS:
            raise DescriptionError(
                f"model dispatcher: {shown(self.dispatcher)} is unknown; "
                f"{did_you_mean(self.dispatcher, DISPATCHERS)}"
            )
        require_positive(self, "shared_ffn_hidden_size", least=0)
        if self.top_k > self.count:
            raise DescriptionError(
                f"model top_k: {self.top_k} is more than the {self.count} experts; valid: 1 to {self.count}"
            )

    def parameter_count(self, hidden_size: int) -> int:
        """Parameters of the router, all experts and the shared experts, without the norm in front."""
        expert = Mlp(ffn_hidden_size=self.ffn_hidden_size, gated=self.gated, bias=self.bias)
        count = self.count * (hidden_size + self.bias + expert.parameter_count(hidden_size))
        if self.shared_ffn_hidden_size:
            shared = Mlp(ffn_hidden_size=self.shared_ffn_hidden_size, gated=self.gated)
            count += shared.parameter_count(hidden_size) + hidden_size * self.shared_gate
        return count


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
        require_positive(self, "state_dim", "head_dim", "groups", "expand", "conv_kernel")
        require_positive(self, "heads", least=0)

    def inner_size(self, hidden_size: int) -> int:
        """Width inside the mixer: heads * head_dim, or expand * hidden_size where heads are not given."""
        return self.heads * self.head_dim if self.heads else self.expand * hidden_size

    def head_count(self, hidden_size: int) -> int:
        """Heads of the mixer."""
        return self.heads or self.expand * hidden_size // self.head_dim

    def parameter_count(self, hidden_size: int) -> int:
        """Parameters of the mixer, without the norm in front (Megatron's ``MambaMixer``)."""
        inner, heads = self.inner_size(hidden_size), self.head_count(hidden_size)
        states = 2 * self.groups * self.state_dim
        convolution = (inner + states) * (self.conv_kernel + 1)
        # Per head: the bias of dt, the logarithm of A, and D; per channel: the gated norm.
        return (
            hidden_size * (2 * inner + states + heads) + convolution + 3 * heads + inner + inner * hidden_size
        )


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

    def parameter_count(self, hidden_size: int, normalization: str) -> int:
        """Parameters of the layer with its norms."""
        parts = 0
        if self.attention is not None:
            parts += self.attention.parameter_count(hidden_size, normalization)
        for part in (self.mlp, self.experts, self.mamba):
            if part is not None:
                parts += part.parameter_count(hidden_size)
        norms = 2 if self.kind in (LayerKind.BLOCK, LayerKind.MOE_BLOCK) else 1
        return parts + norms * norm_parameter_count(hidden_size, normalization)


def norm_parameter_count(size: int, normalization: str) -> int:
    """Parameters of a norm: a weight, and for ``LayerNorm`` a bias, per channel."""
    return size if normalization == "RMSNorm" else 2 * size
