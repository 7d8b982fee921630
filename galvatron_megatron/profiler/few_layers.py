"""Builds a Megatron model with a few layers of one kind, exactly as the user's command line would."""

import contextlib
import copy
import io
import random
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, rerun_state_machine
from megatron.core.tensor_parallel import random as megatron_random

from galvatron_megatron.describe.model import Layer, Model
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import SequenceParallel
from galvatron_megatron.profiler.exchanged_layers import exchanging, hold_slices
from galvatron_megatron.profiler.process_group import answer_timeout

HYBRID_SYMBOL = {LayerKind.ATTENTION: "*", LayerKind.MLP: "-", LayerKind.MOE: "E", LayerKind.MAMBA: "M"}

REFUSALS = (
    torch.OutOfMemoryError,
    AssertionError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    ImportError,
)
"""What Megatron raises for a setting that it cannot run."""


def out_of_memory(error: BaseException) -> bool:
    """True where an allocation failed, on a GPU or on a CPU rank (which torch says in words only)."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def refusal(error: BaseException) -> str:
    """Why a setting cannot run, in one line."""
    if out_of_memory(error):
        torch.cuda.empty_cache()
        return "out of memory"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# What the user may have decided about the plan, and what belongs to the job rather than to a layer.
_NEUTRAL = {
    "pipeline_model_parallel_size": 1,
    "pipeline_model_parallel_layout": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "virtual_pipeline_model_parallel_size": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_activations": False,
    "distribute_saved_activations": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "tp_comm_overlap": False,
    "mtp_num_layers": None,
    "load": None,
    "save": None,
    "hybrid_override_pattern": None,
    "rampup_batch_size": None,
    "step_batch_size_schedule": None,
    "global_batch_size": None,
    "eval_global_batch_size": None,
    "eval_micro_batch_size": None,
}


def is_validated(arguments: Namespace) -> bool:
    """True once Megatron's ``validate_args`` has seen the arguments (it removes the deprecated ones)."""
    return not hasattr(arguments, "checkpoint_activations")


def arguments_for(
    arguments: Namespace,
    model: Model,
    layer: Layer,
    *,
    layers: int,
    tp: int,
    sequence_parallel: SequenceParallel,
    zero: int,
    world_size: int,
    defaults: Mapping[str, Any] | None = None,
) -> Namespace:
    """Megatron's arguments for a model of a few equal layers under one base layout.

    Args:
        arguments: the user's, parsed; validated or not. Left unchanged.
        model: what the user's arguments describe.
        layer: the kind to build; one of ``model.layers``.
        layers: how many of it.
        tp: tensor-parallel degree.
        sequence_parallel: ``none`` or ``megatron``.
        zero: 0 or 1 (Megatron's distributed optimizer).
        world_size: ranks of the job.
        defaults: the training script's own defaults (``args_defaults`` of ``pretrain``).

    Returns:
        A validated copy.

    Raises:
        GalvatronError: Megatron refuses the combination.
    """
    made = copy.copy(arguments)
    for name, value in _NEUTRAL.items():
        if hasattr(made, name):
            setattr(made, name, copy.copy(value))
    made.tensor_model_parallel_size = tp
    made.sequence_parallel = sequence_parallel is SequenceParallel.MEGATRON
    made.use_distributed_optimizer = zero > 0
    made.micro_batch_size = 1
    made.world_size = world_size
    made.rank = torch.distributed.get_rank()
    if getattr(made, "hybrid_layer_pattern", None):
        made.hybrid_layer_pattern = HYBRID_SYMBOL[layer.kind] * layers
    made.num_layers = layers
    made.encoder_num_layers = None
    if layer.kind is LayerKind.MOE_BLOCK:
        made.moe_layer_freq = [1] * layers
    elif layer.kind is LayerKind.BLOCK and getattr(made, "num_experts", None):
        made.moe_layer_freq = [0] * layers
    made.padded_vocab_size = model.padded_vocab_size(tp)
    if is_validated(arguments):
        made.data_parallel_size = world_size // tp
        made.global_batch_size = made.data_parallel_size
        return made
    from megatron.training.arguments import validate_args

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            made = validate_args(made, dict(defaults or {}))
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GalvatronError(f"Megatron refuses tp {tp}, {sequence_parallel.value}: {reason}") from error
    made.padded_vocab_size = model.padded_vocab_size(tp)
    return made


@dataclass(kw_only=True)
class FewLayers:
    """A model of a few layers, ready to run forward and backward."""

    arguments: Namespace
    module: torch.nn.Module
    """``GPTModel`` or ``HybridModel``."""
    ddp: torch.nn.Module
    """The module in Megatron's own data-parallel wrapper."""
    layers: int
    sequence_group: torch.distributed.ProcessGroup | None = None
    """Ranks that split the sequence of the layers (Ulysses), or None where every rank has all of it."""

    @property
    def sequence_parts(self) -> int:
        """In how many parts the sequence is split behind the embedding."""
        return 1 if self.sequence_group is None else self.sequence_group.size()

    @property
    def layer_modules(self) -> list[torch.nn.Module]:
        """The layers, in order."""
        return list(self.module.decoder.layers)

    @property
    def final_norm(self) -> torch.nn.Module:
        """The norm behind the last layer; in the profile it belongs to the head."""
        return last_norm(self.module.decoder)

    def optimizer(self) -> Any:
        """Megatron's optimizer for the model."""
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.training.training import get_megatron_optimizer_config

        config, overrides = get_megatron_optimizer_config(self.arguments)
        with contextlib.redirect_stdout(io.StringIO()):
            return get_megatron_optimizer(
                config, [self.ddp], config_overrides=overrides, use_gloo_process_groups=False
            )


