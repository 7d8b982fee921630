"""Reads a Megatron command line without Megatron: what it describes and what it fixes by hand."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from galvatron_megatron.describe.layer_pattern import hybrid_pattern, layout_stage_layers
from galvatron_megatron.describe.megatron_flags import FLAGS, option
from galvatron_megatron.errors import DescriptionError, PlanError
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel


@dataclass(kw_only=True, frozen=True, slots=True)
class CommandLine:
    """A Megatron command line, taken apart."""

    arguments: dict[str, object]
    """Megatron's destination -> value, defaults filled in, for every flag of the table."""
    explicit: frozenset[str]
    """Destinations that were given on the command line."""
    unknown: tuple[str, ...]
    """Everything that the table does not know, in order: the script, other flags and their values."""


class RaisingParser(argparse.ArgumentParser):
    """Raises a ``DescriptionError`` where argparse would print its usage and end the process."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises; see argparse."""
        raise DescriptionError(f"Megatron command line: {message}")


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Takes a Megatron command line apart.

    Args:
        argv: the words behind ``python`` or ``torchrun``'s own arguments, with or without the script's name.

    Raises:
        DescriptionError: a known flag with a bad value.
    """
    parser = RaisingParser(allow_abbrev=False, add_help=False)
    for flag in FLAGS:
        flag.add_to(parser)
    # Without defaults the namespace holds exactly what was given.
    namespace, unknown = parser.parse_known_args(list(argv))
    given = vars(namespace)
    arguments = {flag.dest: given.get(flag.dest, flag.resting_value) for flag in FLAGS}
    return CommandLine(arguments=arguments, explicit=frozenset(given), unknown=tuple(unknown))


def parse_command_line(argv: Sequence[str]) -> dict[str, object]:
    """The arguments of a command line, as ``vars()`` of Megatron's own parsed arguments would have them.

    Flags outside the table are left out; ``read_command_line`` returns them. Argument and errors are the same.

    Raises:
        DescriptionError: a known flag with a bad value.
    """
    return read_command_line(argv).arguments


def plan_constraints(argv: Sequence[str]) -> Constraints:
    """What a Megatron command line fixes by hand, and the search must keep.

    Only flags that are given count; a default fixes nothing.

    Args:
        argv: as for ``read_command_line``.

    Raises:
        DescriptionError: a flag with a bad value.
        PlanError: a flag that a plan cannot honour.
    """
    line = read_command_line(argv)
    given = {dest: line.arguments[dest] for dest in line.explicit}
    _refuse_unplanned(given)
    recompute, per_stage = _recompute(given)
    tp, cp, kind = _sequence_degrees(given)
    return Constraints(
        tp=tp,
        pp=given.get("pipeline_model_parallel_size"),
        cp=cp,
        expert_parallel=given.get("expert_model_parallel_size"),
        expert_tensor_parallel=given.get("expert_tensor_parallel_size"),
        sequence_parallel=kind,
        zero=1 if given.get("use_distributed_optimizer") else None,
        recompute=recompute,
        recomputed_layers_per_stage=per_stage,
        virtual_stages=given.get("num_virtual_stages_per_pipeline_rank"),
        layers_per_virtual_stage=given.get("num_layers_per_virtual_pipeline_stage"),
        stage_layers=_stage_layers(given),
        first_stage_layers=given.get("decoder_first_pipeline_num_layers"),
        last_stage_layers=given.get("decoder_last_pipeline_num_layers"),
        micro_batch_size=given.get("micro_batch_size"),
        global_batch_size=given.get("global_batch_size"),
    )


def _sequence_degrees(given: Mapping[str, object]) -> tuple[int | None, int | None, SequenceParallel | None]:
    """Fixed tp, cp and kind of sequence parallelism.

    Context parallelism that exchanges heads for sequence by all-to-all is what a plan calls Ulysses.
    """
    tp, cp = given.get("tensor_model_parallel_size"), given.get("context_parallel_size")
    kind = SequenceParallel.MEGATRON if given.get("sequence_parallel") else None
    ways = set(given.get("cp_comm_type") or ())
    if (cp or 1) == 1 or not ways - {"p2p", "all_gather"}:
        return tp, cp, kind
    if ways == {"a2a"} and (tp or 1) == 1:
        return cp, 1, SequenceParallel.ULYSSES
    raise PlanError(
        f"{option('cp_comm_type')}: {' '.join(sorted(ways))} with tp {tp or 1} is not planned for; valid: p2p, "
        f"all_gather, or a2a for all layers with {option('tensor_model_parallel_size')} 1"
    )


def _stage_layers(given: Mapping[str, object]) -> tuple[int, ...] | None:
    layout = given.get("pipeline_model_parallel_layout")
    if layout is not None:
        return layout_stage_layers(str(layout))
    pattern = given.get("hybrid_layer_pattern") or given.get("hybrid_override_pattern")
    if pattern is not None:
        parsed = hybrid_pattern(str(pattern))
        return parsed.segment_layers if parsed.is_partitioned else None
    return None


def _recompute(given: Mapping[str, object]) -> tuple[Recompute | None, int | None]:
    granularity = given.get("recompute_granularity")
    if given.get("recompute_activations"):
        # Megatron lets --recompute-activations win over --recompute-granularity.
        granularity = "selective"
    if granularity == "selective":
        modules = given.get("recompute_modules")
        if modules not in (None, ["core_attn"]):
            raise PlanError(
                f"{option('recompute_modules')}: {' '.join(modules)} is not planned for; "
                "valid: core_attn, or leave the flag out"
            )
        return Recompute.SELECTIVE, None
    if granularity != "full":
        return None, None
    layers = given.get("recompute_num_layers")
    if given.get("recompute_method") == "block":
        if layers is None:
            raise PlanError(
                f"{option('recompute_method')} block: without {option('recompute_num_layers')}; valid: "
                f"{option('recompute_num_layers')} N beside it"
            )
        return Recompute.FULL, layers
    if layers not in (None, 1):
        raise PlanError(
            f"{option('recompute_num_layers')}: {layers} layers per checkpoint are not planned for; valid: 1"
        )
    return Recompute.FULL, None


_UNPLANNED = {
    "use_torch_fsdp2": "leave it out; ZeRO is chosen by the plan",
    "use_megatron_fsdp": "leave it out; ZeRO is chosen by the plan",
    "use_tp_pp_dp_mapping": "leave it out; ranks are laid out tp-cp-dp-pp",
    "account_for_embedding_in_pipeline_split": "leave it out; the plan balances the stages",
    "account_for_loss_in_pipeline_split": "leave it out; the plan balances the stages",
    "moe_layer_recompute": "leave it out, or use --recompute-granularity",
    "distribute_saved_activations": "leave it out, or use --sequence-parallel",
    "rampup_batch_size": "a fixed --global-batch-size",
    "step_batch_size_schedule": "a fixed --global-batch-size",
}


def _refuse_unplanned(given: Mapping[str, object]) -> None:
    for dest, valid in _UNPLANNED.items():
        if given.get(dest):
            raise PlanError(f"{option(dest)} is not planned for; valid: {valid}")
    dest, pp = "microbatch_group_size_per_vp_stage", given.get("pipeline_model_parallel_size", 1)
    if given.get(dest, pp) != pp:
        raise PlanError(
            f"{option(dest)}: {given[dest]} is not planned for, as more micro-batches would live; valid: {pp} "
            f"(the value of {option('pipeline_model_parallel_size')}), or leave it out"
        )
    tp, dest = given.get("tensor_model_parallel_size"), "tensor_parallel_num_weight_shards"
    if given.get(dest) not in (None, tp):
        raise PlanError(
            f"{option(dest)}: {given[dest]} is not planned for; "
            f"valid: the value of {option('tensor_model_parallel_size')}, or leave it out"
        )
