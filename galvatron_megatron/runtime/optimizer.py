"""One Megatron optimizer per class of parameters behind Megatron's interface, exact across classes."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import count_zeros_fp32, get_grad_norm_fp32
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler
from megatron.core.optimizer.optimizer import MegatronOptimizer, MixedPrecisionOptimizer

from galvatron_megatron.runtime.checkpoint import ReshardableOptimizer
from galvatron_megatron.runtime.context import RuntimeContext, StateClass
from galvatron_megatron.runtime.data_parallel import PlannedDataParallel
from galvatron_megatron.runtime.zero import is_deepspeed
from galvatron_megatron.runtime.zero_optimizer import build_zero_optimizers


def build_optimizer(
    config: Any,
    model_chunks: list[PlannedDataParallel],
    config_overrides: Any,
    runtime: RuntimeContext,
) -> "PlannedOptimizer":
    """Builds an optimizer for every class of parameters; all ranks call this together.

    Args:
        config: Megatron's optimizer config.
        model_chunks: the wrapped model chunks of this rank.
        config_overrides: Megatron's settings by parameter (weight decay, learning rate).
        runtime: the plan on this rank.
    """
    optimizers: list[MegatronOptimizer] = []
    counted: list[bool] = []
    scaler = _grad_scaler(config)
    for state_class in runtime.state_classes:
        if is_deepspeed(state_class, runtime.zero_backend):
            sharded = build_zero_optimizers(config, model_chunks, config_overrides, state_class, scaler)
            optimizers += sharded
            counted += [True] * len(sharded)
            continue
        own = copy.copy(config)
        own.use_distributed_optimizer = state_class.zero > 0
        groups = runtime.collection(state_class)
        chain = get_megatron_optimizer(
            own,
            [chunk.parts[state_class] for chunk in model_chunks],
            config_overrides=config_overrides,
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        for optimizer in chain.chained_optimizers:
            optimizers.append(optimizer)
            # Without sharding every replica has the whole gradient; one of them speaks for all.
            counted.append(state_class.zero > 0 or groups.dp_cp.rank() == 0)
    return PlannedOptimizer(
        optimizers, counted=counted, config=config, model_chunks=model_chunks, runtime=runtime
    )


def _grad_scaler(config: Any) -> MegatronGradScaler | None:
    """The loss scaler that Megatron makes for its own mixed-precision optimizers."""
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )


class PlannedOptimizer(ReshardableOptimizer):
    """Steps the optimizers of all classes as one: one norm, one clip, one loss scale, one verdict on overflow.

    Norm: ``norm^2 = sum over the world of ||g||^2``, where of each shard exactly one rank's copy counts:
    replicas without sharding count at their first rank, duplicates over tp at tp rank 0, tied embeddings once.
    """

    saves_by_parameter = True

    def __init__(
        self,
        optimizers: list[MegatronOptimizer],
        *,
        counted: list[bool],
        config: Any,
        model_chunks: list[PlannedDataParallel],
        runtime: RuntimeContext,
    ) -> None:
        """Joins optimizers.

        Args:
            optimizers: one per class of parameters; the same classes on all ranks.
            counted: whether this rank's gradients of that class count in the norm.
            config: Megatron's optimizer config.
            model_chunks: the wrapped model chunks of this rank.
            runtime: the plan on this rank.
        """
        self.config = config
        self.model_chunks = model_chunks
        self.chained_optimizers = optimizers
        self.keep_stretches()
        self.is_stub_optimizer = all(getattr(each, "is_stub_optimizer", False) for each in optimizers)
        self._counted = counted
        self._runtime = runtime
        scalers = [each.grad_scaler for each in optimizers if hasattr(each, "grad_scaler")]
        self.grad_scaler = scalers[0] if scalers else None
        for optimizer in optimizers:
            optimizer.grad_stats_parallel_group = dist.group.WORLD
            if hasattr(optimizer, "grad_scaler"):
                # One scale for the one loss: separate scalers would drift apart at the first overflow.
                optimizer.grad_scaler = self.grad_scaler

    @property
    def state_classes(self) -> tuple[StateClass, ...]:
        """The class each optimizer serves."""
        return self._runtime.state_classes

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Takes gradients over from the buffers, unscales them and looks for inf and nan in the whole world.

        Returns:
            True where any gradient on any rank is not finite; the step is skipped then.
        """
        for optimizer in self.chained_optimizers:
            if optimizer.is_stub_optimizer:
                continue
            if isinstance(optimizer, MixedPrecisionOptimizer):
                optimizer._copy_model_grads_to_main_grads()
            else:
                optimizer.prepare_grads()
        if self.grad_scaler is None:
            return False
        found = torch.zeros(1, dtype=torch.float, device="cuda")
        for optimizer in self.chained_optimizers:
            if optimizer.is_stub_optimizer:
                continue
            gradients = optimizer._collect_main_grad_data_for_unscaling()
            if gradients:
                torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, self.grad_scaler.inv_scale)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        overflow = found.item() > 0
        self.grad_scaler.update(overflow)
        return overflow

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Two-norm of the gradient of the whole model, on every rank."""
        gradients = []
        for optimizer, counted in zip(self.chained_optimizers, self._counted, strict=True):
            if counted and not optimizer.is_stub_optimizer:
                gradients += optimizer.get_grads_for_grad_norm()
        return get_grad_norm_fp32(gradients, grad_stats_parallel_group=dist.group.WORLD)

    @torch.no_grad()
    def count_zeros(self) -> float:
        """How many elements of the gradient of the whole model are zero, each element counted once."""
        total = 0
        for optimizer, counted in zip(self.chained_optimizers, self._counted, strict=True):
            parameters = optimizer.get_parameters() if counted and not optimizer.is_stub_optimizer else []
            total += count_zeros_fp32(
                parameters, grad_stats_parallel_group=dist.group.WORLD, tp_group=optimizer.tp_group
            )
        return total

    def grads_states_parallel_group_is_shared(self) -> bool:
        """True: statistics are taken over the world."""
        return True

    def _compute_grad_norms_by_group(self) -> dict[str, float]:
        """Separate norms exist for multi-token prediction only, which is refused."""
        self.grad_norms_by_group = {}
        return self.grad_norms_by_group
