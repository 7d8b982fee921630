"""What a search is asked: a model, devices, memory, a batch, and the limits of the space."""

from dataclasses import dataclass, field

from galvatron_megatron.describe.model import Model
from galvatron_megatron.errors import SearchError
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Offload, Recompute

ALL_RECOMPUTE = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)

UNIFORM_MARGIN = 0.02
"""What a layer-wise plan should gain over the best uniform one, as a fraction of the step time, before a job
takes it: predictions of two plans of one job are not surer relative to each other, and a uniform plan runs on
Megatron's own code alone."""


@dataclass(kw_only=True, frozen=True, slots=True)
class SearchRequest:
    """The question to the search engine; checked before anything is priced."""

    model: Model
    world_size: int
    """Devices of the job."""
    devices_per_node: int
    memory_bytes: int
    """Memory that a plan may use on one device."""
    global_batch_size: int | None = None
    """Samples per step (the Megatron way); or None where ``global_batch_sizes`` is given."""
    global_batch_sizes: tuple[int, ...] = ()
    """Batches to choose from; the plan with the highest throughput wins."""
    constraints: Constraints = field(default_factory=Constraints)
    """What the user fixed by hand; a field that is None is free."""
    layerwise: bool = True
    """False: only uniform plans, which stock Megatron can run."""
    max_zero: int = 3
    allow_sequence_parallel: bool = True
    """Megatron's sequence parallelism inside tp groups."""
    allow_plain_tp: bool = True
    """Tensor parallelism without splitting the sequence."""
    allow_ulysses: bool = True
    allow_cp: bool = True
    allow_expert_parallel: bool = True
    """Experts may be shared out over ranks."""
    offloads: tuple[Offload, ...] = (Offload.NONE,)
    """What may be kept in host memory; priced only where the cluster describes its hosts."""
    host_bytes: int | None = None
    """Memory of a node that its ranks may keep offloaded states in, together; None where that is no limit."""
    on_device_layers: frozenset[int] = frozenset()
    """Numbers of layers that keep nothing there."""
    on_device_ends: bool = False
    """Embedding and head keep nothing there."""
    known: tuple[Plan, ...] = ()
    """Plans that are answers: only faster ones are searched for."""
    allow_interleaving: bool = True
    max_virtual_stages: int = 8
    tp_across_nodes: bool = False
    """A tp group may span nodes; False keeps it inside one."""
    recompute_kinds: tuple[Recompute, ...] = ALL_RECOMPUTE
    min_tokens_per_rank: int = 256
    """Tokens of one sample that tp and cp must leave on a rank when they split the sequence."""
    uniform_margin: float = 0.0
    """A layer-wise plan must be faster than the best uniform one by more than this fraction, or the uniform
    one is chosen: below the uncertainty of the prediction, simple is better. 0 always takes the fastest."""
    names_nearest: bool = True
    """Where nothing fits, the error names the plan that comes nearest, which takes time."""
    most_seconds: float | None = None
    """Time after which the best plan so far is the answer, if there is one; None for as long as it takes."""
    runners_up: int = 5
    """How many competitors, of other outer decisions, to report."""

    def __post_init__(self) -> None:
        for name in ("world_size", "devices_per_node", "memory_bytes", "max_virtual_stages"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise SearchError(f"search {name}: {value!r}; valid: an integer >= 1")
        if (self.global_batch_size is None) == (not self.global_batch_sizes):
            raise SearchError("search global_batch_size: give either one batch size or a range of them")
        for size in self.batch_sizes:
            if type(size) is not int or size < 1:
                raise SearchError(f"search global_batch_size: {size!r}; valid: an integer >= 1")
        fixed = self.constraints.global_batch_size
        if fixed is not None and fixed not in self.batch_sizes:
            raise SearchError(
                f"search global_batch_size: {self.batch_sizes[0]} is asked, but {fixed} is fixed by hand; "
                f"valid: {fixed}"
            )
        if self.max_zero not in (0, 1, 2, 3):
            raise SearchError(f"search max_zero: {self.max_zero!r}; valid: 0, 1, 2, 3")
        if not self.recompute_kinds or not all(isinstance(kind, Recompute) for kind in self.recompute_kinds):
            raise SearchError(
                f"search recompute_kinds: {self.recompute_kinds!r}; valid: some of {ALL_RECOMPUTE}"
            )
        if not self.offloads or not all(isinstance(kind, Offload) for kind in self.offloads):
            raise SearchError(f"search offloads: {self.offloads!r}; valid: some of {tuple(Offload)}")
        if self.on_device_layers and Offload.NONE not in self.offloads:
            raise SearchError(f"search offloads: {self.offloads!r}, not of all layers; valid: none among them")
        if self.host_bytes is not None and (type(self.host_bytes) is not int or self.host_bytes < 0):
            raise SearchError(f"search host_bytes: {self.host_bytes!r}; valid: an integer >= 0, or None")
        if not 0 <= self.uniform_margin < 1:
            raise SearchError(f"search uniform_margin: {self.uniform_margin!r}; valid: 0 <= fraction < 1")
        for name in ("min_tokens_per_rank", "runners_up"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise SearchError(f"search {name}: {value!r}; valid: an integer >= 0")
        if self.world_size > self.devices_per_node and self.world_size % self.devices_per_node:
            raise SearchError(
                f"search world_size: {self.world_size} is not a whole number of nodes of "
                f"{self.devices_per_node} devices; valid: a multiple of {self.devices_per_node}"
            )

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes to try, at least one."""
        if self.global_batch_size is not None:
            return (self.global_batch_size,)
        fixed = self.constraints.global_batch_size
        return (fixed,) if fixed is not None and fixed in self.global_batch_sizes else self.global_batch_sizes
