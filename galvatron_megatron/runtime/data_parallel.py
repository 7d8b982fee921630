"""Data parallelism where layers differ: one Megatron DDP per class of parameters behind one facade."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from galvatron_megatron.runtime.context import RuntimeContext, StateClass
from galvatron_megatron.runtime.layers import PlannedLayer
from galvatron_megatron.runtime.zero import ZeroPart, is_deepspeed


class ParameterView(torch.nn.Module):
    """A model seen through one class of its parameters: what a DDP of that class may touch."""

    def __init__(self, model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> None:
        """Shows some parameters of a model under their own names.

        Args:
            model: the model chunk.
            parameters: those to show.
        """
        super().__init__()
        self._model = [model]  # in a list: not registered as a submodule
        self._shown = {id(parameter) for parameter in parameters}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The shown parameters, named as in the model."""
        for name, parameter in self._model[0].named_parameters(*args, **kwargs):
            if id(parameter) in self._shown:
                yield name, parameter

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """The shown parameters, in the model's order."""
        for _, parameter in self.named_parameters(recurse=recurse):
            yield parameter

    def modules(self) -> Iterator[torch.nn.Module]:
        """The modules that own a shown parameter: a DDP's forward hooks go there and nowhere else."""
        for module in self._model[0].modules():
            if any(id(parameter) in self._shown for parameter in module.parameters(recurse=False)):
                yield module

    def apply(self, function: Callable[[torch.nn.Module], None]) -> "ParameterView":
        """Applies a function to the modules that own a shown parameter."""
        for module in self.modules():
            function(module)
        return self


class ClassDataParallel(DistributedDataParallel):
    """Megatron's DDP of one class of parameters; to its optimizer these are the whole model chunk."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters of the class, named as in the wrapped model chunk."""
        for name, parameter in self.module.named_parameters(*args, **kwargs):
            yield f"module.{name}", parameter


def parameters_by_class(
    model: torch.nn.Module, base: StateClass, classes: tuple[StateClass, ...]
) -> dict[StateClass, list[torch.nn.Parameter]]:
    """The trainable parameters of a model chunk by class.

    Args:
        model: the chunk, with planned layers.
        base: class of everything outside planned layers.
        classes: all classes, in the order in which every rank handles them.
    """
    owner: dict[int, StateClass] = {}
    for module in model.modules():
        if isinstance(module, PlannedLayer):
            owner.update(dict.fromkeys(map(id, module.parameters()), module.state_class))
            owner.update(dict.fromkeys(map(id, module.expert_parameters), module.expert_class))
    found: dict[StateClass, list[torch.nn.Parameter]] = {state_class: [] for state_class in classes}
    for parameter in model.parameters():
        if parameter.requires_grad:
            found[owner.get(id(parameter), base)].append(parameter)
    return found


def class_ddp_config(ddp_config: Any, state_class: StateClass) -> Any:
    """Megatron's DDP config for one class: states sharded or not.

    Args:
        ddp_config: of the job.
        state_class: the class.
    """
    own = copy.copy(ddp_config)
    own.use_distributed_optimizer = state_class.zero > 0
    own.overlap_param_gather = ddp_config.overlap_param_gather and state_class.zero > 0
    return own


