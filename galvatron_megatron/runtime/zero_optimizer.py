"""An optimizer whose states DeepSpeed's ZeRO shards, behind the interface of Megatron's optimizers."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import (
    _get_megatron_optimizer_based_on_param_groups,
    _get_param_groups,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import copy_tensor_model_parallel_attributes
from megatron.core.utils import unwrap_model

from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.plan.zero_rules import bucket_elements, usual_bucket, vectors_stay_whole
from galvatron_megatron.runtime.checkpoint_stretches import MAIN, STATES, Stretch
from galvatron_megatron.runtime.checkpoint_weights import let_checkpoints_have_parts
from galvatron_megatron.runtime.zero import ZeroPart, import_engines
from galvatron_megatron.runtime.zero_ahead import FORWARD, GatherAhead
from galvatron_megatron.runtime.zero_offload import host_optimizer, step_count


class ZeroOptimizer(MegatronOptimizer):
    """Steps one engine; what Megatron sees as parameters are stretches of fp32 main weights."""

    def __init__(self, engine: Any, config: Any, part: ZeroPart, grad_scaler: Any) -> None:
        """Wraps an engine.

        Args:
            engine: a ZeRO engine, or None where this rank has no such parameters.
            config: Megatron's optimizer config.
            part: whose parameters these are.
            grad_scaler: Megatron's loss scaler; None but for fp16.
        """
        super().__init__(None if engine is None else engine.optimizer, config, lambda *_: None)
        self.engine = engine
        self.is_stub_optimizer = engine is None
        self.grad_scaler = grad_scaler
        self.tp_group = part.tp_group
        self._shards = [] if engine is None else [self._shard(piece) for piece in engine.pieces]

    def _shard(self, piece: Any) -> torch.Tensor:
        """A stretch of main weights that counts, in norms, as its parameter does.

        Megatron looks at its gradient alone. It is on the device: main weights in host memory cannot carry it.
        """
        if self.engine.offloads:
            shard = torch.zeros((), device="cuda").expand(piece.length)
        else:
            shard = self._stretch(self.engine.partitions[piece.partition].detach(), piece)
        copy_tensor_model_parallel_attributes(shard, piece.parameter)
        if hasattr(piece.parameter, "shared"):
            shard.shared = piece.parameter.shared
        return shard

    @staticmethod
    def _stretch(flat: torch.Tensor, piece: Any) -> torch.Tensor:
        return flat.narrow(0, piece.offset, piece.length)

    def get_parameters(self) -> list[torch.Tensor]:
        """Stretches of main weights of this rank, with their gradients once these are prepared."""
        return self._shards

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Shows the gradients; whether they are finite is judged for all optimizers together."""
        if not self.is_stub_optimizer:
            for shard, piece in zip(self._shards, self.engine.pieces, strict=True):
                shard.grad = self._stretch(self.engine.gradient(piece.partition), piece)
        return False

    def _collect_main_grad_data_for_unscaling(self) -> list[torch.Tensor]:
        return [shard.grad for shard in self._shards]

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Steps with the gradients as they are now.

        Returns:
            True.
        """
        for shard in self._shards:
            shard.grad = None
        if not self.is_stub_optimizer:
            self.engine.apply()
        return True

    def step(self) -> None:
        """Not used: classes of parameters step together."""
        raise NotImplementedError("step: classes of parameters step together")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets what was prepared; the gradients themselves are the model chunk's."""
        for shard in self._shards:
            shard.grad = None

    def get_loss_scale(self) -> torch.Tensor:
        """The scale of the loss, one without fp16."""
        if self.grad_scaler is not None:
            return self.grad_scaler.scale
        return torch.ones(1, dtype=torch.float32, device="cuda")

    def reload_model_params(self, state_dict: Any = None) -> None:
        """Takes over weights that changed outside the optimizer."""
        if not self.is_stub_optimizer:
            self.engine.reload()

    def state_dict(self) -> dict[str, Any]:
        """Not used: states are saved in a form that every plan can load."""
        raise NotImplementedError("state_dict: states are in the distributed checkpoint")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not used, see ``state_dict``."""
        raise NotImplementedError("load_state_dict: states are in the distributed checkpoint")

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Not used, see ``stretches``."""
        raise NotImplementedError("sharded_state_dict: the optimizer of all classes saves the states")

    def initialise_states(self) -> None:
        """Creates the states of an optimizer that has not made a step yet: zeros, as at the first step."""
        for partition in self.engine.partitions:
            state = self.optimizer.state[partition]
            for key in STATES:
                if key not in state:
                    state[key] = torch.zeros_like(partition, requires_grad=False)
            if (step := step_count(self.optimizer)) is not None:
                state.setdefault("step", step)

    def _named(self, key: str) -> list[torch.Tensor]:
        """Flat tensors of this rank by partition: ``param`` for main weights, else a state."""
        partitions = [partition.detach() for partition in self.engine.partitions]
        if key == MAIN:
            return partitions
        return [self.optimizer.state[partition][key] for partition in self.engine.partitions]

    def stretches(self) -> Iterator[Stretch]:
        """What this rank keeps of each parameter, for checkpoints.

        Yields:
            Stretches with views of main weights and states; there must be states.
        """
        number = {id(parameter): index for index, parameter in enumerate(self.engine.all_parameters)}
        flats = {name: self._named(name) for name in (MAIN, *STATES)}
        for piece in self.engine.pieces:
            yield Stretch(
                number=number[id(piece.parameter)],
                parameter=piece.parameter,
                start=piece.start,
                tensors={
                    name: self._stretch(by_partition[piece.partition], piece)
                    for name, by_partition in flats.items()
                },
            )


