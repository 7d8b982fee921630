"""DeepSpeed's ZeRO optimizers, driven from outside: when to reduce, norm, clipping and scale are the caller's.

DeepSpeed ties these to its engine, which cannot run Megatron's schedules and knows one data-parallel group and
one stage. Its optimizer classes themselves need neither: one of them serves the parameters of one model chunk
that share stage and group. Imported only where a plan needs it, because importing DeepSpeed takes seconds, and
by ``import_engines``, which tells DeepSpeed the device.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
    OffloadDeviceEnum,
)
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.timer import NoopTimer

from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.runtime.zero_whole import STAYS_WHOLE

_EVEN_BUCKET = 2
"""DeepSpeed wants all-gather buckets that are a multiple of two elements."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Piece:
    """A stretch of one parameter's elements whose states this rank keeps."""

    parameter: torch.nn.Parameter
    """Of the model."""
    start: int
    """First element, in the parameter laid out flat."""
    length: int
    """Elements."""
    partition: int
    """Which of the engine's flat partitions holds them."""
    offset: int
    """First element inside that partition."""


@dataclass(kw_only=True, frozen=True, slots=True)
class EngineOptions:
    """What an engine has to know besides its parameters."""

    group: dist.ProcessGroup
    """Ranks that hold the same weight shards."""
    gradient_dtype: torch.dtype
    """In which gradients are accumulated."""
    communication_dtype: torch.dtype
    """In which they are reduced."""
    bucket_elements: int
    """Elements that are reduced, or gathered, at once."""
    scale: float = 1.0
    """What gradients are multiplied by in front of every reduction: in 16 bits a sum over many replicas, scaled
    afterwards, would overflow."""
    overlaps: bool = False
    """ZeRO 2 and 3 reduce on a stream of their own beside the backward pass, where the device has streams."""
    offload: Offload = Offload.NONE
    """What lies in host memory: the host then steps; gradients stay on the device until it does."""
    pinned: bool = False
    """Host memory is page-locked, for copies to and from a device of its own memory."""

    @property
    def host_optimizer(self) -> DeepSpeedZeroOffloadOptimizerConfig | None:
        """DeepSpeed's settings for optimizer states in host memory."""
        if self.offload is Offload.NONE:
            return None
        return DeepSpeedZeroOffloadOptimizerConfig(device=OffloadDeviceEnum.cpu, pin_memory=self.pinned)

    @property
    def host_parameters(self) -> DeepSpeedZeroOffloadParamConfig | None:
        """DeepSpeed's settings for weights in host memory."""
        if self.offload is not Offload.PARAMETERS:
            return None
        return DeepSpeedZeroOffloadParamConfig(device=OffloadDeviceEnum.cpu, pin_memory=self.pinned)


def connect() -> None:
    """Lets DeepSpeed use the process groups that are there; compiles nothing."""
    if deepspeed_comm.cdb is not None:
        return
    # The shared-memory operators for CPU ranks would be compiled here and now, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed.comm.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False
    )


class _Common:
    """What both kinds of engine do alike."""

    def begin_backward(self) -> None:
        """A backward pass through the chunk starts."""
        self.clear_backward_seen_flag()
        self.set_gradient_accumulation_boundary(False)
        self.backward_prologue()
        self.enter_backward()

    def apply(self) -> None:
        """Steps with the gradients as they are and brings the new weights to all ranks."""
        if self.offloads:
            for index, main in enumerate(self.partitions):
                main.grad.copy_(self.gradient(index))
        self.step()

    def reload(self) -> None:
        """Takes the model's weights over into the main weights."""
        self.refresh_fp32_params()


