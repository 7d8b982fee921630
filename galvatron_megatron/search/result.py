"""What a search answers."""

from dataclasses import dataclass

from galvatron_megatron.plan.plan import Plan


@dataclass(kw_only=True, frozen=True, slots=True)
class SearchResult:
    """The chosen plan and what stands beside it."""

    plan: Plan
    step_seconds: float
    """Predicted time of one training step."""
    stage_seconds: list[float]
    """Forward and backward of one micro-batch on every pipeline rank."""
    sync_seconds: list[float]
    """Once-per-step synchronisation of every pipeline rank."""
    memory_bytes: list[int]
    """Predicted peak per pipeline rank."""
    samples_per_second: float
    search_seconds: float
    runners_up: list[tuple[Plan, float]]
    """The best competitors with their step seconds, the fastest first: one plan of each combination of outer
    decisions (batch, pp, virtual stages, micro-batches, base layout) that the chosen plan does not have. A
    combination that had to be solved to prove the answer stands with its best plan, as a rule layer-wise;
    one that bounds excluded stands with its best uniform plan: a layer-wise plan of it may be faster than
    that, but not than ``best_layerwise``. ``Plan.is_uniform`` tells which. No uniform plan of a combination
    that is missing is faster than the last. After an interruption only what was met is listed."""
    best_uniform: tuple[Plan, float] | None
    """Best plan that runs every layer alike, with its step seconds; None where none fits."""
    best_layerwise: tuple[Plan, float] | None
    """Fastest plan of the whole space, which ``plan`` is unless ``uniform_margin`` preferred the uniform
    one."""
    gap: float
    """0.0 where the plan is proven the best of the space; else the most it can be off, as a fraction."""
    outer_points: int
    """Combinations of outer decisions in the space."""
    solved_points: int
    """Those that bounds could not exclude."""
    simulated: tuple[tuple[Plan, float], ...] = ()
    """Plans whose schedules were run event by event, with the step seconds that came out."""
    searched: tuple[Plan, float] | None = None
    """What the search itself chose, with its step seconds, where a simulated schedule decided otherwise."""