def build_zero_optimizers(
    config: Any, chunks: list[Any], overrides: Any, state_class: Any, grad_scaler: Any
) -> list[ZeroOptimizer]:
    """Shards one class of parameters; all ranks call this together, in the same order of classes.

    Args:
        config: Megatron's optimizer config.
        chunks: the wrapped model chunks of this rank.
        overrides: Megatron's settings by parameter.
        state_class: the class.
        grad_scaler: Megatron's loss scaler; None but for fp16.
    """
    engines = import_engines()
    found = []
    for chunk in chunks:
        part: ZeroPart = chunk.parts[state_class]
        # What two stages share is sharded apart, so that both hold the same stretches of it.
        tied = {id(parameter) for parameter in part.tied}
        for shared in (False, True):
            wanted = [p for p in part.parameters if (id(p) in tied) is shared]
            engine = _engine(engines, config, chunk, part, wanted, overrides, state_class)
            if engine is not None:
                part.engines.append(engine)
            found.append(ZeroOptimizer(engine, config, part, grad_scaler))
    return found


def _engine(
    engines: ModuleType,
    config: Any,
    chunk: Any,
    part: ZeroPart,
    parameters: list[torch.nn.Parameter],
    overrides: Any,
    state_class: Any,
) -> Any:
    """An engine for some parameters, or None for none; a collective call either way."""
    from galvatron_megatron.runtime.data_parallel import ParameterView

    view = ParameterView(chunk.module, parameters)
    param_groups = [g for g in _get_param_groups([view], config, overrides) if g["params"]]
    if not param_groups:
        return None
    optimizer, _ = _get_megatron_optimizer_based_on_param_groups(
        config, [view], param_groups, skip_megatron_wrapping=True
    )
    on_cpu_ranks = parameters[0].device.type == "cpu"
    if state_class.offload is not Offload.NONE and not on_cpu_ranks:
        optimizer = host_optimizer(optimizer.param_groups, config)
    dtype = parameters[0].dtype
    in_fp32 = part.ddp_config.grad_reduce_in_fp32
    options = engines.EngineOptions(
        group=part.dp_cp_group,
        gradient_dtype=torch.float32,
        communication_dtype=torch.float32 if in_fp32 else dtype,
        bucket_elements=_bucket_elements(part, parameters),
        scale=part.scale,
        overlaps=part.ddp_config.overlap_grad_reduce,
        offload=state_class.offload,
        pinned=not on_cpu_ranks,
    )
    names = {parameter: name for name, parameter in view.named_parameters()}
    if state_class.zero < 3:
        return engines.ShardedStatesEngine(optimizer, names, state_class.zero, options)
    model = unwrap_model(chunk)
    engine = engines.ShardedParametersEngine(
        optimizer,
        names,
        _owning_modules(model, parameters),
        _borrowing_modules(model, parameters),
        options,
        _whole_vectors(model, parameters, options),
    )
    part.ahead = _gather_ahead(chunk, model)
    part.ahead.add(engine)
    let_checkpoints_have_parts(model)
    return engine


