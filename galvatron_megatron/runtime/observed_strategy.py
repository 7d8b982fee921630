"""How the parts of a running job run, in the words under which profiles file measurements."""

from collections.abc import Sequence
from typing import Any

import torch

from galvatron_megatron.plan.strategy import Recompute, SequenceParallel


def observed_strategy(module: torch.nn.Module, args: Any, *, position: int) -> dict[str, Any]:
    """Strategy of one layer, read off the layer itself under a plan and off Megatron's arguments elsewhere.

    Args:
        module: the layer.
        args: Megatron's validated arguments.
        position: of the layer in its chunk of the model, from 0.

    Returns:
        ``tp``, ``sequence_parallel``, ``recompute``, ``micro_batch_size`` (samples of one of the layer's
        data-parallel ranks) and ``left_out``: why its times are not those of a layer on its own, or "".
    """
    planned = getattr(module, "_planned", None)
    if planned is None:
        recompute, reason = _stock_recompute(args, position)
        degrees = (args.context_parallel_size, getattr(args, "expert_model_parallel_size", 1) or 1)
        return {
            **_base_layout(args),
            "recompute": recompute.value,
            "left_out": reason or _reason(*degrees, gathers=_is_fsdp(args), moves=False),
        }
    strategy = planned.strategy
    moves = any(way.source != way.target for way in (planned.reshard_input, planned.reshard_output))
    return {
        "tp": strategy.tp,
        "sequence_parallel": strategy.sequence_parallel.value,
        "recompute": strategy.recompute.value,
        "micro_batch_size": args.micro_batch_size * args.data_parallel_size // strategy.dp,
        "left_out": _reason(strategy.cp, strategy.expert_parallel, gathers=strategy.zero > 1, moves=moves),
    }


def observed_base(args: Any, *, zero: int) -> dict[str, Any]:
    """How embedding and head run, under a plan as well: in the base layout.

    Args:
        args: Megatron's validated arguments.
        zero: ZeRO stage of their parameters.

    Returns:
        As :func:`observed_strategy` does.
    """
    reason = _reason(args.context_parallel_size, 1, gathers=zero > 1 or _is_fsdp(args), moves=False)
    if args.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights:
        reason = reason or "first and last stage have a copy each of the tied weight, a profile has one"
    return {**_base_layout(args), "recompute": Recompute.NONE.value, "left_out": reason}


def observed_optimizer(chunks: Sequence[torch.nn.Module], args: Any, *, is_stock: bool) -> dict[str, Any]:
    """What a rank's optimizer updates, in the words of a profile's optimizer steps.

    Args:
        chunks: of the rank's model.
        args: Megatron's validated arguments.
        is_stock: whether Megatron's own optimizer runs.

    Returns:
        ``tensors``, ``parameters``, ``updated``, ``zero`` and ``left_out``: why its time is not that of a
        profile, or "".
    """
    reason = _reason(args.context_parallel_size, 1, gathers=_is_fsdp(args), moves=False)
    if not is_stock:
        reason = "layers of the plan have optimizers of their own"
    elif args.pipeline_model_parallel_size > 1:
        reason = reason or "stages of the pipeline wait for each other in it"
    elif args.overlap_param_gather:
        reason = reason or "parameters are gathered beside it"
    trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    parameters = sum(p.numel() for p in trained)
    zero = int(bool(args.use_distributed_optimizer))
    replicas = args.world_size // args.tensor_model_parallel_size
    return {
        "tensors": len(trained),
        "parameters": parameters,
        "updated": -(-parameters // replicas) if zero else parameters,
        "zero": zero,
        "left_out": reason,
    }


def _base_layout(args: Any) -> dict[str, Any]:
    split = args.sequence_parallel and args.tensor_model_parallel_size > 1
    return {
        "tp": args.tensor_model_parallel_size,
        "sequence_parallel": (SequenceParallel.MEGATRON if split else SequenceParallel.NONE).value,
        "micro_batch_size": args.micro_batch_size,
    }


def _is_fsdp(args: Any) -> bool:
    return bool(getattr(args, "use_torch_fsdp2", False) or getattr(args, "use_megatron_fsdp", False))


def _reason(cp: int, expert_parallel: int, *, gathers: bool, moves: bool) -> str:
    """Why a layer's times hold more than what a profile files under its strategy."""
    if cp > 1:
        return "context parallelism"
    if expert_parallel > 1:
        return "expert parallelism"
    if gathers:
        return "times hold the exchange of sharded parameters or gradients"
    return "times hold resharding" if moves else ""


def _stock_recompute(args: Any, position: int) -> tuple[Recompute, str]:
    """Megatron's recomputation of a layer, and why it is none that profiles know, or ""."""
    if args.recompute_granularity == "selective":
        modules = list(args.recompute_modules or ["core_attn"])
        reason = "" if modules == ["core_attn"] else f"recomputes {', '.join(modules)}"
        return Recompute.SELECTIVE, reason
    if args.recompute_granularity != "full":
        return Recompute.NONE, ""
    if args.recompute_method == "block" and position >= args.recompute_num_layers:
        return Recompute.NONE, ""
    return Recompute.FULL, ""