class ShardedStatesEngine(_Common, DeepSpeedZeroOptimizer):
    """ZeRO 1 (gradients reduced once per step) and 2 (reduced after every micro-batch, kept in part)."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: dict[Any, str], stage: int, options: EngineOptions
    ) -> None:
        """Takes over the parameters of an optimizer.

        Args:
            optimizer: over the model's parameters; DeepSpeed puts flat fp32 partitions in their place.
            names: of the parameters.
            stage: 1 or 2.
            options: groups and sizes.
        """
        super().__init__(
            optimizer,
            names,
            timers=NoopTimer(),
            optimizer_params=None,
            verbose=False,
            dp_process_group=options.group,
            partition_grads=stage == 2,
            gradient_average=False,
            clip_grad=0.0,
            offload_optimizer_config=options.host_optimizer,
            compute_grad_norm=options.offload is not Offload.NONE,
            check_grad_overflow=False,
            gradient_accumulation_dtype=options.gradient_dtype,
            communication_data_type=options.communication_dtype,
            reduce_bucket_size=options.bucket_elements,
            # Stage 1 reduces behind the last backward pass, and is not told beforehand which one that is.
            overlap_comm=options.overlaps and stage == 2,
            allgather_bucket_size=options.bucket_elements // _EVEN_BUCKET * _EVEN_BUCKET or _EVEN_BUCKET,
        )
        self._scale = options.scale
        self.offloads = options.offload is not Offload.NONE
        rank = dist.get_rank(options.group)
        if self.offloads:
            # For gradients that DeepSpeed adds up on the host; here they are added up on the device.
            self.temp_grad_buffer_for_cpu_offload = self.temp_grad_buffer_for_gpu_offload = None
        else:
            for weights, main in zip(
                self.parallel_partitioned_bit16_groups, self.single_partition_of_fp32_groups, strict=True
            ):
                _share_storage(weights[rank], main)
        self.pieces = tuple(self._find_pieces())

    def _find_pieces(self) -> Iterator[Piece]:
        for index, parameters in enumerate(self.params_in_partition):
            rank = dist.get_rank(self.real_dp_process_group[index])
            for parameter in parameters:
                number = self.get_param_id(parameter)
                start = int(self.grad_start_offset[index][rank][number])
                offset = int(self.grad_partition_insertion_offset[index][rank][number])
                length = min(parameter.numel() - start, int(self.partition_size[index]) - offset)
                if length > 0:
                    yield Piece(parameter=parameter, start=start, length=length, partition=index, offset=offset)

    def allreduce_bucket(
        self, bucket: list[torch.Tensor], communication_data_type: torch.dtype, **kwargs: Any
    ) -> torch.Tensor:
        """Scales gradients, each of which comes here once, and reduces them; on the stream that reduces.

        DeepSpeed would divide them by its own number of ranks, which is not that of the base layout. They are
        scaled in the wider of the types in which they were collected and are reduced.
        """
        flat = self.flatten(bucket)
        if self._scale != 1.0:
            wider = torch.promote_types(flat.dtype, communication_data_type)
            flat = flat.to(wider).mul_(self._scale)
        return super().allreduce_bucket([flat], communication_data_type, **kwargs)

    def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
        """Always: otherwise fp32 gradients of all parameters that touch the partition are kept whole."""
        return True

    def copy_grads_in_partition(self, param: torch.nn.Parameter, group_idx: int | None = None) -> None:
        """Nothing to copy: the buffer of the partition has it; DeepSpeed would offload it piece by piece."""
        if self.use_grad_accum_attribute:
            self.clear_grad_attribute(param)

    def scaled_global_norm(self, norm_type: int = 2) -> torch.Tensor:
        """Clipping is done before the step; DeepSpeed, which offloads only with a norm, wants a finite one."""
        return torch.ones(())

    @property
    def partitions(self) -> list[torch.Tensor]:
        """Flat fp32 main weights of this rank."""
        return self.single_partition_of_fp32_groups

    @property
    def all_parameters(self) -> list[torch.nn.Parameter]:
        """The model's parameters, in an order equal on all ranks of the group."""
        return [parameter for group in self.bit16_groups for parameter in group]

    def gradient(self, partition: int) -> torch.Tensor:
        """Flat gradient of a partition, complete after ``finish_accumulation``."""
        return self.averaged_gradients[partition].flat_partition

    def end_backward(self) -> None:
        """The backward pass is over: stage 2 reduces what it has not reduced yet, and waits for all of it."""
        self.backward_epilogue()
        if self.partition_gradients:
            self.overlapping_partition_gradients_reduce_epilogue()
        self.exit_backward()

    def finish_accumulation(self) -> None:
        """All micro-batches are through: gradients become complete."""
        self.set_gradient_accumulation_boundary(True)
        if not self.partition_gradients:
            self.setup_buckets()
            self.reduce_gradients()
        self.finalize_gradient_accumulation_boundary()
        for index in range(len(self.bit16_groups)):
            self._get_compact_grad_partition_buffer(index)  # there, whether anything was added to it or not

    def forget_gradients(self) -> None:
        """Before the first micro-batch of a step."""
        self.zero_grad()
        for index in range(len(self.bit16_groups)):
            self.averaged_gradients[index] = self.all_grad_tensors[index] = None


