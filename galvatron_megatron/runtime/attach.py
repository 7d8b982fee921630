"""Attaches a plan to Megatron's training loop.

Megatron has public seams for most of what a plan needs: ``ModuleSpec`` for the layers, process-group
collections for their groups, subclasses of its DDP and its chained optimizer. Nine names have none, because
Megatron builds these objects from its own imports; they are replaced here and nowhere else, while a plan is
attached (megatron-core 0.19; ``tests/runtime/test_attach.py`` notices when one of them moves):

* ``GPTModel.__init__`` and ``HybridModel.__init__``: hand the layer specs over in wrapped form;
* ``DistributedDataParallel`` as ``megatron.training`` imports it (two modules);
* ``get_megatron_optimizer`` as ``megatron.training.training`` imports it;
* ``load_checkpoint`` likewise: it puts the random states of one rank onto others;
* ``_build_sharded_state_dict_metadata`` of ``megatron.training.checkpointing``: describes what is saved;
* ``generate_state_dict`` there: it gathers what is saved, to which each rank's random streams are added, and of
  which an asynchronous writer gets copies;
* ``_load_base_checkpoint`` there: it says what a checkpoint holds, and hands over what was loaded;
* ``TorchDistLoadShardedStrategy.load``: reads a rank's part, at which one rank alone may fail.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import transformer_block
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from megatron.training import checkpointing, training
from megatron.training.models import dist_utils

from galvatron_megatron.errors import UnsupportedPlanError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.serialization import plan_to_dict
from galvatron_megatron.runtime import checkpoint_async
from galvatron_megatron.runtime.checkpoint import CONTENT, ReshardableOptimizer, describe_loaded
from galvatron_megatron.runtime.checkpoint_checks import CheckedLoading
from galvatron_megatron.runtime.context import RuntimeContext
from galvatron_megatron.runtime.data_parallel import PlannedDataParallel
from galvatron_megatron.runtime.layers import planned_spec
from galvatron_megatron.runtime.norms import allow_sequence_parallel
from galvatron_megatron.runtime.optimizer import PlannedOptimizer, build_optimizer
from galvatron_megatron.runtime.saved_streams import SavedStreams
from galvatron_megatron.runtime.support import check_stage, check_supported
from galvatron_megatron.runtime.zero import ZeroPart, is_left_to_megatron, uses_deepspeed

HOOKED: tuple[tuple[Any, str], ...] = (
    (GPTModel, "__init__"),
    (HybridModel, "__init__"),
    (dist_utils, "DistributedDataParallel"),
    (training, "DDP"),
    (training, "get_megatron_optimizer"),
    (training, "load_checkpoint"),
    (checkpointing, "_build_sharded_state_dict_metadata"),
    (checkpointing, "generate_state_dict"),
    (checkpointing, "_load_base_checkpoint"),
    (TorchDistLoadShardedStrategy, "load"),
)
"""Every attribute of Megatron that is replaced while a plan is attached."""

_attached: "Attachment | None" = None


class Attachment:
    """A plan attached to this process's Megatron."""

    def __init__(self, plan: Plan, args: Any) -> None:
        """Replaces the hooked names.

        Args:
            plan: the plan.
            args: Megatron's arguments.
        """
        self.plan = plan
        self._args = args
        self._context: RuntimeContext | None = None
        self._models: weakref.WeakSet[PlannedDataParallel] = weakref.WeakSet()
        self._originals = {hook: getattr(*hook) for hook in HOOKED}
        for (owner, name), replacement in self._replacements().items():
            setattr(owner, name, replacement)

    def _replacements(self) -> dict[tuple[Any, str], Any]:
        """What stands in the place of hooked names; the others stay as they are."""
        checked = CheckedLoading()
        read = checkpointing._load_base_checkpoint
        found: dict[tuple[Any, str], Any] = {
            (TorchDistLoadShardedStrategy, "load"): checked.hook_load(TorchDistLoadShardedStrategy.load)
        }
        if is_left_to_megatron(self.plan, self._args):
            if _can_reshard(self._args):
                found[training, "get_megatron_optimizer"] = _adopt_optimizer(training.get_megatron_optimizer)
                read = describe_loaded(read, runs_alike=True)
            return found | {
                (checkpointing, "generate_state_dict"): checkpoint_async.hook_generate(
                    checkpointing.generate_state_dict
                ),
                (checkpointing, "_load_base_checkpoint"): checked.hook_read(read),
            }
        streams = SavedStreams(self.plan, lambda: self.context.streams)
        # One class under both names: the training loop asks whether what the other one built is of its own.
        data_parallel = self._data_parallel_class()
        return found | {
            (GPTModel, "__init__"): self._hook_gpt(GPTModel.__init__),
            (HybridModel, "__init__"): self._hook_hybrid(HybridModel.__init__),
            (dist_utils, "DistributedDataParallel"): data_parallel,
            (training, "DDP"): data_parallel,
            (training, "get_megatron_optimizer"): self._build_optimizer,
            (training, "load_checkpoint"): streams.hook_load(training.load_checkpoint),
            (checkpointing, "_build_sharded_state_dict_metadata"): _describe_content(
                checkpointing._build_sharded_state_dict_metadata, {**CONTENT, **streams.content}
            ),
            (checkpointing, "generate_state_dict"): checkpoint_async.hook_generate(
                streams.hook_generate(checkpointing.generate_state_dict)
            ),
            (checkpointing, "_load_base_checkpoint"): streams.hook_read(
                checked.hook_read(describe_loaded(read, runs_alike=False))
            ),
        }

    @property
    def context(self) -> RuntimeContext:
        """The plan on this rank; its groups are created at first use, by all ranks together."""
        if self._context is None:
            self._context = RuntimeContext.create(self.plan, self._args)
        return self._context

    def detach(self, *, keep_groups: bool = False) -> None:
        """Puts Megatron back as it was and destroys the plan's groups; its models cannot be trained on.

        Args:
            keep_groups: leave the plan's groups to a model that is still in use.
        """
        for (owner, name), original in self._originals.items():
            setattr(owner, name, original)
        if self._context is not None and not keep_groups:
            for model in self._models:
                _let_go(model)
            self._context.destroy()
            self._context = None

    def _hook_gpt(self, original: Callable[..., None]) -> Callable[..., None]:
        @wraps(original)
        def build(model: Any, config: Any, transformer_layer_spec: Any, *args: Any, **kwargs: Any) -> None:
            groups = kwargs.get("pg_collection") or self.context.groups
            specs = _gpt_layers(config, transformer_layer_spec, kwargs.get("vp_stage"), groups)
            chunk, position = kwargs.get("vp_stage"), get_pg_rank(groups.pp)
            offset = get_transformer_layer_offset(config, chunk, position)
            check_stage(self.plan, offset, len(specs.layer_specs), position, chunk or 0)
            planned = TransformerBlockSubmodules(
                layer_specs=[
                    planned_spec(spec, self.context, offset + index)
                    for index, spec in enumerate(specs.layer_specs)
                ],
                layer_norm=allow_sequence_parallel(specs.layer_norm),
            )
            original(model, _without_named_reductions(config), planned, *args, **kwargs)

        return build

    def _hook_hybrid(self, original: Callable[..., None]) -> Callable[..., None]:
        @wraps(original)
        def build(model: Any, config: Any, hybrid_stack_spec: ModuleSpec, *args: Any, **kwargs: Any) -> None:
            layers = hybrid_stack_spec.submodules
            planned = {
                name: planned_spec(getattr(layers, name), self.context)
                for name in ("attention_layer", "mla_layer", "mlp_layer", "moe_layer", "mamba_layer")
                if isinstance(getattr(layers, name), ModuleSpec)
            }
            spec = ModuleSpec(
                module=hybrid_stack_spec.module,
                params=hybrid_stack_spec.params,
                submodules=dataclasses.replace(layers, **planned),
            )
            original(model, _without_named_reductions(config), spec, *args, **kwargs)

        return build

    def _data_parallel_class(self) -> type[PlannedDataParallel]:
        attachment = self

        class AttachedDataParallel(PlannedDataParallel):
            """Megatron's DDP for the attached plan."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, runtime=attachment.context, **kwargs)
                attachment._models.add(self)

        return AttachedDataParallel

    def _build_optimizer(
        self, config: Any, model_chunks: list[Any], config_overrides: Any = None, **options: Any
    ) -> PlannedOptimizer:
        """Stands in for ``get_megatron_optimizer``."""
        return build_optimizer(config, model_chunks, config_overrides, self.context)


def install(plan: Plan, args: Any) -> None:
    """Makes Megatron run a plan; called on every rank before Megatron builds the model.

    A plan that Megatron's arguments reproduce is run by Megatron's own code, which also saves its checkpoints,
    with Megatron's option for states that every plan can load. It loads what any plan saved.

    Args:
        plan: the plan.
        args: Megatron's arguments, set to the plan's base layout and schedule.

    Raises:
        UnsupportedPlanError: the runtime cannot execute the plan.
    """
    global _attached
    if _attached is not None:
        raise UnsupportedPlanError("a plan is attached already; valid: one plan per job")
    check_supported(plan, args)
    if uses_deepspeed(plan, args):
        args.gradient_accumulation_fusion = False  # adds to buffers that ZeRO's engines do not have
    if is_left_to_megatron(plan, args) and args.use_distributed_optimizer and _can_reshard(args):
        args.dist_ckpt_optim_fully_reshardable = True
    args.galvatron_attached_plan = plan_to_dict(plan)  # Megatron stores its arguments in every checkpoint
    _attached = Attachment(plan, args)


def attached() -> Attachment | None:
    """What is attached to this process, or None."""
    return _attached


def uninstall() -> None:
    """Puts Megatron back as it was; does nothing where no plan is attached."""
    global _attached
    if _attached is not None:
        _attached.detach()
        _attached = None


def _let_go(model: PlannedDataParallel) -> None:
    """Lets a model be collected, with the groups it refers to and the threads of their communicators.

    Megatron's training loop hangs the optimizer onto the model's config. The distributed optimizer's shards of
    fp32 parameters are views, which hold nodes of autograd whose hooks hold the model: a circle that leaves
    Python, which no garbage collection finds. So do ZeRO's engines.
    """
    model.config.grad_scale_func = None
    for part in model.parts.values():
        if isinstance(part, ZeroPart):
            part.let_go()


def _adopt_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizer, which loads what every plan saves."""

    @wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        return ReshardableOptimizer.adopt(original(*args, **kwargs))

    return build


