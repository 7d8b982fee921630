"""A measured run: what ran, on what, and what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.model import Attention, Experts, Layer, Mlp, Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Recompute, Strategy


@dataclass(kw_only=True, frozen=True, slots=True)
class MeasuredRun:
    """One row of a table."""

    row: int
    """Line of the table, from 1, the header not counted."""
    label: str
    """What identifies the row to a reader."""
    cluster: str
    """Name of the test bed's description."""
    nodes: int
    model: Model
    plan: Plan
    options: RunOptions = field(default_factory=RunOptions)
    step_seconds: float = 0.0
    """Measured; 0 where it was not."""
    peak_bytes: tuple[tuple[int, int], ...] = ()
    """(pipeline rank, largest allocated bytes), measured."""
    group: str = ""
    """Rows of one group differ in their plan only, so that one of them is the best choice."""
    doubt: str = ""
    """Why the row cannot be predicted; it is reported apart, with this reason."""


class RowReader:
    """Reads typed values from a row and names line and column where it cannot."""

    def __init__(self, row: Mapping[str, str], number: int, table: str) -> None:
        self._row = row
        self.number = number
        self._table = table

    def _fail(self, column: str, kind: str) -> DescriptionError:
        return DescriptionError(
            f"{self._table} row {self.number} column {column}: {self._row.get(column)!r}; valid: {kind}"
        )

    def text(self, column: str) -> str:
        """The cell as it is; empty where it is missing."""
        return (self._row.get(column) or "").strip()

    def integer(self, column: str, default: int | None = None) -> int:
        """A whole number >= 1; ``default`` for an empty cell."""
        text = self.text(column)
        if not text and default is not None:
            return default
        try:
            value = int(text)
        except ValueError:
            raise self._fail(column, "an integer") from None
        if value < 1:
            raise self._fail(column, "an integer >= 1")
        return value

    def number_of(self, column: str) -> float:
        """A number above zero."""
        try:
            value = float(self.text(column))
        except ValueError:
            raise self._fail(column, "a number") from None
        if not 0 < value < float("inf"):
            raise self._fail(column, "a number > 0")
        return value

    def flag(self, column: str) -> bool:
        """True for ``true``; false for an empty cell or ``false``."""
        text = self.text(column).lower()
        if text not in ("", "true", "false"):
            raise self._fail(column, "true or false")
        return text == "true"


@cache
def gpt_layer(
    hidden: int,
    heads: int,
    *,
    groups: int = 0,
    ffn: int = 0,
    gated: bool = False,
    bias: bool = True,
    experts: Experts | None = None,
) -> Layer:
    """A GPT block; equal arguments give one object, so that prices are shared."""
    return Layer(
        kind=LayerKind.BLOCK if experts is None else LayerKind.MOE_BLOCK,
        experts=experts,
        attention=Attention(
            heads=heads,
            query_groups=groups or heads,
            head_dim=hidden // heads,
            qkv_bias=bias,
            output_bias=bias,
        ),
        mlp=None
        if experts is not None
        else Mlp(
            ffn_hidden_size=ffn or 4 * hidden, gated=gated, bias=bias, activation="silu" if gated else "gelu"
        ),
    )


def even_split(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of every stage; the first stages hold one more where it does not divide."""
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


def uniform_plan(
    model: Model,
    strategy: Strategy,
    *,
    pp: int,
    micro_batch_size: int,
    micro_batches: int,
    virtual_stages: int = 1,
    split: Sequence[int] | None = None,
) -> Plan:
    """The plan of a Megatron job whose layers all run alike.

    Raises:
        PlanError: the numbers do not make a plan.
    """
    split = split or even_split(len(model.layers), pp * virtual_stages)
    rest = iter(model.layers)
    return Plan(
        pp=pp,
        virtual_stages=virtual_stages,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        base=replace(strategy.without_experts, recompute=Recompute.NONE),
        stages=tuple(
            StagePlan(layers=tuple(LayerPlan(kind=next(rest).kind, strategy=strategy) for _ in range(count)))
            for count in split
        ),
    )
