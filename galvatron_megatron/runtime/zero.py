"""Which parameters DeepSpeed's ZeRO shards, and its place in the facade over a model chunk's gradients.

Without sharding, and for ZeRO 1 unless asked otherwise, Megatron's own data parallelism and optimizers are
used. ZeRO 2 and 3, and whatever keeps states in host memory, are DeepSpeed's, one engine per class of
parameters and model chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from galvatron_megatron.errors import UnsupportedPlanError
from galvatron_megatron.plan import zero_rules
from galvatron_megatron.plan.megatron_arguments import runs_on_stock_megatron
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.runnable import ZERO_BACKENDS
from galvatron_megatron.plan.strategy import Strategy
from galvatron_megatron.runtime.zero_ahead import BACKWARD

if TYPE_CHECKING:
    from galvatron_megatron.runtime.context import StateClass
    from galvatron_megatron.runtime.zero_ahead import GatherAhead
    from galvatron_megatron.runtime.zero_engines import ShardedParametersEngine, ShardedStatesEngine

    Engine = ShardedStatesEngine | ShardedParametersEngine


def zero_backend(args: Any) -> str:
    """Who runs ZeRO 1, as ``--galvatron-zero-backend`` says.

    Args:
        args: Megatron's arguments.

    Raises:
        UnsupportedPlanError: another value.
    """
    backend = getattr(args, "galvatron_zero_backend", None) or ZERO_BACKENDS[0]
    if backend not in ZERO_BACKENDS:
        raise UnsupportedPlanError(
            f"--galvatron-zero-backend: {backend!r} is unknown; valid: {', '.join(ZERO_BACKENDS)}"
        )
    return backend


def is_deepspeed(states: "Strategy | StateClass", backend: str) -> bool:
    """Whether DeepSpeed shards some states, see ``zero_rules``.

    Args:
        states: how they are kept.
        backend: who runs stage 1 of states on the device.
    """
    return zero_rules.is_deepspeed(states.zero, states.offload, backend == "deepspeed")


def uses_deepspeed(plan: Plan, args: Any) -> bool:
    """Whether any parameters of a plan are DeepSpeed's.

    Args:
        plan: the plan.
        args: Megatron's arguments.
    """
    backend = zero_backend(args)
    return any(is_deepspeed(strategy, backend) for strategy in (plan.base, *plan.strategies))


def is_left_to_megatron(plan: Plan, args: Any) -> bool:
    """Whether Megatron's own code runs the whole plan.

    Args:
        plan: the plan.
        args: Megatron's arguments.
    """
    return runs_on_stock_megatron(plan) and not uses_deepspeed(plan, args)


def import_engines() -> ModuleType:
    """Imports what drives DeepSpeed, on the device that Megatron's tensors are on; connects to its groups."""
    from galvatron_megatron.runtime import zero_engines

    zero_engines.connect()
    return zero_engines


