"""Collects the operators, collectives, parameters and kept tensors of one layer."""

from dataclasses import dataclass, replace

from galvatron_megatron.cost.counts_values import Collective, LayerCounts, Operator, gemm
from galvatron_megatron.describe.model import Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

IMPLEMENTATIONS = ("transformer_engine", "local")
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(kw_only=True, frozen=True, slots=True)
class Shapes:
    """Sizes of one micro-batch on one rank."""

    model: Model
    strategy: Strategy
    samples: int
    """Samples of the micro-batch on this rank's data-parallel slice."""
    implementation: str
    """``transformer_engine`` or ``local``."""

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise DescriptionError(
                f"counts implementation: {self.implementation!r} is unknown; "
                f"valid: {', '.join(IMPLEMENTATIONS)}"
            )
        if type(self.samples) is not int or self.samples < 1:
            raise DescriptionError(f"counts samples: {self.samples!r}; valid: an integer >= 1")
        split = self.strategy.cp * (self.strategy.tp if self.is_sequence_split else 1)
        if self.model.seq_length % split:
            raise DescriptionError(
                f"counts seq_length: {self.model.seq_length} is not divisible by {split}, the parts that "
                f"{self.strategy} cuts a sequence into"
            )

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation or weight in computation."""
        return ELEMENT_BYTES[self.model.precision]

    @property
    def fused(self) -> bool:
        """True for Transformer Engine's kernels."""
        return self.implementation == "transformer_engine"

    @property
    def is_sequence_split(self) -> bool:
        """True where the residual stream is split over the tp group."""
        return self.strategy.sequence_parallel is not SequenceParallel.NONE

    @property
    def is_megatron_sp(self) -> bool:
        """True where tensor parallelism gathers and scatters sequence slices."""
        return self.strategy.sequence_parallel is SequenceParallel.MEGATRON

    @property
    def is_ulysses(self) -> bool:
        """True where weights are replicated and attention exchanges heads for sequence."""
        return self.strategy.sequence_parallel is SequenceParallel.ULYSSES

    @property
    def recomputes_core_attention(self) -> bool:
        """True where the core attention alone is recomputed, so that its inputs are kept and no more."""
        return self.strategy.recompute is Recompute.SELECTIVE

    @property
    def cp_tokens(self) -> int:
        """Tokens on a context-parallel rank, over its whole tp group."""
        return self.samples * self.model.seq_length // self.strategy.cp

    @property
    def stream_tokens(self) -> int:
        """Tokens of the residual stream on this rank: where norms, dropouts and additions run."""
        return self.cp_tokens // self.strategy.tp if self.is_sequence_split else self.cp_tokens

    @property
    def gemm_tokens(self) -> int:
        """Tokens that the weights of this rank multiply."""
        return self.stream_tokens if self.is_ulysses else self.cp_tokens

    def per_shard(self, size: int, what: str) -> int:
        """``size`` split over the tensor-parallel weight shards.

        Raises:
            DescriptionError: it does not divide.
        """
        shards = self.strategy.weight_shards
        if size % shards:
            raise DescriptionError(f"counts {what}: {size} is not divisible by the tp degree {shards}")
        return size // shards


