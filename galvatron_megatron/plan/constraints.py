"""What the user has fixed by hand, and the search may not change."""

from dataclasses import dataclass, fields

from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.checks import require_count, shown
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel


@dataclass(kw_only=True, frozen=True, slots=True)
class Constraints:
    """Decisions that are fixed; None leaves the search free.

    A degree holds for the base layout and for every layer.
    """

    tp: int | None = None
    cp: int | None = None
    pp: int | None = None
    expert_parallel: int | None = None
    """Of every layer with experts."""
    expert_tensor_parallel: int | None = None
    """Of every layer with experts; one that equals the layer's tp fixes that it follows tp."""
    sequence_parallel: SequenceParallel | None = None
    """Kind of sequence parallelism of every layer whose tp is above 1."""
    zero: int | None = None
    """ZeRO stage of every layer."""
    recompute: Recompute | None = None
    """Recomputation of every layer; of the recomputed ones where recomputed_layers_per_stage is set."""
    recomputed_layers_per_stage: int | None = None
    """Only so many layers at the start of every virtual stage are recomputed."""
    virtual_stages: int | None = None
    layers_per_virtual_stage: int | None = None
    """Every virtual stage has so many layers, whatever pp is."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of every virtual stage in model order; its length is a multiple of pp."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline rank."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline rank."""
    micro_batch_size: int | None = None
    global_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "tp",
            "cp",
            "pp",
            "expert_parallel",
            "expert_tensor_parallel",
            "virtual_stages",
            "layers_per_virtual_stage",
            "first_stage_layers",
            "last_stage_layers",
            "micro_batch_size",
            "global_batch_size",
        ):
            if getattr(self, name) is not None:
                require_count(getattr(self, name), f"constraint {name}")
        if self.recomputed_layers_per_stage is not None:
            require_count(self.recomputed_layers_per_stage, "constraint recomputed_layers_per_stage", least=0)
        for count in self.stage_layers or ():
            require_count(count, "constraint stage_layers")
        if self.zero is not None and (type(self.zero) is not int or self.zero not in (0, 1, 2, 3)):
            raise PlanError(f"constraint zero: {shown(self.zero)}; valid: 0, 1, 2, 3")
        if self.pp is not None and self.stage_layers is not None and len(self.stage_layers) % self.pp:
            raise PlanError(
                f"constraint pp: {self.pp} does not divide the {len(self.stage_layers)} stages laid out by hand"
                f"; valid: a divisor of {len(self.stage_layers)}"
            )

    @property
    def is_free(self) -> bool:
        """True where nothing is fixed."""
        return all(getattr(self, entry.name) is None for entry in fields(self))

    def check(self, plan: Plan) -> None:
        """Makes sure that a plan keeps every constraint.

        Raises:
            PlanError: names the constraint, what the plan has and what is fixed.
        """
        for name in ("pp", "virtual_stages", "micro_batch_size", "global_batch_size"):
            self._equal(name, getattr(plan, name), getattr(self, name), "plan")
        for name in ("tp", "cp", "zero", "sequence_parallel"):
            self._equal(name, getattr(plan.base, name), self._wanted(name, plan.base.tp), "plan.base")
            for index, layer in enumerate(plan.layers):
                found = getattr(layer.strategy, name)
                self._equal(name, found, self._wanted(name, layer.strategy.tp), f"plan layer {index}")
        for index, layer in enumerate(plan.layers):
            if layer.kind.has_experts:
                strategy, where = layer.strategy, f"plan layer {index}"
                self._equal("expert_parallel", strategy.expert_parallel, self.expert_parallel, where)
                self._equal(
                    "expert_tensor_parallel", strategy.expert_shards, self.expert_tensor_parallel, where
                )
        self._check_stages(plan)
        self._check_recompute(plan)

    def _wanted(self, name: str, tp: int) -> object:
        if name == "sequence_parallel" and tp == 1:
            return None
        return getattr(self, name)

    def _check_stages(self, plan: Plan) -> None:
        counts = tuple(len(stage.layers) for stage in plan.stages)
        self._equal("stage_layers", counts, self.stage_layers, "plan")
        if self.layers_per_virtual_stage is not None:
            for count in counts:
                self._equal("layers_per_virtual_stage", count, self.layers_per_virtual_stage, "plan")
        self._equal("first_stage_layers", sum(counts[:: plan.pp]), self.first_stage_layers, "plan")
        self._equal("last_stage_layers", sum(counts[plan.pp - 1 :: plan.pp]), self.last_stage_layers, "plan")

    def _check_recompute(self, plan: Plan) -> None:
        if self.recompute is None:
            return
        index = 0
        for stage in plan.stages:
            for position, layer in enumerate(stage.layers):
                limit = self.recomputed_layers_per_stage
                wanted = self.recompute if limit is None or position < limit else Recompute.NONE
                found = layer.strategy.recompute
                if wanted is Recompute.SELECTIVE and not layer.kind.has_attention and found is Recompute.NONE:
                    # Selective recomputation does nothing to such a layer.
                    wanted = found
                self._equal("recompute", found, wanted, f"plan layer {index}")
                index += 1

    @staticmethod
    def _equal(name: str, found: object, wanted: object, where: str) -> None:
        if wanted is not None and found != wanted:
            raise PlanError(f"{where}: {name} is {found}, but {wanted} is fixed by hand; valid: {wanted}")
