"""Closed-form counts of multi-latent attention (arXiv 2405.04434)."""

from galvatron_megatron.cost.counts_attention import keep_rotary, norm, output_projection
from galvatron_megatron.cost.counts_builder import Builder
from galvatron_megatron.cost.counts_core import core_attention
from galvatron_megatron.describe.model import Attention


def latent_attention(b: Builder, part: Attention) -> None:
    """Norm, down and up projections, core attention and residual addition of multi-latent attention.

    Transformer Engine's down projections are whole on every rank and run on its own slice of the sequence;
    those of Megatron's local layers are split over tp, their outputs gathered and cut again.
    """
    shapes, model = b.shapes, b.shapes.model
    tokens, stream, size, hidden = (
        shapes.gemm_tokens,
        shapes.stream_tokens,
        shapes.element_bytes,
        model.hidden_size,
    )
    heads = shapes.per_shard(part.heads, "attention heads")
    norm(b, "attention norm", "attention input")
    b.keep("attention norm output", stream * hidden * size)
    if part.q_lora_rank:
        _down(b, "query", part.q_lora_rank)
        _latent_norm(b, "query", part.q_lora_rank, part)
        # The slice of a gathered query keeps the whole alive.
        whole = not shapes.fused and shapes.strategy.weight_shards > 1
        if part.qk_layernorm:
            b.keep("query before its norm", (tokens if whole else stream) * part.q_lora_rank * size)
            b.keep("query latent", stream * part.q_lora_rank * size)
        else:
            b.keep("query latent", (tokens if whole else stream) * part.q_lora_rank * size)
        _up(b, "query", part.q_lora_rank, heads * part.head_dim)
    else:
        b.enter_tensor_parallel()
        b.parameter(heads * part.head_dim * hidden, sharded=True)
        b.linear("query projection", tokens, heads * part.head_dim, hidden)
    _down(b, "key and value", part.kv_lora_rank + part.qk_rope_head_dim)
    _latent_norm(b, "key and value", part.kv_lora_rank, part)
    combined = part.kv_lora_rank
    if shapes.fused or not shapes.is_megatron_sp:
        # Without a slice of the sequence the latent stays a view of the projection, rotary part included.
        combined += part.qk_rope_head_dim
    if part.qk_layernorm:
        b.keep("key and value before their norm", stream * combined * size)
        b.keep("key and value latent", stream * part.kv_lora_rank * size)
    else:
        b.keep("key and value latent", stream * combined * size)
    _up(b, "key and value", part.kv_lora_rank, heads * (part.qk_head_dim + part.v_head_dim))
    if shapes.fused and shapes.is_megatron_sp:
        size_of_keys = shapes.cp_tokens * part.qk_rope_head_dim * size
        b.collective("all_gather", "tp", "forward", size_of_keys)
        b.collective("reduce_scatter", "tp", "backward", size_of_keys)
    rotated = 2 * tokens * heads * part.head_dim * size
    b.memory("rotary embedding", 2 * rotated, 2 * rotated)
    b.peak(2 * rotated)
    keep_rotary(b, part.qk_rope_head_dim)
    b.keep("query and key", rotated)
    padded = not shapes.fused and model.fused_attention and part.v_head_dim != part.head_dim
    if not padded or shapes.recomputes_core_attention:
        b.keep("value", tokens * heads * part.v_head_dim * size)
    core_attention(b, heads=part.heads, groups=part.heads, head_dim=part.head_dim, v_head_dim=part.v_head_dim)
    output_projection(b, heads * part.v_head_dim, bias=part.output_bias)


def _down(b: Builder, name: str, width: int) -> None:
    """Projection of the residual stream to a latent of ``width`` features."""
    shapes, hidden = b.shapes, b.shapes.model.hidden_size
    if shapes.fused:
        b.parameter(width * hidden, sharded=False)
        b.linear(f"{name} down projection", shapes.stream_tokens, width, hidden)
        return
    share = shapes.per_shard(width, f"{name} latent")
    b.enter_tensor_parallel()
    b.parameter(share * hidden, sharded=True)
    b.linear(f"{name} down projection", shapes.gemm_tokens, share, hidden)
    if shapes.strategy.weight_shards > 1:
        b.collective("all_gather", "tp", "forward", shapes.gemm_tokens * width * shapes.element_bytes)


def _latent_norm(b: Builder, name: str, width: int, part: Attention) -> None:
    shapes = b.shapes
    if part.qk_layernorm:
        statistics = 1 if shapes.model.normalization == "RMSNorm" else 2
        b.vector(*[width] * statistics, sharded=False)
        b.keep(f"{name} norm statistics", statistics * 4 * shapes.stream_tokens)
        elements = shapes.stream_tokens * width * shapes.element_bytes
        b.memory(f"{name} norm", 2 * elements, 3 * elements)
    if not shapes.fused and shapes.is_megatron_sp:
        # The gathered latent was cut to this rank's sequence; the gradient is gathered.
        b.collective("all_gather", "tp", "backward", shapes.gemm_tokens * width * shapes.element_bytes)


def _up(b: Builder, name: str, latent: int, width: int) -> None:
    """Column-parallel projection of a latent to the heads of this rank."""
    b.enter_tensor_parallel(latent)
    b.parameter(width * latent, sharded=True)
    b.linear(f"{name} up projection", b.shapes.gemm_tokens, width, latent)