def last_norm(decoder: torch.nn.Module) -> torch.nn.Module | None:
    """The norm behind the last layer of a GPTModel's or a HybridModel's decoder; None where it has none."""
    name = "final_layernorm" if hasattr(decoder, "final_layernorm") else "final_norm"
    return getattr(decoder, name, None)


def build(
    arguments: Namespace, layers: int, sequence_group: torch.distributed.ProcessGroup | None = None
) -> FewLayers:
    """Builds the model that validated arguments describe, in the current parallel state.

    Args:
        arguments: of Megatron, for a model of ``layers`` layers.
        layers: how many.
        sequence_group: ranks over which the layers run under Ulysses; None for Megatron's own layers.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.module import Float16Module
    from megatron.training.training import get_megatron_ddp_config

    module = bare_model(arguments, sequence_group)
    if sequence_group is not None:
        hold_slices(module.decoder, sequence_group)
    module.cuda(torch.cuda.current_device())
    wrapped = module
    if arguments.fp16 or arguments.bf16:
        wrapped = Float16Module(module.config, module)
    ddp_config = get_megatron_ddp_config(arguments)
    ddp_config.check_for_nan_in_grad = False
    ddp_config.check_for_large_grads = False
    ddp = DistributedDataParallel(config=module.config, ddp_config=ddp_config, module=wrapped)
    return FewLayers(arguments=arguments, module=module, ddp=ddp, layers=layers, sequence_group=sequence_group)


def bare_model(
    arguments: Namespace, sequence_group: torch.distributed.ProcessGroup | None = None
) -> torch.nn.Module:
    """The ``GPTModel`` or ``HybridModel`` that validated arguments describe, without any wrapper.

    Args:
        arguments: of Megatron.
        sequence_group: ranks over which its attention exchanges heads for sequence; None where it does not.
    """
    from megatron.core.transformer.spec_utils import import_module
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(arguments)
    common = {
        "config": config,
        "vocab_size": arguments.padded_vocab_size,
        "max_sequence_length": arguments.max_position_embeddings,
        "pre_process": True,
        "post_process": True,
        "fp16_lm_cross_entropy": arguments.fp16_lm_cross_entropy,
        "parallel_output": True,
        "share_embeddings_and_output_weights": not arguments.untie_embeddings_and_output_weights,
        "position_embedding_type": arguments.position_embedding_type,
        "rotary_percent": arguments.rotary_percent,
        "rotary_base": arguments.rotary_base,
    }
    if getattr(arguments, "hybrid_layer_pattern", None):
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        spec = hybrid_stack_spec if arguments.spec is None else import_module(arguments.spec)
        if sequence_group is not None:
            spec = exchanging(spec, sequence_group)
        return HybridModel(
            hybrid_stack_spec=spec, hybrid_layer_pattern=arguments.hybrid_layer_pattern, **common
        )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    if arguments.spec is not None and arguments.spec != ["local"]:
        spec = import_module(arguments.spec)
    else:
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=arguments.transformer_impl == "transformer_engine",
            normalization=arguments.normalization,
            qk_l2_norm=arguments.qk_l2_norm,
        )
    if sequence_group is not None:
        spec = exchanging(spec, sequence_group)
    return GPTModel(transformer_layer_spec=spec, rope_scaling=arguments.use_rope_scaling, **common)


@contextmanager
def parallel_state_of(tp: int, arguments: Namespace) -> Iterator[None]:
    """Megatron's parallel state for a tensor-parallel degree, without pipeline; gone again afterwards."""
    known = set(torch.distributed.distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=getattr(arguments, "expert_model_parallel_size", 1) or 1,
        expert_tensor_parallel_size=getattr(arguments, "expert_tensor_parallel_size", None),
        create_gloo_process_groups=False,
        distributed_timeout_minutes=answer_timeout().total_seconds() / 60,
    )
    try:
        megatron_random.model_parallel_cuda_manual_seed(
            getattr(arguments, "seed", 1234) or 1234,
            te_rng_tracker=bool(getattr(arguments, "te_rng_tracker", False)),
            force_reset_rng=True,
        )
        yield
    finally:
        made = set(torch.distributed.distributed_c10d._world.pg_map) - known
        parallel_state.destroy_model_parallel()
        for group in made:
            torch.distributed.destroy_process_group(group)


@contextmanager
def megatron_state_restored() -> Iterator[None]:
    """Leaves Megatron's module-level state and the random generators as they were found."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    cuda = torch.cuda.get_rng_state()
    tracker = (megatron_random._CUDA_RNG_STATE_TRACKER, megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED)
    rerun = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
    if parallel_state.model_parallel_is_initialized():
        raise GalvatronError(
            "profile: Megatron has made its parallel groups already; valid: measure before initialize_megatron"
        )
    try:
        yield
    finally:
        (megatron_random._CUDA_RNG_STATE_TRACKER, megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED) = tracker
        rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE = rerun
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state(cuda)
