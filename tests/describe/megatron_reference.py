"""Asks Megatron itself: run as a script with two files, a JSON request to read and a JSON answer to write.

Kept apart from the tests, which must not import Megatron into their own process.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1"}

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_layer_allocation import (
    get_hybrid_total_layer_count,
    get_hybrid_total_pipeline_segment_count,
)
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.training import arguments as megatron_arguments
from megatron.training.arguments import (
    add_megatron_arguments,
    core_transformer_config_from_args,
    moe_freq_type,
    parse_args,
    validate_args,
)
from megatron.training.vocab_utils import calculate_padded_vocab_size

KINDS = {argparse._StoreTrueAction: "on", argparse._StoreFalseAction: "off"}


def flags() -> dict:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return {
        name: {
            "dest": action.dest,
            "kind": KINDS.get(type(action)) or getattr(action.type, "__name__", "str"),
            "default": plain(action.default),
            "nargs": action.nargs,
            "choices": [plain(choice) for choice in action.choices] if action.choices else None,
        }
        for action in parser._actions
        for name in action.option_strings
    }


def plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return (
        value if isinstance(value, (int, float, str, bool, type(None))) else getattr(value, "name", str(value))
    )


def parsed(argv: list[str], world_size: int, *, validate: bool) -> argparse.Namespace:
    os.environ["WORLD_SIZE"] = str(world_size)
    sys.argv = ["pretrain_gpt.py", *argv]
    args = parse_args()
    if validate:
        validate_args(args)
    return args


def parameters(argv: list[str]) -> int:
    args = parsed([*argv, "--use-cpu-initialization", "--micro-batch-size", "1"], 1, validate=True)
    config = core_transformer_config_from_args(args)
    if args.num_experts:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=args.normalization
        )
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm,
            multi_latent_attention=args.multi_latent_attention,
            normalization=args.normalization,
        )
    if args.multi_latent_attention:
        # The local core attention does not take its sizes; it has no parameters either.
        spec.submodules.self_attention.submodules.core_attention = IdentityOp
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=calculate_padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, 1, logging_enabled=False
        ),
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
    )
    return sum(parameter.numel() for parameter in model.parameters())


def pipeline(argv: list[str], world_size: int) -> dict:
    """What Megatron makes of the parallel flags of a job."""
    args = parsed(argv, world_size, validate=True)
    config = core_transformer_config_from_args(args)
    layout = config.pipeline_model_parallel_layout
    return {
        "dp": args.data_parallel_size,
        "virtual_stages": args.virtual_pipeline_model_parallel_size or 1,
        "sequence_parallel": config.sequence_parallel,
        "experts": [config.expert_model_parallel_size, config.expert_tensor_parallel_size],
        "recompute": [config.recompute_granularity, config.recompute_method, config.recompute_num_layers],
        "distributed_optimizer": args.use_distributed_optimizer,
        "micro_batches": args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
        "stage_layers": layout
        and [[stage.count(LayerType.decoder) for stage in chunks] for chunks in layout.layout],
        "num_layers": args.num_layers,
    }


def start_one_rank() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    # Some modules put constants on the current device without asking.
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    tensor_parallel.random.initialize_rng_tracker()


def main() -> None:
    request_path, answer_path = map(Path, sys.argv[1:])
    request = json.loads(request_path.read_text())
    megatron_arguments.get_device_arch_version = lambda: 9
    start_one_rank()
    answer = {
        "flags": flags(),
        "parsed": [
            {key: plain(value) for key, value in vars(parsed(argv, 1, validate=False)).items()}
            for argv in request["command_lines"]
        ],
        "validated": [
            {key: plain(value) for key, value in vars(parsed(argv, world_size, validate=True)).items()}
            for argv, world_size in request["jobs"]
        ],
        "frequencies": [moe_freq_type(text) for text in request["frequencies"]],
        "layouts": [
            [[layer.name for layer in stage] for stage in PipelineParallelLayerLayout.parse_str_to_list(layout)]
            for layout in request["layouts"]
        ],
        "patterns": [
            [get_hybrid_total_layer_count(pattern), get_hybrid_total_pipeline_segment_count(pattern)]
            for pattern in request["patterns"]
        ],
        "pipelines": [pipeline(argv, world_size) for argv, world_size in request["pipelines"]],
        "parameters": [parameters(argv) for argv in request["models"]],
    }
    answer_path.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
