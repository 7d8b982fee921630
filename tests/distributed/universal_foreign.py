"""Megatron-DeepSpeed's GPT as its checkpoints see it: names, pipeline and patterns; on ranks only.

The layers that compute are Megatron-core's, whose parameters are registered a second time under the names that
Megatron-DeepSpeed gives them (``megatron/model/`` of the commit that ``describe.megatron_deepspeed`` names). So
DeepSpeed's engines train and save them under these names, and its conversion reads the patterns that
``GPTModel.universal_checkpoint_info`` there describes.
"""

import torch
from deepspeed.checkpoint import constants
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

TIED = "tied_modules.embed."


def foreign_info(args, *, pipeline):
    """What Megatron-DeepSpeed tells ``ds_to_universal``."""
    layers = "" if pipeline else "language_model.encoder.layers."
    tied, tp = not args.untie_embeddings_and_output_weights, args.tensor_model_parallel_size
    has_bias = args.normalization == "LayerNorm"
    embedding = TIED if tied else r"\d+."
    if not pipeline:
        embedding = "language_model.embedding."
    vocabulary = [f"{embedding}word_embeddings.weight"]
    if not tied:
        vocabulary.append(r"\d+.lm_head.weight" if pipeline else "language_model.output_layer.weight")
    position = [f"{embedding}position_embeddings.weight"]
    position = position if args.position_embedding_type == "learned_absolute" else []
    info = {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        constants.ORIGINAL_VOCAB_SIZE: args.vocab_size,
        constants.PADDED_VOCAB_SIZE: args.padded_vocab_size,
        constants.VOCABULARY_PARAMETER_PATTERNS: vocabulary,
        constants.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0: [],
    }
    if pipeline:
        info[constants.PIPELINE_REPLICATED_PARAMETER_PATTERNS] = [*vocabulary, *position] if tied else []
    if args.swiglu:
        info[constants.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0] = [rf"{layers}\d+.mlp.dense_h_to_4h.weight"]
    if tp > 1:
        norms = [rf"{layers}\d+.input_layernorm.", rf"{layers}\d+.post_attention_layernorm."]
        norms.append(r"\d+." if pipeline else "language_model.encoder.final_layernorm.")
        copies = [f"{norm}{kind}" for norm in norms for kind in ("weight", *(["bias"] if has_bias else []))]
        if args.add_bias_linear:
            copies += [rf"{layers}\d+.self_attention.dense.bias", rf"{layers}\d+.mlp.dense_4h_to_h.bias"]
        info[constants.TP_REPLICATED_PARAMETER_PATTERNS] = copies + position
        info[constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS] = [
            rf"{layers}\d+.mlp.dense_4h_to_h.weight",
            rf"{layers}\d+.self_attention.dense.weight",
        ]
    return info


def renamed(module, layer):
    """Registers the parts of a layer of Megatron-core in a module, under the other names."""
    module.input_layernorm = layer.input_layernorm
    module.self_attention, module.mlp = torch.nn.Module(), torch.nn.Module()
    module.self_attention.query_key_value = layer.self_attention.linear_qkv
    module.self_attention.dense = layer.self_attention.linear_proj
    module.post_attention_layernorm = layer.pre_mlp_layernorm
    module.mlp.dense_h_to_4h = layer.mlp.linear_fc1
    module.mlp.dense_4h_to_h = layer.mlp.linear_fc2
    return module


class ForeignGPT(torch.nn.Module):
    """A GPT of Megatron-core under the names of Megatron-DeepSpeed's model without a pipeline."""

    def __init__(self, core):
        super().__init__()
        self.__dict__["core"] = core
        self.language_model = torch.nn.Module()
        self.language_model.embedding = core.embedding
        self.language_model.encoder = torch.nn.Module()
        layers = [renamed(torch.nn.Module(), layer) for layer in core.decoder.layers]
        self.language_model.encoder.layers = torch.nn.ModuleList(layers)
        self.language_model.encoder.final_layernorm = core.decoder.final_layernorm
        if not core.share_embeddings_and_output_weights:
            self.language_model.output_layer = core.output_layer

    def forward(self, *inputs, **named):
        return self.core(*inputs, **named)

    def sharded_state_dict(self, **named):
        return self.core.sharded_state_dict(**named)