def _describe_content(original: Callable[..., dict], content: dict[str, Any]) -> Callable[..., dict]:
    """Says in checkpoints what they hold besides what Megatron says."""

    @wraps(original)
    def build(*args: Any, **kwargs: Any) -> dict:
        return {**original(*args, **kwargs), **content}

    return build


def _can_reshard(args: Any) -> bool:
    """Whether the states of a stock job can have the form that every plan can load."""
    in_the_way = (
        "use_precision_aware_optimizer",
        "optimizer_cpu_offload",
        "use_megatron_fsdp",
        "use_torch_fsdp2",
        "mtp_num_layers",
        "fp8",
        "fp4",
    )
    return (
        args.optimizer == "adam"
        and args.ckpt_format == "torch_dist"
        and not any(getattr(args, name, None) for name in in_the_way)
    )


def _gpt_layers(config: Any, spec: Any, vp_stage: int | None, groups: Any) -> TransformerBlockSubmodules:
    """The layer specs of a GPT chunk, however Megatron's builder gave them."""
    if isinstance(spec, TransformerBlockSubmodules):
        return spec
    if isinstance(spec, ModuleSpec) and issubclass(spec.module, BaseTransformerLayer):
        count = get_num_layers_to_build(config, vp_stage, get_pg_rank(groups.pp))
        return TransformerBlockSubmodules(
            layer_specs=[spec] * count, layer_norm=transformer_block.LayerNormImpl
        )
    raise UnsupportedPlanError(f"layer spec {spec!r}: valid: the spec of a transformer layer or of a block")


def _without_named_reductions(config: Any) -> Any:
    """The model's config without what makes Megatron sum gradients of planned layers by their names.

    ``finalize_model_grads`` sums everything called q_layernorm or k_layernorm over the base tp group if the
    config says ``qk_layernorm``. Layers take these norms from their specs; the facade sums their gradients.
    """
    own = copy.copy(config)
    own.planned_qk_layernorm, own.qk_layernorm = config.qk_layernorm, False
    return own