class ShardedParametersEngine(_Common, DeepSpeedZeroOptimizer_Stage3):
    """ZeRO 3: every rank keeps a part of each parameter; modules gather what they need and let it go again."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: dict[Any, str],
        modules: list[torch.nn.Module],
        borrowers: list[tuple[torch.nn.Module, torch.nn.Parameter]],
        options: EngineOptions,
        whole: Iterable[torch.nn.Parameter] = (),
    ) -> None:
        """Takes over the parameters of an optimizer and shards them.

        Args:
            optimizer: over the model's parameters; DeepSpeed puts flat fp32 partitions in their place.
            names: of the parameters.
            modules: which hold these parameters and no others.
            borrowers: modules that compute with a parameter of another module, and that parameter.
            options: groups and sizes.
            whole: those of the parameters that every rank has whole while it runs a step.
        """
        for parameter in names:
            parameter.ds_zero_partition_process_group = options.group
        self._divisor = 1.0 / options.scale
        held = {id(part) for module in modules for part in module.modules()}
        outside = [module for module, _ in borrowers if id(module) not in held]
        with _without_world_barriers(), _hooks_where_parameters_are({id(module) for module, _ in borrowers}):
            super().__init__(
                torch.nn.ModuleList([*modules, *outside]),
                optimizer,
                names,
                timers=NoopTimer(),
                ds_config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}},
                verbose=False,
                dp_process_group=options.group,
                offload_optimizer_config=options.host_optimizer,
                offload_param_config=options.host_parameters,
                offload_ratio=1.0,  # of the optimizer states: all of them, where any are offloaded
                clip_grad=0.0,
                gradient_accumulation_dtype=options.gradient_dtype,
                communication_data_type=options.communication_dtype,
                reduce_bucket_size=options.bucket_elements,
                overlap_comm=options.overlaps,
                param_persistence_threshold=0,  # in vain without DeepSpeed's trace, see ``_keep_whole``
                prefetch_bucket_size=0,
                max_live_parameters=0,
                max_reuse_distance=0,
            )
        for module, parameter in borrowers:
            deepspeed.zero.register_external_parameter(module, parameter)
        self._overlaps = options.overlaps
        self.whole: list[torch.nn.Parameter] = []
        self.leave_whole(whole)
        self.offloads = options.offload is not Offload.NONE
        if self.offloads:
            self._accumulate_on_device()
        if options.offload is not Offload.OPTIMIZER:
            for weights, main in zip(
                self.fp16_partitioned_groups_flat, self.fp32_partitioned_groups_flat, strict=True
            ):
                _share_storage(weights, main)
        self.pieces = tuple(self._find_pieces())

    def leave_whole(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Says which parameters stay whole from their next use on, and behind every step.

        Args:
            parameters: of the engine; all others are sharded again when the module that uses them is through.
        """
        for parameter in self.whole:
            parameter.ds_active_sub_modules.discard(STAYS_WHOLE)
        self.whole = list(parameters)
        self._keep_whole()

    def _keep_whole(self) -> None:
        """Keeps small parameters from being let go when a module has used them, until the next step.

        DeepSpeed heeds its own thresholds only where it has a trace of one whole step, which Megatron's
        schedules do not repeat pass by pass. It lets nothing go that a module uses; here one never ends.
        """
        for parameter in self.whole:
            parameter.ds_active_sub_modules.add(STAYS_WHOLE)

    def apply(self) -> None:
        """Steps with the gradients as they are; what stays whole is gathered behind it, all at once."""
        super().apply()
        if self._overlaps:
            # The stream on which parameters are gathered then does not wait for the one that has stepped.
            deepspeed.accelerator.get_accelerator().synchronize()
        if self.whole:
            self.whole[0].all_gather_coalesced(self.whole).wait()
            self._keep_whole()

    def reload(self) -> None:
        """Takes the model's weights over into the main weights; what stays whole is gathered anew."""
        for parameter in self.whole:
            parameter.ds_active_sub_modules.discard(STAYS_WHOLE)
        if self.whole:
            self.whole[0].partition(param_list=self.whole)
        self._keep_whole()
        super().reload()

    def _find_pieces(self) -> Iterator[Piece]:
        for index, parameters in enumerate(self.fp16_groups):
            offset = 0
            for parameter in parameters:
                part = parameter.partition_numel()
                start = part * dist.get_rank(parameter.ds_process_group)
                length = min(part, parameter.ds_numel - start)
                if length > 0:
                    yield Piece(parameter=parameter, start=start, length=length, partition=index, offset=offset)
                offset += part

    def _accumulate_on_device(self) -> None:
        """Keeps gradient shards on the device until the step, which saves two copies per micro-batch."""
        on_host = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        device = deepspeed.accelerator.get_accelerator().current_device_name()
        self.grad_partitions_flat_buffer = torch.zeros_like(self.grad_partitions_flat_buffer, device=device)
        offset = 0
        for number, part in on_host.items():
            on_host[number] = self.grad_partitions_flat_buffer.narrow(0, offset, part.numel())
            offset += part.numel()

    def _gradient_averaging_world_size(self, params: list[Any], partition_world_size: int) -> float:
        """What DeepSpeed, which reduces means of a group, then makes of them: sums divided by this."""
        return self._divisor

    def _overflow_check_and_loss_scale_update(self, update_scale: bool = True) -> bool:
        """Overflow is judged over all engines before any of them steps."""
        self.overflow = False
        return False

    def _get_norm_groups(self) -> list[torch.Tensor]:
        """Clipping is done before the step; DeepSpeed only wants a finite number."""
        return [torch.ones((), device=self.device)]

    @property
    def partitions(self) -> list[torch.Tensor]:
        """Flat fp32 main weights of this rank."""
        return self.fp32_partitioned_groups_flat

    @property
    def all_parameters(self) -> list[torch.nn.Parameter]:
        """The model's parameters, in an order equal on all ranks of the group."""
        return [parameter for group in self.fp16_groups for parameter in group]

    def gradient(self, partition: int) -> torch.Tensor:
        """Flat gradient of a partition, complete after ``finish_accumulation``."""
        first = sum(self.fp16_partitioned_groups_flat_numel[:partition])
        return self.grad_partitions_flat_buffer.narrow(
            0, first, self.fp16_partitioned_groups_flat_numel[partition]
        )

    def end_backward(self) -> None:
        """The backward pass is over: reduces what is not yet, waits for all of it and lets parameters go."""
        self.independent_gradient_partition_epilogue()
        self.backward_epilogue()
        self.exit_backward()

    def finish_accumulation(self) -> None:
        """All micro-batches are through: gradients are complete."""
        self.finalize_gradient_accumulation_boundary()

    def forget_gradients(self) -> None:
        """Before the first micro-batch of a step."""
        self.zero_grad()
        self.grad_partitions_flat_buffer.zero_()

    def destroy(self) -> None:
        """Takes the engine off its modules; DeepSpeed has put them on a stack and never takes them off."""
        modules = self.parameter_offload.module
        super().destroy()
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not modules]