class EmbeddingPipe(LanguageModelEmbedding):
    """The first module of a pipeline, and the head where embeddings are tied."""

    def forward(self, inputs):
        return super().forward(*inputs)

    @property
    def word_embeddings_weight(self):
        return self.word_embeddings.weight

    def entries(self, metadata):
        return self.sharded_state_dict(prefix="embedding.", metadata=metadata)


class LayerPipe(torch.nn.Module):
    """A layer of a pipeline."""

    def __init__(self, config, args, number):
        super().__init__()
        submodules = get_gpt_layer_local_submodules(normalization=args.normalization)
        layer = TransformerLayer(config, submodules, layer_number=number + 1)
        self.__dict__ |= {"layer": layer, "number": number, "args": args}
        renamed(self, layer)

    def forward(self, hidden):
        length = self.args.seq_length
        mask = torch.ones(1, 1, length, length).tril().lt(0.5)
        rotary = None
        if self.args.position_embedding_type == "rope":
            channels = self.layer.config.kv_channels
            rotary = RotaryEmbedding(channels, 1.0, use_cpu_initialization=True)(length)
        return self.layer(hidden, attention_mask=mask, rotary_pos_emb=rotary)[0]

    def entries(self, metadata):
        return self.layer.sharded_state_dict(prefix=f"decoder.layers.{self.number}.", metadata=metadata)


class LMHeadPipe(torch.nn.Module):
    """The head of a pipeline that is not tied."""

    def __init__(self, config, rows):
        super().__init__()
        self.lm_head = ColumnParallelLinear(
            config.hidden_size, rows, config=config, init_method=config.init_method, bias=False
        )

    def forward(self, hidden):
        return self.lm_head(hidden)[0]

    def entries(self, metadata):
        return self.lm_head.sharded_state_dict(prefix="output_layer.", metadata=metadata)


class NormPipe(torch.nn.Module):
    """The norm behind the layers, whose weight has no name but its module's number."""

    def __init__(self, config, args):
        super().__init__()
        build = get_gpt_layer_local_submodules(normalization=args.normalization).input_layernorm
        norm = build(config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.__dict__["norm"] = norm
        for name, weight in norm.named_parameters():
            self.register_parameter(name, weight)

    def forward(self, hidden):
        return self.norm(hidden)

    def entries(self, metadata):
        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), "decoder.final_layernorm.")


def tied_head(embedding, hidden):
    """Logits by the embedding's weight."""
    hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    return torch.nn.functional.linear(hidden, embedding.word_embeddings_weight)


def mean_loss(output, labels):
    """The loss of a micro-batch, as Megatron's loop of the tests has it."""
    labels, mask = labels
    losses = tensor_parallel.vocab_parallel_cross_entropy(output.float(), labels.transpose(0, 1).contiguous())
    return (losses.transpose(0, 1) * mask).sum() / mask.numel()


class GPTModelPipe(PipelineModule):
    """Megatron-DeepSpeed's pipeline model: a function in front, embedding, layers, norm and head."""

    def __init__(self, config, args, stages):
        tp = args.tensor_model_parallel_size
        words = (config, args.padded_vocab_size, args.seq_length, args.position_embedding_type)
        layers = [LayerSpec(LayerPipe, config, args, number) for number in range(args.num_layers)]
        if args.untie_embeddings_and_output_weights:
            front, head = LayerSpec(EmbeddingPipe, *words), LayerSpec(LMHeadPipe, config, words[1])
        else:
            named = {"tied_weight_attr": "word_embeddings_weight"}
            front = TiedLayerSpec("embed", EmbeddingPipe, *words, **named)
            head = TiedLayerSpec("embed", EmbeddingPipe, *words, forward_fn=tied_head, **named)
        super().__init__(
            layers=[lambda inputs: inputs, front, *layers, LayerSpec(NormPipe, config, args), head],
            loss_fn=mean_loss,
            topology=PipeModelDataParallelTopology(
                num_pp=stages, num_mp=tp, num_dp=parallel_state.get_data_parallel_world_size()
            ),
            partition_method="type:LayerPipe",
        )

    def sharded_state_dict(self, metadata=None, **_):
        found = {}
        for module in self.forward_funcs:
            if hasattr(module, "entries"):
                found |= module.entries(metadata)
        for module in self.tied_modules.values():
            found |= module.entries(metadata)
        return found
