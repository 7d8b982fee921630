"""Notices when Megatron moves what the runtime hooks into or relies on."""

import argparse
import ast
import inspect
import textwrap

import pytest

pytest.importorskip("megatron.training")

from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MixedPrecisionOptimizer
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import checkpointing, training
from megatron.training.arguments import add_megatron_arguments
from megatron.training.models import dist_utils

from galvatron_megatron.runtime import attach, support
from galvatron_megatron.runtime.data_parallel import PlannedDataParallel
from galvatron_megatron.runtime.layers import PlannedLayer, planned_class
from galvatron_megatron.runtime.random_streams import MODEL_PARALLEL_STREAM


def parameters(function):
    return list(inspect.signature(function).parameters)


def names_used(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_hooked_names_exist_and_are_used_where_they_are_replaced():
    for owner, name in attach.HOOKED:
        assert callable(getattr(owner, name)), (owner, name)
    assert "DistributedDataParallel" in names_used(dist_utils._ddp_wrap)
    assert "DDP" in names_used(training.get_model)
    assert {"get_megatron_optimizer", "load_checkpoint"} <= names_used(training.setup_model_and_optimizer)
    assert "_build_sharded_state_dict_metadata" in names_used(checkpointing.save_checkpoint)
    assert "generate_state_dict" in names_used(checkpointing.save_checkpoint)
    assert {"generate_state_dict", "_load_base_checkpoint"} <= names_used(checkpointing.load_checkpoint)


def test_models_take_their_layer_specs_second():
    assert parameters(GPTModel.__init__)[1:3] == ["config", "transformer_layer_spec"]
    assert parameters(HybridModel.__init__)[1:3] == ["config", "hybrid_stack_spec"]
    assert {"attention_layer", "mlp_layer"} <= set(HybridStackSubmodules.__dataclass_fields__)


def test_layers_take_config_submodules_and_groups():
    known = parameters(TransformerLayer.__init__)
    assert known[1:4] == ["config", "submodules", "layer_number"]
    assert "pg_collection" in known


def test_the_optimizer_takes_groups():
    assert {"config", "model_chunks", "config_overrides", "use_gloo_process_groups", "pg_collection"} <= set(
        parameters(get_megatron_optimizer)
    )
    for owner, names in {
        MixedPrecisionOptimizer: ("prepare_grads",),
        DistributedOptimizer: (
            "_copy_model_grads_to_main_grads",
            "_collect_main_grad_data_for_unscaling",
            "sharded_param_state_fully_reshardable",
            "load_parameter_state_from_fully_reshardable",
        ),
        ChainedOptimizer: ("step", "get_grad_norm", "count_zeros", "_compute_grad_norms_by_group"),
    }.items():
        for name in names:
            assert callable(getattr(owner, name)), (owner, name)


def test_gradient_scales_are_where_they_are_set():
    assert "gradient_scaling_factor" in parameters(_ParamAndGradBuffer.__init__)
    assert "bucket.gradient_scaling_factor" in inspect.getsource(
        inspect.getmodule(_ParamAndGradBuffer)._ParamAndGradBucketGroup.start_grad_sync
    )


def test_the_facade_has_the_whole_interface_of_ddp():
    """A method that Megatron adds to its DDP must be looked at: inherited, it would see no buffers."""
    public = {
        name
        for name, value in vars(DistributedDataParallel).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert public <= set(vars(PlannedDataParallel)), public - set(vars(PlannedDataParallel))


def test_random_streams_have_the_names_they_had():
    assert megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME == MODEL_PARALLEL_STREAM


def test_latent_attention_asks_where_it_is_replaced():
    """The planned class computes the latents and picks the class of queries in Megatron's place."""
    source = inspect.getsource(MLASelfAttention)
    assert "q_compressed, kv_combined = self._qkv_down_projection(hidden_states)" in source
    assert "layer_classes = self._resolve_qk_norm_config(submodules)" in source
    # With whole latents Megatron gathers nothing over its own group.
    assert "if kv_combined.size(-1) != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim" in source


def test_planned_layers_are_megatron_layers():
    planned = planned_class(TransformerLayer)
    assert issubclass(planned, TransformerLayer)
    assert issubclass(planned, PlannedLayer)
    assert planned is planned_class(TransformerLayer)


def test_refused_arguments_are_arguments_of_megatron():
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = vars(parser.parse_args([])).keys()
    # Set in other ways than by an option of that name, or not in every installation.
    derived = {"fp8", "fp4", "gtp_weight_remat_size", "use_layer_wise_distributed_optimizer"}
    derived |= {"kitchen_config_file", "kitchen_recipe_number"}  # where kitchen is installed
    unknown = {name for name, *_ in support._REFUSED} | set(support.CHANGING_BATCH)
    unknown -= known | derived
    assert not unknown
