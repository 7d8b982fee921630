"""Megatron's notations for a sequence of layers: hybrid patterns, MoE frequencies and pipeline layouts."""

import ast
import re
from dataclasses import dataclass

from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.checks import MOST_LAYERS, shown

HYBRID_SYMBOLS = {
    "*": "attention",
    "+": "multi-latent attention",
    "-": "MLP",
    "E": "mixture of experts",
    "M": "Mamba",
}
"""Symbols of ``--hybrid-layer-pattern`` that can be planned for."""

_HYBRID_UNPLANNED = {"G": "gated delta net", "D": "sparse attention (DSA)"}


@dataclass(kw_only=True, frozen=True, slots=True)
class HybridPattern:
    """A ``--hybrid-layer-pattern``, taken apart."""

    symbols: str
    """One symbol per layer, pipeline separators removed."""
    segment_layers: tuple[int, ...]
    """Layers of every segment between ``|``; one segment where there is no separator."""

    @property
    def is_partitioned(self) -> bool:
        """True where the pattern fixes the pipeline stages itself."""
        return len(self.segment_layers) > 1


def hybrid_pattern(pattern: str) -> HybridPattern:
    """Takes a ``--hybrid-layer-pattern`` apart, e.g. ``"M*-|M*-"``.

    Raises:
        DescriptionError: a symbol that Megatron or the planner does not know, or layers for multi-token
            prediction (behind ``/``).
    """
    main, separator, _ = pattern.partition("/")
    if separator:
        raise DescriptionError(
            f"--hybrid-layer-pattern: {pattern!r} has multi-token prediction layers behind '/', which are not "
            f"planned for; valid: {main!r}"
        )
    for symbol in main.replace("|", ""):
        if symbol not in HYBRID_SYMBOLS:
            what = f" ({_HYBRID_UNPLANNED[symbol]})" if symbol in _HYBRID_UNPLANNED else ""
            valid = ", ".join(f"{key} {name}" for key, name in HYBRID_SYMBOLS.items())
            raise DescriptionError(
                f"--hybrid-layer-pattern: symbol {symbol!r}{what} in {pattern!r} is not planned for; "
                f"valid: {valid}, | between pipeline stages"
            )
    if "*" in main and "+" in main:
        raise DescriptionError(
            f"--hybrid-layer-pattern: {pattern!r} mixes * and +; valid: one kind of attention per model"
        )
    segments = main.split("|")
    if not main.replace("|", "") or not all(segments):
        raise DescriptionError(
            f"--hybrid-layer-pattern: {pattern!r} has a pipeline stage without layers; "
            "valid: at least one layer in every segment"
        )
    return HybridPattern(symbols="".join(segments), segment_layers=tuple(map(len, segments)))


def layer_frequency(text: str) -> int | list[int]:
    """Reads ``--moe-layer-freq``: an integer N, or a Python list expression such as ``([0]+[1]*23)``.

    Raises:
        ValueError: text that is neither (argparse reports it as a bad value).
    """
    if "[" not in text:
        return int(text)
    try:
        value = _list_expression(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{shown(text)} is not a list expression") from error
    if not isinstance(value, list):
        raise ValueError(f"{shown(text)} is not a list expression")
    return value


def moe_layers(frequency: int | list[int], layers: int) -> tuple[bool, ...]:
    """For every layer of a GPT model with experts, whether it is a mixture-of-experts layer.

    Args:
        frequency: ``--moe-layer-freq``: N for one expert layer in every N, starting with the first, or a list
            of 0 (dense) and 1 (experts).
        layers: number of layers.

    Raises:
        DescriptionError: a list of another length or with other values.
    """
    if isinstance(frequency, int):
        if frequency < 1:
            raise DescriptionError(
                f"--moe-layer-freq: {frequency}; valid: an integer >= 1 or a list of 0 and 1"
            )
        return tuple(index % frequency == 0 for index in range(layers))
    if len(frequency) != layers or any(value not in (0, 1) for value in frequency):
        raise DescriptionError(
            f"--moe-layer-freq: a list of {len(frequency)} values; valid: {layers} values, each 0 or 1"
        )
    return tuple(bool(value) for value in frequency)


def layout_stage_layers(layout: str) -> tuple[int, ...]:
    """Counts the layers of every virtual stage in a layout such as ``"Et*3|t*4|tL"``.

    The layout is the value of ``--pipeline-model-parallel-layout``.

    Raises:
        DescriptionError: a layout that Megatron would refuse, one with multi-token prediction layers, or one
            with a stage that has no layer.
    """
    text = layout.replace(",", "")
    # The same two expansions, in the same order, as Megatron's PipelineParallelLayerLayout.parse_str_to_list.
    for repetition in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        grown = sum(len(match[1]) * int(match[2][:9]) for match in re.finditer(repetition, text))
        if grown > 2 * MOST_LAYERS:
            raise DescriptionError(
                f"--pipeline-model-parallel-layout: {shown(layout)} has {grown} parts; "
                f"valid: at most {MOST_LAYERS} layers"
            )
        text = re.sub(repetition, lambda match: match[1] * int(match[2]), text)
    counts = tuple(stage.count("t") for stage in text.split("|"))
    if not re.fullmatch(r"Et+L", text.replace("|", "")) or not all(counts):
        raise DescriptionError(
            f"--pipeline-model-parallel-layout: {shown(layout)} is not planned for; "
            "valid: E, then one t per layer, then L, with | "
            "between stages that have at least one t, e.g. 'Et*3|t*4|tL'"
        )
    return counts


def _list_expression(node: ast.expr) -> list[int] | int:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.List(elts=elements):
            values = [_list_expression(element) for element in elements]
            if all(isinstance(value, int) for value in values):
                return values
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _list_expression(left), _list_expression(right)
            if isinstance(first, list) and isinstance(second, list):
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            factors = (_list_expression(left), _list_expression(right))
            times = next((factor for factor in factors if isinstance(factor, int)), None)
            repeated = next((factor for factor in factors if isinstance(factor, list)), None)
            if times is not None and repeated is not None and times * len(repeated) <= MOST_LAYERS:
                return repeated * times
    raise ValueError(f"only lists of at most {MOST_LAYERS} integers, + and * are allowed")