class ZeroPart:
    """The parameters of one class in one model chunk: what Megatron's DDP does, done by DeepSpeed's engines.

    The engines come with the optimizer; until then this holds the parameters. Gradients are scaled as those of
    all other classes are and then summed over the class's ranks.
    """

    use_forward_hook = False
    force_all_reduce = False
    overlap_param_gather_with_optimizer_step = False

    def __init__(
        self,
        module: torch.nn.Module,
        parameters: list[torch.nn.Parameter],
        groups: Any,
        ddp_config: Any,
        scale: float,
    ) -> None:
        """Holds parameters.

        Args:
            module: the model chunk.
            parameters: those of the class.
            groups: Megatron's process groups with those of the class.
            ddp_config: Megatron's DDP config for the class.
            scale: what the engines multiply gradients by in front of every sum.
        """
        self.module = module
        self.parameters = parameters
        self.groups = groups
        self.ddp_config = ddp_config
        self.scale = scale
        self.engines: list[Engine] = []
        self.ahead: GatherAhead | None = None
        """Gathers parameters of all classes of the chunk ahead; the same in all parts with ZeRO 3."""
        self.buffers: list[Any] = []
        self.bucket_groups: list[Any] = []
        self.params_with_grad: list[torch.nn.Parameter] = []
        self.param_to_bucket_group: dict[Any, Any] = {}
        self.bucket_size = None
        self.dp_group, self.dp_cp_group = groups.dp, groups.dp_cp
        self.tp_group, self.pp_group, self.ep_group = groups.tp, groups.pp, groups.ep
        self.expt_dp_group = groups.expt_dp
        self._summed: dict[dist.ProcessGroup, set[int]] = {}
        for parameter in parameters:
            if getattr(parameter, "sequence_parallel", False):
                # Megatron would look for a whole gradient and sum it; the shards are summed here.
                parameter.sequence_parallel = False
                self.sum_over(groups.tp, [parameter])

    @property
    def tied(self) -> list[torch.nn.Parameter]:
        """Embeddings that the first and the last pipeline stage share."""
        shared = self.groups.embd is not None and self.groups.embd.size() > 1
        return [p for p in self.parameters if shared and getattr(p, "shared_embedding", False)]

    def sum_over(self, group: dist.ProcessGroup, parameters: list[torch.nn.Parameter]) -> None:
        """Adds parameters whose gradient is complete only when summed over another group too, all at once."""
        self._summed.setdefault(group, set()).update(id(parameter) for parameter in parameters)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Nothing to hold back: ZeRO 1 reduces at the end of the step, ZeRO 2 and 3 whenever they can."""
        yield

    def begin_backward(self) -> None:
        """A backward pass through the chunk starts."""
        if self.ahead is not None:
            self.ahead.begin(BACKWARD)
        for engine in self.engines:
            engine.begin_backward()

    def end_backward(self) -> None:
        """The backward pass is over."""
        if self.ahead is not None:
            self.ahead.end()
        for engine in self.engines:
            engine.end_backward()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Completes the gradients of the step.

        Args:
            force_all_reduce: whole gradients on every rank.
        """
        if force_all_reduce:
            raise UnsupportedPlanError("whole gradients on every rank: ZeRO keeps parts; valid: zero 0 or 1")
        for engine in self.engines:
            engine.finish_accumulation()
        for group, parameters in self._summed.items():
            self._sum(group, parameters)
        tied = {id(parameter) for parameter in self.tied}
        if tied:
            self._sum(self.groups.embd, tied)
        if self.ddp_config.check_for_nan_in_grad:
            self._refuse_infinite()

    def _refuse_infinite(self) -> None:
        """Ends the job where a gradient is not finite, as Megatron's DDP does.

        Raises:
            RuntimeError: names this rank.
        """
        for engine in self.engines:
            for index in range(len(engine.partitions)):
                if not torch.isfinite(engine.gradient(index).norm()):
                    raise RuntimeError(f"rank {dist.get_rank()}: a gradient that ZeRO reduced is not finite")

    def _sum(self, group: dist.ProcessGroup, parameters: set[int]) -> None:
        """Sums gradients over ranks that hold the same stretches of them."""
        gradients = [
            engine.gradient(piece.partition).narrow(0, piece.offset, piece.length)
            for engine in self.engines
            for piece in engine.pieces
            if id(piece.parameter) in parameters
        ]
        if gradients:
            flat = torch.cat(gradients)
            dist.all_reduce(flat, group=group)
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total)

    def scale_gradients(self, scaling_factor: float) -> None:
        """Multiplies all gradients."""
        for engine in self.engines:
            for index in range(len(engine.partitions)):
                engine.gradient(index).mul_(scaling_factor)

    def zero_grad_buffer(self) -> None:
        """Forgets the gradients of the last step."""
        for engine in self.engines:
            engine.forget_gradients()

    def let_go(self) -> None:
        """Takes the engines off the parameters for good, whose hooks hold them beyond any collector's reach."""
        for engine in self.engines:
            engine.destroy()
        self.engines.clear()
        self.ahead = None

    def broadcast_params(self) -> None:
        """Gives every rank the first rank's parameters."""
        source = dist.get_global_rank(self.dp_cp_group, 0)
        for parameter in self.parameters:
            dist.broadcast(parameter.data, src=source, group=self.dp_cp_group)

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """Reduction and gathering are the engines' own business."""

    start_param_sync = start_grad_sync = _nothing
    reset_param_sync_dispatch_state = free_overlap_buffers = _nothing
    offload_grad_buffers = restore_grad_buffers = _nothing