class PlannedDataParallel(DistributedDataParallel):
    """Megatron's DDP interface over one DDP per class of parameters.

    Gradients of a class are summed over the ranks that hold the same weight shard and scaled by one over the
    BASE data-parallel degree: the loss is averaged over base data-parallel ranks, whatever a layer's own is.
    """

    def __init__(
        self,
        config: Any,
        ddp_config: Any,
        module: torch.nn.Module,
        disable_bucketing: bool = False,
        pg_collection: Any = None,
        full_param_layout: Any = None,
        *,
        runtime: RuntimeContext,
    ) -> None:
        """Wraps a model chunk; the arguments are those of Megatron's DDP.

        Args:
            config: Megatron's transformer config.
            ddp_config: Megatron's DDP config.
            module: the model chunk.
            disable_bucketing: one bucket for all parameters of a class.
            pg_collection: Megatron's groups; those of the plan are used.
            full_param_layout: of the whole chunk; each class gets its own.
            runtime: the plan on this rank.
        """
        del pg_collection, full_param_layout
        _BaseDataParallel.__init__(self, config=config, module=module)
        self.ddp_config = ddp_config
        self._runtime = runtime
        base = StateClass.of(runtime.plan.base)
        groups = parameters_by_class(module, base, runtime.state_classes)
        scale = 1.0 if config.calculate_per_token_loss else 1.0 / runtime.groups.dp_cp.size()
        self.parts: dict[StateClass, DistributedDataParallel | ZeroPart] = {
            state_class: _build_part(
                config, ddp_config, module, disable_bucketing, runtime, state_class, parameters, scale
            )
            for state_class, parameters in groups.items()
        }
        """One DDP per class of the plan, in an order equal on all ranks; empty where the chunk has none."""
        self._zero_parts = [part for part in self.parts.values() if isinstance(part, ZeroPart)]
        parts = self.parts.values()
        self.buffers = [buffer for part in parts for buffer in part.buffers]
        self.expert_parallel_buffers = []
        self.bucket_groups = [group for part in parts for group in part.bucket_groups]
        self.expert_parallel_bucket_groups = []
        self.params_with_grad = [parameter for part in parts for parameter in part.params_with_grad]
        self.param_to_bucket_group = {}
        for part in parts:
            self.param_to_bucket_group.update(part.param_to_bucket_group)
        own = self.parts[base]
        self.dp_group, self.dp_cp_group, self.intra_dp_cp_group = own.dp_group, own.dp_cp_group, own.dp_cp_group
        self.tp_group, self.pp_group, self.ep_group = own.tp_group, own.pp_group, own.ep_group
        self.expt_dp_group = self.intra_expt_dp_group = own.expt_dp_group
        self.bucket_size = own.bucket_size
        self._summed_over_tp = _partial_gradients(module, self._zero_parts)
        _gather_ahead(module, [part for part in parts if isinstance(part, DistributedDataParallel)])

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model chunk; its backward pass is announced to ZeRO's engines.

        Args:
            *inputs: of the chunk.
            **kwargs: of the chunk.
        """
        output = super().forward(*inputs, **kwargs)
        if self._zero_parts and isinstance(output, torch.Tensor) and output.requires_grad:
            # Of all schedules only autograd knows when a chunk's backward pass runs, and when it is over.
            output.register_hook(self._backward_begins)
        return output

    def _backward_begins(self, gradient: torch.Tensor) -> None:
        for part in self._zero_parts:
            part.begin_backward()
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        for part in self._zero_parts:
            part.end_backward()

    @property
    def force_all_reduce(self) -> bool:
        """All-reduce gradients also where the distributed optimizer would reduce-scatter them."""
        return any(part.force_all_reduce for part in self.parts.values())

    @force_all_reduce.setter
    def force_all_reduce(self, value: bool) -> None:
        for part in self.parts.values():
            part.force_all_reduce = value

    @property
    def overlap_param_gather_with_optimizer_step(self) -> bool:
        """Refused with mixed layers, hence False."""
        return False

    @property
    def remove_forward_pre_hook_handles(self) -> dict[torch.nn.Module, Any]:
        """Handles of the forward hooks of all parts."""
        return {
            module: handle
            for part in self._gathering_parts()
            for module, handle in part.remove_forward_pre_hook_handles.items()
        }

    def _gathering_parts(self) -> list[DistributedDataParallel]:
        return [part for part in self.parts.values() if part.use_forward_hook]

    def enable_forward_pre_hook(self) -> None:
        """Enables parameter gathering in front of the modules that need it."""
        for part in self._gathering_parts():
            part.enable_forward_pre_hook()

    def disable_forward_pre_hook(self, param_sync: bool = True) -> None:
        """Disables parameter gathering in front of modules.

        Args:
            param_sync: gather all parameters now.
        """
        for part in self._gathering_parts():
            part.disable_forward_pre_hook(param_sync=param_sync)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulates gradients without reducing them."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.no_sync())
            yield

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """Gathers parameters of classes whose states are sharded."""
        for part in self.parts.values():
            if part.ddp_config.use_distributed_optimizer:
                part.start_param_sync(force_sync=force_sync, force_dispatch=force_dispatch)

    def start_grad_sync(self, *unused: Any) -> None:
        """Starts reducing gradients."""
        for part in self.parts.values():
            part.start_grad_sync()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Finishes reducing gradients, each class over its own ranks and partial ones over their tp group."""
        for part in self.parts.values():
            part.finish_grad_sync(force_all_reduce=force_all_reduce)
        self.sum_partial_gradients()

    def sum_partial_gradients(self) -> None:
        """Sums the gradients that each tp rank of a layer computes in part over that layer's tp group."""
        for group, parameters in self._summed_over_tp:
            gradients = [parameter.main_grad for parameter in parameters]
            flat = _flatten_dense_tensors(gradients)
            dist.all_reduce(flat, group=group)
            for gradient, total in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(total)

    @property
    def use_forward_hook(self) -> bool:
        """Whether parameters are gathered in front of the modules that need them."""
        return bool(self._gathering_parts())


