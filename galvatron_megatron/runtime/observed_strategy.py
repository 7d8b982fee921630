"""How a layer of a running job runs, in the words under which profiles file measurements."""

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
        fsdp = getattr(args, "use_torch_fsdp2", False) or getattr(args, "use_megatron_fsdp", False)
        return {
            "tp": args.tensor_model_parallel_size,
            "sequence_parallel": SequenceParallel(
                "megatron" if args.sequence_parallel and args.tensor_model_parallel_size > 1 else "none"
            ).value,
            "recompute": recompute.value,
            "micro_batch_size": args.micro_batch_size,
            "left_out": reason or _reason(*degrees, gathers=fsdp, moves=False),
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