def _share_storage(weights: torch.Tensor, main: torch.Tensor) -> None:
    """DeepSpeed copies weights that are fp32 already; one of them is enough."""
    if weights.dtype == main.dtype:
        main.data = weights.data


@contextlib.contextmanager
def _without_world_barriers() -> Iterator[None]:
    """Stage 3 waits for the whole world while it is built; other pipeline stages may have no such layer."""
    barrier = deepspeed.comm.barrier
    deepspeed.comm.barrier = lambda *args, **kwargs: None
    try:
        yield
    finally:
        deepspeed.comm.barrier = barrier


@contextlib.contextmanager
def _hooks_where_parameters_are(borrowers: set[int]) -> Iterator[None]:
    """Stage 3 would hook every module, which takes time in every pass; half of a layer's have no parameters.

    Args:
        borrowers: ids of modules that compute with parameters of others.
    """
    register = DeepSpeedZeRoOffload._register_deepspeed_module

    def registers(self: DeepSpeedZeRoOffload, module: torch.nn.Module, **count: list[int]) -> None:
        inside = {id(part) for part in module.modules()}
        if inside & borrowers or next(module.parameters(), None) is not None:
            register(self, module, **count)

    DeepSpeedZeRoOffload._register_deepspeed_module = registers
    try:
        yield
    finally:
        DeepSpeedZeRoOffload._register_deepspeed_module = register