def _for_each_part(name: str) -> Callable[..., None]:
    """A method that calls the one of the same name of every part."""

    def method(self: PlannedDataParallel, *args: Any, **kwargs: Any) -> None:
        for part in self.parts.values():
            getattr(part, name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = getattr(DistributedDataParallel, name).__doc__
    return method


for _name in (
    "reset_param_sync_dispatch_state",
    "free_overlap_buffers",
    "scale_gradients",
    "zero_grad_buffer",
    "broadcast_params",
    "offload_grad_buffers",
    "restore_grad_buffers",
):
    setattr(PlannedDataParallel, _name, _for_each_part(_name))


def _build_part(
    config: Any,
    ddp_config: Any,
    module: torch.nn.Module,
    disable_bucketing: bool,
    runtime: RuntimeContext,
    state_class: StateClass,
    parameters: list[torch.nn.Parameter],
    scale: float,
) -> DistributedDataParallel | ZeroPart:
    """What reduces one class of a chunk's gradients, with the gradient scale of the base layout."""
    own = class_ddp_config(ddp_config, state_class)
    groups = runtime.collection(state_class)
    if is_deepspeed(state_class, runtime.zero_backend):
        return ZeroPart(module, parameters, groups, own, scale)
    options = {}
    if own.use_distributed_optimizer:
        bucket_size = own.bucket_size if own.overlap_grad_reduce else None
        if disable_bucketing or groups.pp.rank() > 0:
            bucket_size = None
        options["full_param_layout"] = DistributedOptimizer.compute_full_param_layout(
            parameters, bucket_size, groups.dp_cp.size(), own
        )
    part = ClassDataParallel(
        config=config,
        ddp_config=own,
        module=ParameterView(module, parameters),
        disable_bucketing=disable_bucketing,
        pg_collection=groups,
        **options,
    )
    for buffer in part.buffers:
        buffer.gradient_scaling_factor = scale
        for bucket in buffer.buckets:
            bucket.gradient_scaling_factor = scale
    return part


def _gather_ahead(module: torch.nn.Module, parts: list[DistributedDataParallel]) -> None:
    """Lets the gathering of each bucket of parameters start while the layers in front compute and reshard.

    Megatron starts the next bucket's when it has waited for one, which each DDP knows of its own buckets alone:
    a layer whose neighbours are of other classes would start its own when it needs it, and wait.
    """
    place = {id(parameter): index for index, parameter in enumerate(module.parameters())}
    gathered = [group for part in parts if part.ddp_config.overlap_param_gather for group in part.bucket_groups]
    gathered.sort(key=lambda group: min(place[id(parameter)] for parameter in group.params))
    for group, following in zip(gathered, [*gathered[1:], None], strict=False):
        group.next_param_gather_bucket_group = following


def _partial_gradients(
    module: torch.nn.Module, zero_parts: list[ZeroPart]
) -> list[tuple[dist.ProcessGroup, list[torch.nn.Parameter]]]:
    """Parameters with partial gradients, by the tp group over which they are summed.

    Those whose gradients ZeRO's engines keep are left to them.
    """
    owner = {id(parameter): part for part in zero_parts for parameter in part.parameters}
    found: dict[dist.ProcessGroup, list[torch.nn.Parameter]] = {}
    for layer in module.modules():
        if isinstance(layer, PlannedLayer) and layer.tensor_group.size() > 1:
            parameters = [parameter for parameter in layer.summed_over_tp if parameter.requires_grad]
            part = owner.get(id(parameters[0])) if parameters else None
            if part is not None:  # a layer's parameters are all of one class
                part.sum_over(layer.tensor_group, parameters)
            else:
                found.setdefault(layer.tensor_group, []).extend(parameters)
    return [(group, parameters) for group, parameters in found.items() if parameters]
