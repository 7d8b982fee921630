"""DeepSpeed's own engine around a Megatron model: the ordinary path where all layers run alike.

    from galvatron_megatron.integration.deepspeed_engine import initialize
    ...                                                     # Megatron's parallel_state is initialised
    engine = initialize(model, optimizer, "ds_config.json")  # from galvatron export --deepspeed
    for batch in data:
        engine.backward(loss_of(engine(batch)))
        engine.step()

The training loop is the user's, without a pipeline: Megatron's schedules expect to hold the model themselves.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from galvatron_megatron.errors import GalvatronError


class ModelParallelUnit:
    """Megatron's ``parallel_state`` as DeepSpeed asks for it (its ``mpu``).

    DeepSpeed's model-parallel group is what holds one copy of the model: tensor times pipeline parallel, over
    which it sums norms and agrees on overflows. Its rank there is the tensor-parallel one: 0 counts the
    parameters that every tensor-parallel rank has. A data-parallel group counts context-parallel ranks, which
    hold the same weights.
    """

    @staticmethod
    def get_model_parallel_group() -> dist.ProcessGroup:
        """Ranks that together hold the model once."""
        return parallel_state.get_model_parallel_group()

    @classmethod
    def get_model_parallel_world_size(cls) -> int:
        """How many they are."""
        return dist.get_world_size(cls.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_rank() -> int:
        """The tensor-parallel rank."""
        return parallel_state.get_tensor_model_parallel_rank()

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        """Ranks that hold the same weights."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @classmethod
    def get_data_parallel_world_size(cls) -> int:
        """How many they are."""
        return dist.get_world_size(cls.get_data_parallel_group())

    @classmethod
    def get_data_parallel_rank(cls) -> int:
        """Rank among them."""
        return dist.get_rank(cls.get_data_parallel_group())

    @classmethod
    def get_data_parallel_group_ranks(cls) -> list[int]:
        """Their ranks in the world."""
        return dist.get_process_group_ranks(cls.get_data_parallel_group())

    @staticmethod
    def get_tensor_model_parallel_group() -> dist.ProcessGroup:
        """Ranks that split tensors."""
        return parallel_state.get_tensor_model_parallel_group()

    @staticmethod
    def get_tensor_model_parallel_world_size() -> int:
        """How many they are."""
        return parallel_state.get_tensor_model_parallel_world_size()

    @staticmethod
    def get_tensor_model_parallel_rank() -> int:
        """Rank among them."""
        return parallel_state.get_tensor_model_parallel_rank()

    @staticmethod
    def get_tensor_model_parallel_src_rank() -> int:
        """The first of them, in the world."""
        return parallel_state.get_tensor_model_parallel_src_rank()

    @staticmethod
    def get_pipeline_model_parallel_group() -> dist.ProcessGroup:
        """Ranks of one pipeline."""
        return parallel_state.get_pipeline_model_parallel_group()

    @staticmethod
    def get_pipeline_model_parallel_world_size() -> int:
        """How many they are."""
        return parallel_state.get_pipeline_model_parallel_world_size()

    @staticmethod
    def get_pipeline_model_parallel_rank() -> int:
        """Rank among them."""
        return parallel_state.get_pipeline_model_parallel_rank()


def prepare() -> None:
    """Makes DeepSpeed use the process groups that are there, and compile nothing for them.

    On CPU ranks it would otherwise spend minutes compiling a shared-memory collective of its own.

    Raises:
        GalvatronError: there is no process group yet.
    """
    if not dist.is_initialized():
        raise GalvatronError(
            "DeepSpeed: no process group yet; valid: after torch.distributed.init_process_group and Megatron's "
            "parallel_state.initialize_model_parallel"
        )
    if dist.get_backend() == "gloo":
        # It looks for a GPU by itself, and takes stand-ins for one.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from galvatron_megatron.runtime import zero_engines

    zero_engines.connect()


def initialize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: Path | str | dict) -> Any:
    """``deepspeed.initialize`` for a Megatron model.

    Args:
        model: built under Megatron's ``parallel_state``; without a pipeline.
        optimizer: over its parameters, as DeepSpeed takes it.
        config: DeepSpeed's configuration file or its content.

    Returns:
        The engine.

    Raises:
        GalvatronError: there is a pipeline, or no process group.
    """
    prepare()
    import deepspeed

    depth = parallel_state.get_pipeline_model_parallel_world_size()
    if depth > 1:
        raise GalvatronError(
            f"DeepSpeed's engine: pipeline of {depth}, which Megatron's schedules cannot drive through it; "
            "valid: pp 1, or train with --galvatron-plan"
        )
    sum_replicated_gradients(model)
    # DeepSpeed saves it with every checkpoint, and its ds_to_universal asks for it.
    model.universal_checkpoint_info = universal_checkpoint_info(model)
    model.register_state_dict_post_hook(_tensors_alone)
    content = dict(config) if isinstance(config, dict) else json.loads(Path(config).read_text())
    if dist.get_backend() == "gloo" and "zero_optimization" in content:
        # CPU ranks have no second stream to overlap communication on.
        content["zero_optimization"] = content["zero_optimization"] | {"overlap_comm": False}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=content,
        mpu=ModelParallelUnit,
        dist_init_required=False,
    )
    return engine


def universal_checkpoint_info(model: torch.nn.Module) -> dict[str, Any]:
    """How tensors are put together from those of tensor-parallel ranks, in the words of ``ds_to_universal``.

    Everything is said by name, for this model; the vocabulary keeps its padding.

    Args:
        model: of Megatron-core, whose linear layers and embeddings mark their weights.
    """
    from deepspeed.checkpoint import constants

    copies, rows, gated = [], [], []
    for name, weight in model.named_parameters():
        pattern = f"{re.escape(name)}$"
        if not getattr(weight, "tensor_model_parallel", False):
            copies.append(pattern)
        elif weight.partition_dim == 1:
            rows.append(pattern)
        elif weight.partition_stride == 2:
            # Each rank holds its part of the gate, then its part of what is gated.
            gated.append(pattern)
    return {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        constants.TP_REPLICATED_PARAMETER_PATTERNS: copies,
        constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: rows,
        constants.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0: gated,
    }


def _tensors_alone(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves out Megatron's empty extra states, for which ``ds_to_universal`` fails; loading needs none."""
    for name in [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        del state[name]


def sum_replicated_gradients(model: torch.nn.Module) -> int:
    """Completes the gradients of weights whose tensor-parallel copies see a part of the sequence each.

    Megatron sums them at the end of a step (``finalize_model_grads``); DeepSpeed shards them before that, so
    each is summed as soon as it is there.

    Args:
        model: any; weights that Megatron marked ``sequence_parallel`` are meant.

    Returns:
        How many there are.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return 0
    marked = [
        weight
        for weight in model.parameters()
        if weight.requires_grad and getattr(weight, "sequence_parallel", False)
    ]

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    for weight in marked:
        weight.register_hook(summed)
    return len(marked)
