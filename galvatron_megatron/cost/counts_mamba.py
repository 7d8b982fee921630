"""Closed-form counts of a Mamba-2 layer (arXiv 2405.21060) with mamba-ssm's kernels.

No trace can hold these against the kernels, which exist for CUDA only: they follow what
``mamba_split_conv1d_scan_combined`` saves, which computes convolution and scan again in its backward pass.
"""

from galvatron_megatron.cost.counts_attention import norm, residual_add
from galvatron_megatron.cost.counts_builder import Builder
from galvatron_megatron.cost.counts_values import gemm
from galvatron_megatron.describe.model import Mamba
from galvatron_megatron.errors import DescriptionError

CHUNK = 128
"""Tokens of a chunk of the scan (Megatron's ``chunk_size``)."""


def mamba(b: Builder, part: Mamba) -> None:
    """Norm, input projection, convolution, scan, gated norm, output projection and residual addition.

    Raises:
        DescriptionError: the sequence is split over the layer's ranks other than by Megatron's kind.
    """
    shapes, hidden, size = b.shapes, b.shapes.model.hidden_size, b.shapes.element_bytes
    if shapes.strategy.cp > 1 or shapes.is_ulysses:
        raise DescriptionError(
            f"counts mamba under {shapes.strategy}: the scan runs over the whole sequence; "
            "valid: cp 1 with sequence parallelism none or megatron"
        )
    tokens = shapes.gemm_tokens
    inner = shapes.per_shard(part.inner_size(hidden), "mamba inner size")
    heads = shapes.per_shard(part.head_count(hidden), "mamba heads")
    groups = shapes.per_shard(part.groups, "mamba groups")
    mixed = inner + 2 * groups * part.state_dim
    projected = inner + mixed + heads

    norm(b, "mamba norm", "mamba input")
    b.keep("mamba norm output", shapes.stream_tokens * hidden * size)
    b.enter_tensor_parallel()
    b.parameter(projected * hidden, mixed * part.conv_kernel, mixed, heads, heads, heads, sharded=True)
    b.vector(inner, sharded=True)
    b.linear("mamba input projection", tokens, projected, hidden)
    b.keep("mamba projection", tokens * projected * size)
    b.keep("mamba scan output, before its gate", tokens * inner * size)
    b.keep("mamba scan output", tokens * inner * size)
    b.keep("mamba gated norm statistics", 4 * tokens * groups)
    b.keep("mamba gated norm output", tokens * inner * size)
    b.memory("mamba convolution", 2 * tokens * mixed * size, 5 * tokens * mixed * size)
    b.memory("mamba gate and norm", 5 * tokens * inner * size, 8 * tokens * inner * size)
    _scan(b, part, heads, groups)
    b.peak(tokens * (2 * projected + inner) * size)
    b.parameter(hidden * inner, sharded=True)
    b.linear("mamba output projection", tokens, hidden, inner)
    b.leave_tensor_parallel()
    residual_add(b, "mamba residual")


def _scan(b: Builder, part: Mamba, heads: int, groups: int) -> None:
    """The chunked scan as matrix products: inside chunks, into their states, and out of the states before."""
    shapes = b.shapes
    chunks = shapes.samples * -(-shapes.model.seq_length // CHUNK)
    width, state = part.head_dim, part.state_dim
    products = (
        ("mamba scores", chunks * groups, CHUNK, CHUNK, state),
        ("mamba outputs of a chunk", chunks * heads, CHUNK, width, CHUNK),
        ("mamba states of a chunk", chunks * heads, state, width, CHUNK),
        ("mamba outputs of states", chunks * heads, CHUNK, width, state),
    )
    size = shapes.element_bytes
    for name, batch, m, n, k in products:
        b.operators += [
            gemm(name, "forward", batch, m, n, k, element_bytes=size),
            # Computed again, and two gradients.
            gemm(name, "backward", batch, m, n, k, element_bytes=size),
            gemm(name, "backward", batch, m, k, n, element_bytes=size),
            gemm(name, "backward", batch, k, n, m, element_bytes=size),
        ]
