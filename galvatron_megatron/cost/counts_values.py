"""What one layer costs in operators, collectives and bytes, on one rank and for one micro-batch."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import prod

from galvatron_megatron.errors import DescriptionError

OPERATOR_KINDS = ("gemm", "attention", "memory")
COLLECTIVE_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
GROUPS = ("tp", "cp", "dp", "ep", "etp", "etp_ep", "pp")
EXPERT_GROUPS = ("ep", "etp", "etp_ep")
PHASES = ("forward", "recompute", "backward", "input_gradient", "weight_gradient")
"""``recompute`` is forward work repeated in the backward pass; the GEMMs of a weight count as
``input_gradient`` and ``weight_gradient``, everything else of the backward pass as ``backward``."""
_SHAPE_LENGTH = {"gemm": 4, "attention": 6, "memory": 0}


def _require(owner: object, name: str, valid: tuple[str, ...]) -> None:
    if getattr(owner, name) not in valid:
        kind = type(owner).__name__.lower()
        raise DescriptionError(f"{kind} {name}: {getattr(owner, name)!r} is unknown; valid: {', '.join(valid)}")


@dataclass(kw_only=True, frozen=True, slots=True)
class Operator:
    """Work of one kernel; ``flops`` and ``bytes`` are those of ONE of its ``count`` executions."""

    name: str
    kind: str
    """``gemm``, ``attention`` (a fused kernel) or ``memory`` (bound by memory traffic)."""
    phase: str
    """One of ``PHASES``."""
    flops: int
    """2 per multiply-add. Attention counts all seq_q x seq_k pairs: a causal kernel that skips the masked
    half does half of it. Zero for memory operators."""
    bytes: int
    """Read and written, every operand once."""
    shape: tuple[int, ...] = ()
    """GEMM: (batch, m, n, k). Attention: (batch, heads, kv_heads, seq_q, seq_k, head_dim)."""
    count: int = 1

    def __post_init__(self) -> None:
        _require(self, "kind", OPERATOR_KINDS)
        _require(self, "phase", PHASES)
        if len(self.shape) != _SHAPE_LENGTH[self.kind]:
            raise DescriptionError(
                f"operator {self.name} shape: {self.shape}; valid: {_SHAPE_LENGTH[self.kind]} entries for "
                f"{self.kind!r}"
            )


@dataclass(kw_only=True, frozen=True, slots=True)
class Collective:
    """One collective of a rank; ``bytes`` is that of ONE of its ``count`` executions."""

    kind: str
    """One of ``COLLECTIVE_KINDS``."""
    group: str
    """Which ranks take part: ``tp`` (also Ulysses' group), ``cp``, ``dp``, ``pp``; for experts ``ep``, ``etp``
    (the parts of one expert) or ``etp_ep`` (all experts)."""
    phase: str
    """One of ``PHASES``; ``weight_gradient`` where only the weight gradient waits for it."""
    bytes: int
    """Of the full, unsharded buffer: the tensor that is all-reduced, the gathered output of an all-gather,
    the input of a reduce-scatter or an all-to-all on one rank, the tensor that is sent."""
    count: int = 1

    def __post_init__(self) -> None:
        _require(self, "kind", COLLECTIVE_KINDS)
        _require(self, "group", GROUPS)
        _require(self, "phase", PHASES)


@dataclass(kw_only=True, frozen=True, slots=True)
class LayerCounts:
    """Counts of one layer, of the embedding or of the head; one rank, one micro-batch.

    Collectives that happen once per step (gradient reduction, parameter gathering, the sum of replicated
    parameters' gradients over tp under sequence parallelism) are not among them.
    """

    parameters_sharded: int
    """Parameters on this rank that are split over tp."""
    parameters_replicated: int
    """Parameters on this rank that every rank of the tp group holds."""
    parameters_apart: int = 0
    """Those of norms, and biases that are added outside of their linear; not counted where traced."""
    parameters_expert: int = 0
    """Parameters of the experts on this rank, which has its own part of them and its own replicas."""
    parameter_tensors: int = 0
    operators: tuple[Operator, ...] = ()
    collectives: tuple[Collective, ...] = ()
    activation_bytes: int
    """Kept for the backward pass, every storage once: the layer's input included (where it is kept), its
    output not, so that the sum over layers counts everything once."""
    transient_bytes: int
    """Peak above what is kept, during forward or backward: temporaries, gradients of activations and one
    weight gradient where it is not accumulated in place."""
    shared_bytes: int = 0
    """Kept once however many layers there are: rotary tables, attention masks."""
    activation_terms: tuple[tuple[str, int], ...] = ()
    """The parts of ``activation_bytes``, by name."""
    source: str = "modelled"
    """``modelled`` (closed form) or ``traced``."""

    @property
    def parameters(self) -> int:
        """Parameters on this rank."""
        return self.parameters_sharded + self.parameters_replicated + self.parameters_expert

    @property
    def work(self) -> tuple[int, int, int]:
        """FLOPs, bytes of the operators, bytes of the collectives: equal where the same kernels run."""
        return (
            self.flops(),
            sum(op.bytes * op.count for op in self.operators),
            sum(collective.bytes * collective.count for collective in self.collectives),
        )

    def flops(self, *phases: str) -> int:
        """FLOPs of the given phases, of all where none is given."""
        return sum(op.flops * op.count for op in self.operators if not phases or op.phase in phases)

    def gemm_shapes(self) -> dict[tuple[str, tuple[int, ...]], int]:
        """(phase, shape) of GEMMs and attention -> executions."""
        return tally(((op.phase, op.shape), op.count) for op in self.operators if op.shape)

    def collective_bytes(self) -> dict[tuple[str, str, str, int], int]:
        """(phase, kind, group, bytes) of collectives -> executions."""
        return tally(((c.phase, c.kind, c.group, c.bytes), c.count) for c in self.collectives)

    def to_json(self) -> dict:
        """Plain lists, numbers and strings; ``from_json`` of it gives an equal value."""
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        content["operators"] = [_row(op) for op in self.operators]
        content["collectives"] = [_row(collective) for collective in self.collectives]
        content["activation_terms"] = [list(term) for term in self.activation_terms]
        return content

    @classmethod
    def from_json(cls, content: dict) -> "LayerCounts":
        """Reads what :meth:`to_json` wrote.

        Raises:
            DescriptionError: a field is missing, unknown or malformed.
        """
        try:
            return cls(
                **content
                | {
                    "operators": tuple(_value(Operator, row) for row in content["operators"]),
                    "collectives": tuple(_value(Collective, row) for row in content["collectives"]),
                    "activation_terms": tuple((name, size) for name, size in content["activation_terms"]),
                }
            )
        except (TypeError, ValueError, KeyError) as error:
            raise DescriptionError(f"layer counts: {error}; valid: what a trace wrote") from error


def _row(value: Operator | Collective) -> list:
    content = [getattr(value, entry.name) for entry in fields(value)]
    return [list(part) if isinstance(part, tuple) else part for part in content]


def _value[T: (Operator, Collective)](kind: type[T], row: list) -> T:
    names = [entry.name for entry in fields(kind)]
    content = [tuple(part) if isinstance(part, list) else part for part in row]
    return kind(**dict(zip(names, content, strict=True)))


def tally[K](pairs: Iterable[tuple[K, int]]) -> dict[K, int]:
    """Sums the second entries by the first, in order of first appearance."""
    totals: dict[K, int] = {}
    for key, count in pairs:
        totals[key] = totals.get(key, 0) + count
    return totals


def gemm(
    name: str, phase: str, batch: int, m: int, n: int, k: int, *, element_bytes: int, count: int = 1
) -> Operator:
    """A (batched) product of an m x k with a k x n matrix.

    Args:
        name: what it is for.
        phase: one of ``PHASES``.
        batch: independent products in one kernel.
        m: rows of the result.
        n: columns of the result.
        k: inner dimension.
        element_bytes: of all three matrices.
        count: executions.
    """
    return Operator(
        name=name,
        kind="gemm",
        phase=phase,
        flops=2 * prod((batch, m, n, k)),
        bytes=batch * (m * k + k * n + m * n) * element_bytes,
        shape=(batch, m, n, k),
        count=count,
    )
