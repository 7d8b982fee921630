"""What is decided for one training job: pipeline stages, a strategy per layer, micro-batches."""

from dataclasses import dataclass, field

from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.checks import require_count, shown
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Recompute, Strategy

SCHEMA_VERSION = 1


@dataclass(kw_only=True, frozen=True, slots=True)
class LayerPlan:
    """One layer of the model and how it runs."""

    kind: LayerKind
    """Kind of the layer, so that a plan is not applied to another model in silence."""
    strategy: Strategy

    def __post_init__(self) -> None:
        if not isinstance(self.kind, LayerKind):
            valid = ", ".join(member.value for member in LayerKind)
            raise PlanError(f"layer.kind: {shown(self.kind)} is unknown; valid: {valid}")
        if not isinstance(self.strategy, Strategy):
            raise PlanError(
                f"layer.strategy: {shown(self.strategy)} is not a strategy; valid: a mapping of degrees"
            )
        if not self.kind.has_experts:
            _require_no_expert_degrees(self.strategy, f"layer of kind {self.kind.value}")


def _require_no_expert_degrees(strategy: Strategy, where: str) -> None:
    if strategy != strategy.without_experts:
        raise PlanError(
            f"{where}: {strategy} has no experts to share out; valid: expert_parallel 1 and no "
            "expert_tensor_parallel, which belong to layers with experts"
        )


@dataclass(kw_only=True, frozen=True, slots=True)
class StagePlan:
    """The consecutive layers of one virtual pipeline stage."""

    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, tuple) or not self.layers:
            raise PlanError("stage.layers: empty; valid: at least one layer")


@dataclass(kw_only=True, frozen=True, slots=True)
class Fingerprints:
    """Which model, cluster and profile a plan was made for; an empty string where unknown."""

    model: str = ""
    cluster: str = ""
    profile: str = ""


@dataclass(kw_only=True, frozen=True, slots=True)
class Plan:
    """A parallel plan: the only thing that passes from the planner to the runtime."""

    pp: int
    """Pipeline-parallel degree."""
    virtual_stages: int = 1
    """Model chunks per pipeline rank; above 1 the schedule is interleaved 1F1B."""
    micro_batch_size: int
    """Samples in one micro-batch of one base data-parallel rank."""
    micro_batches: int
    """Micro-batches per step and base data-parallel rank."""
    base: Strategy
    """The base layout: how embedding and head run, and Megatron's global arguments."""
    stages: tuple[StagePlan, ...]
    """pp * virtual_stages entries in model order; entry i runs on pipeline rank i % pp."""
    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in ("pp", "virtual_stages", "micro_batch_size", "micro_batches"):
            require_count(getattr(self, name), f"plan.{name}")
        if self.schema_version != SCHEMA_VERSION:
            raise PlanError(
                f"plan.schema_version: {shown(self.schema_version)} is not readable here; "
                f"valid: {SCHEMA_VERSION}"
            )
        if self.virtual_stages > 1 and self.pp == 1:
            raise PlanError(f"plan.virtual_stages: {self.virtual_stages} needs pp > 1; valid: 1")
        if len(self.stages) != self.pp * self.virtual_stages:
            raise PlanError(
                f"plan.stages: {len(self.stages)} entries; valid: {self.pp * self.virtual_stages} "
                f"(pp {self.pp} x virtual_stages {self.virtual_stages})"
            )
        if self.base.recompute is not Recompute.NONE:
            raise PlanError(f"plan.base.recompute: {self.base.recompute.value!r}; valid: none")
        _require_no_expert_degrees(self.base, "plan.base")
        samples = self.micro_batch_size * self.base.dp
        for index, layer in enumerate(self.layers):
            strategy = layer.strategy
            if strategy.ranks != self.base.ranks:
                raise PlanError(
                    f"plan layer {index}: tp {strategy.tp} x cp {strategy.cp} x dp {strategy.dp} = "
                    f"{strategy.ranks} ranks; valid: {self.base.ranks}, the ranks of a stage in the base layout"
                )
            if samples % strategy.dp:
                raise PlanError(
                    f"plan layer {index}: dp {strategy.dp} does not divide the {samples} samples of a step's "
                    f"micro-batch (micro_batch_size {self.micro_batch_size} x base dp {self.base.dp}); "
                    f"valid: a divisor of {samples}"
                )

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """All layers in model order."""
        return tuple(layer for stage in self.stages for layer in stage.layers)

    @property
    def world_size(self) -> int:
        """Ranks the plan needs."""
        return self.pp * self.base.ranks

    @property
    def global_batch_size(self) -> int:
        """Samples per step."""
        return self.micro_batches * self.micro_batch_size * self.base.dp

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The distinct strategies of the layers, in order of first use."""
        return tuple(dict.fromkeys(layer.strategy for layer in self.layers))

    @property
    def expert_degrees(self) -> tuple[tuple[int, int | None], ...]:
        """The distinct (expert_parallel, expert_tensor_parallel) of the layers with experts."""
        return tuple(
            dict.fromkeys(
                (layer.strategy.expert_parallel, layer.strategy.expert_tensor_parallel)
                for layer in self.layers
                if layer.kind.has_experts
            )
        )

    @property
    def is_uniform(self) -> bool:
        """True where stock Megatron can run the plan: every layer runs alike and in the base layout."""
        if len({strategy.without_experts for strategy in self.strategies}) != 1 or len(self.expert_degrees) > 1:
            return False
        only = self.strategies[0]
        return only.layout == self.base.layout and (
            (only.sequence_parallel, only.zero, only.offload)
            == (self.base.sequence_parallel, self.base.zero, self.base.offload)
        )