def _gather_ahead(chunk: Any, model: torch.nn.Module) -> GatherAhead:
    """What gathers ahead in a chunk, one for all its classes."""
    from galvatron_megatron.runtime.layers import PlannedLayer

    for part in chunk.parts.values():
        if isinstance(part, ZeroPart) and part.ahead is not None:
            return part.ahead
    ahead = GatherAhead(module for module in model.modules() if isinstance(module, PlannedLayer))
    model.register_forward_pre_hook(lambda *_: ahead.begin(FORWARD), prepend=True)
    model.register_forward_hook(lambda *_: ahead.end())
    return ahead


def _bucket_elements(part: ZeroPart, parameters: list[torch.nn.Parameter]) -> int:
    """Elements reduced at once by an engine over some parameters of a class."""
    sizes = [parameter.numel() for parameter in parameters]
    # Megatron has put its own default, for the base layout's replicas, where the job says nothing.
    base = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    asked = part.ddp_config.bucket_size
    wanted = None if asked == usual_bucket(base) else asked
    return bucket_elements(sum(sizes), max(sizes), part.dp_cp_group.size(), wanted)


def _whole_vectors(
    model: torch.nn.Module, parameters: list[torch.nn.Parameter], options: Any
) -> list[torch.nn.Parameter]:
    """Parameters among some that stay whole, see ``vectors_stay_whole``; those of experts never do."""
    from galvatron_megatron.runtime.layers import PlannedLayer

    wanted = {id(parameter) for parameter in parameters}
    found = []
    for layer in model.modules():
        if not isinstance(layer, PlannedLayer):
            continue
        modules = [module for name, module in layer.named_modules() if ".experts" not in name]
        vectors = [parameter for module in modules for parameter in _vectors(module)]
        apart, together = (sum(_shape(p).numel() for p in of) for of in (vectors, layer.parameters()))
        if vectors_stay_whole(apart, together, options.group.size(), options.offload):
            found += [parameter for parameter in vectors if id(parameter) in wanted]
    return found


def _vectors(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters of a norm, or the bias that a linear hands on."""
    own = list(module.parameters(recurse=False))
    vectors = [parameter for parameter in own if len(_shape(parameter)) == 1]
    if len(vectors) == len(own) or getattr(module, "skip_bias_add", False):
        return vectors
    return []


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Of a parameter that may be sharded already."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _owning_modules(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> list[torch.nn.Module]:
    """The largest modules of a model all of whose parameters are among some, in the model's order."""
    wanted = {id(parameter) for parameter in parameters}

    def inside(module: torch.nn.Module) -> list[torch.nn.Module]:
        own = list(module.parameters())
        if not any(id(parameter) in wanted for parameter in own):
            return []
        if all(id(parameter) in wanted for parameter in own):
            return [module]
        return [found for child in module.children() for found in inside(child)]

    return inside(model)


def _borrowing_modules(
    model: torch.nn.Module, parameters: list[torch.nn.Parameter]
) -> list[tuple[torch.nn.Module, torch.nn.Parameter]]:
    """Modules that compute with a parameter of another module: the head of a model with tied embeddings."""
    head = getattr(model, "output_layer", None)
    if head is None or head.weight is not None or not model.share_embeddings_and_output_weights:
        return []
    weight = model.shared_embedding_or_output_weight()
    return [(head, weight)] if any(weight is parameter for parameter in parameters) else []
