"""Closed-form counts of the embedding and of the head with its loss."""

from galvatron_megatron.cost.counts_attention import norm
from galvatron_megatron.cost.counts_builder import Builder


def embedding(b: Builder) -> None:
    """Vocabulary-parallel word embedding and learned positions.

    The weight's dense gradient is no transient here: it is made when the activations of a stage are gone.
    """
    shapes, model = b.shapes, b.shapes.model
    hidden, size, tokens = model.hidden_size, shapes.element_bytes, shapes.cp_tokens
    shards = shapes.strategy.weight_shards
    learned = model.position_embedding == "learned_absolute"
    b.parameter(model.padded_vocab_size(shards) // shards * hidden, sharded=True)
    if learned:
        b.parameter((model.max_position_embeddings or model.seq_length) * hidden, sharded=False)
    b.keep("embedding input", 8 * shapes.gemm_tokens * (2 if learned else 1))
    if shards > 1:
        b.keep("mask of other ranks' tokens", tokens)
    output = tokens * hidden * size
    b.memory("embedding", 2 * output, 2 * output)
    b.peak(2 * output)
    if shards > 1:
        if shapes.is_megatron_sp and not learned:
            b.collective("reduce_scatter", "tp", "forward", output)
        else:
            b.collective("all_reduce", "tp", "forward", output)
        if shapes.is_megatron_sp:
            b.collective("all_gather", "tp", "backward", output)
    if model.hidden_dropout > 0:
        b.keep("embedding dropout mask", shapes.stream_tokens * hidden)


def head(b: Builder) -> None:
    """Final norm, vocabulary-parallel logits and the cross-entropy in fp32.

    Megatron's unfused loss keeps the softmax in fp32; logits in the model's precision live beside it until
    the loss is known, and their gradient is made while the softmax lives.
    """
    shapes, model = b.shapes, b.shapes.model
    hidden, size, tokens = model.hidden_size, shapes.element_bytes, shapes.gemm_tokens
    shards = shapes.strategy.weight_shards
    vocabulary = model.padded_vocab_size(shards) // shards
    norm(b, "final norm", "head input")
    b.keep("final norm output", shapes.stream_tokens * hidden * size)
    b.enter_tensor_parallel()
    b.parameter(vocabulary * hidden, sharded=True)
    b.linear("output layer", tokens, vocabulary, hidden)
    b.keep("softmax of the logits", tokens * vocabulary * 4)
    b.keep("loss targets", 9 * tokens)
    b.memory("cross entropy", tokens * vocabulary * (size + 4 * 6), tokens * vocabulary * (4 * 2 + size))
    b.peak(tokens * vocabulary * size)
    if not shapes.fused:
        # The fp32 softmax is gone when the weight's gradient is made.
        gathered = 2 * tokens * hidden if shapes.is_megatron_sp else 0
        made = vocabulary * hidden + tokens * hidden + tokens * vocabulary + gathered
        b.peak(made * size - 4 * tokens * vocabulary)
    if shards > 1:
        b.collective("all_reduce", "tp", "forward", 4 * tokens, 3)