class Builder:
    """Adds up a layer part by part, in execution order."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.sharded = 0
        self.replicated = 0
        self.apart = 0
        self.expert = 0
        self.tensors = 0
        self.operators: list[Operator] = []
        self.collectives: list[Collective] = []
        self.kept: dict[str, int] = {}
        self.recomputed: set[str] = set()
        """Names of operators of the core attention, which selective recomputation repeats."""
        self.dropped: set[str] = set()
        """Kept tensors that selective recomputation does not keep."""
        self.transient = 0
        self.shared = 0

    def parameter(self, *sizes: int, sharded: bool, count: int = 1) -> None:
        """Adds ``count`` parameter tensors with so many elements each on this rank."""
        total = sum(sizes) * count
        self.tensors += len(sizes) * count
        if sharded:
            self.sharded += total
        else:
            self.replicated += total

    def vector(self, *sizes: int, sharded: bool) -> None:
        """Adds parameter tensors that no GEMM takes: a norm's, or a bias added outside of its linear."""
        self.parameter(*sizes, sharded=sharded)
        self.apart += sum(sizes)

    def expert_parameter(self, *sizes: int, count: int = 1) -> None:
        """Adds parameter tensors of each of ``count`` experts of this rank."""
        self.expert += sum(sizes) * count
        self.tensors += len(sizes) * count

    def keep(self, name: str, bytes_: int, *, in_core_attention: bool = False) -> None:
        """Keeps a tensor for the backward pass."""
        if bytes_:
            self.kept[name] = self.kept.get(name, 0) + bytes_
            if in_core_attention:
                self.dropped.add(name)

    def peak(self, bytes_: int) -> None:
        """Notes temporaries of so many bytes that live at once."""
        self.transient = max(self.transient, bytes_)

    def linear(self, name: str, m: int, n: int, k: int, *, count: int = 1, first: bool = False) -> None:
        """Adds the three GEMMs of a weight [n, k] applied to m tokens; ``first``: no input gradient."""
        size = self.shapes.element_bytes
        self.operators.append(gemm(name, "forward", 1, m, n, k, element_bytes=size, count=count))
        if not first:
            self.operators.append(gemm(name, "input_gradient", 1, m, k, n, element_bytes=size, count=count))
        self.operators.append(gemm(name, "weight_gradient", 1, n, k, m, element_bytes=size, count=count))

    def memory(self, name: str, forward_bytes: int, backward_bytes: int) -> None:
        """Adds a memory-bound kernel and its backward."""
        for phase, size in (("forward", forward_bytes), ("backward", backward_bytes)):
            if size:
                self.operators.append(
                    Operator(name=name, kind="memory", phase=phase, flops=0, bytes=size, shape=())
                )

    def collective(self, kind: str, group: str, phase: str, bytes_: int, count: int = 1) -> None:
        """Adds a collective; ``bytes_`` of the full buffer."""
        self.collectives.append(Collective(kind=kind, group=group, phase=phase, bytes=bytes_, count=count))

    def enter_tensor_parallel(self, width: int = 0) -> None:
        """In front of a column-parallel linear: gathers its input, reduces the input's gradient.

        Args:
            width: features of a token; the hidden size by default.
        """
        size = self._token_bytes(width)
        if self.shapes.strategy.weight_shards == 1:
            return
        if not self.shapes.is_megatron_sp:
            self.collective("all_reduce", "tp", "backward", size)
            return
        self.collective("all_gather", "tp", "forward", size)
        self.collective("reduce_scatter", "tp", "backward", size)
        # The gathered input is not kept but gathered again for the weight gradient.
        self.collective("all_gather", "tp", "weight_gradient", size)

    def leave_tensor_parallel(self) -> None:
        """Behind a row-parallel linear: reduces the output, gathers its gradient."""
        size = self._token_bytes(0)
        if self.shapes.strategy.weight_shards == 1:
            return
        if not self.shapes.is_megatron_sp:
            self.collective("all_reduce", "tp", "forward", size)
            return
        self.collective("reduce_scatter", "tp", "forward", size)
        self.collective("all_gather", "tp", "backward", size)

    def _token_bytes(self, width: int) -> int:
        shapes = self.shapes
        return shapes.cp_tokens * (width or shapes.model.hidden_size) * shapes.element_bytes

    def counts(self, *, input_name: str) -> LayerCounts:
        """The sum, after recomputation.

        Args:
            input_name: the kept tensor that is the layer's input; full recomputation keeps nothing else.
        """
        mode = self.shapes.strategy.recompute
        operators, collectives, kept, transient = self.operators, self.collectives, self.kept, self.transient
        if mode is Recompute.FULL:
            operators = [*operators, *self._again(operators)]
            collectives = [*collectives, *self._again(collectives)]
            transient += sum(kept.values()) - kept[input_name]
            kept = {input_name: kept[input_name]}
        elif mode is Recompute.SELECTIVE:
            operators = [*operators, *self._again(op for op in operators if op.name in self.recomputed)]
            if self.dropped and not self.shapes.fused:
                # Megatron hands the kind of mask to its checkpoint function as a tensor of one int32.
                kept = kept | {"attention mask kind": 4}
            transient = max(transient, sum(size for name, size in kept.items() if name in self.dropped))
            kept = {name: size for name, size in kept.items() if name not in self.dropped}
        return LayerCounts(
            parameters_sharded=self.sharded,
            parameters_replicated=self.replicated,
            parameters_apart=self.apart,
            parameters_expert=self.expert,
            parameter_tensors=self.tensors,
            operators=tuple(operators),
            collectives=tuple(collectives),
            activation_bytes=sum(kept.values()),
            transient_bytes=transient,
            shared_bytes=self.shared,
            activation_terms=tuple(kept.items()),
        )

    @staticmethod
    def _again(values: object) -> list:
        return [replace(value, phase="recompute") for value in values if value.phase == "forward"]
