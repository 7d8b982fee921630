"""Random valid plans and shorthand for plans, for the tests of several packages."""

from dataclasses import replace

from hypothesis import strategies as st

from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import Fingerprints, LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy


def layers(*strategies: Strategy, kind: LayerKind = LayerKind.BLOCK) -> StagePlan:
    return StagePlan(layers=tuple(LayerPlan(kind=kind, strategy=strategy) for strategy in strategies))


def uniform_plan(
    strategy: Strategy, counts: tuple[int, ...], *, base: Strategy | None = None, **settings: int
) -> Plan:
    """A plan whose layers all run alike; ``counts`` are the layers of every virtual stage."""
    stages = tuple(layers(*[strategy] * count) for count in counts)
    defaults = {"pp": len(counts), "micro_batch_size": 1, "micro_batches": 8}
    return Plan(**(defaults | settings), base=strategy, stages=stages)


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@st.composite
def strategies_for(
    draw: st.DrawFn, ranks: int, samples: int | None = None, *, is_base: bool = False
) -> Strategy:
    """A strategy on so many ranks; its dp divides ``samples``."""
    dp = draw(st.sampled_from([d for d in divisors(ranks) if samples is None or samples % d == 0]))
    tp = draw(st.sampled_from(divisors(ranks // dp)))
    kinds = list(SequenceParallel) if tp > 1 else [SequenceParallel.NONE]
    zero = draw(st.integers(0, 3))
    offloads = [
        Offload.NONE,
        *([Offload.OPTIMIZER] if zero else []),
        *([Offload.PARAMETERS] if zero == 3 else []),
    ]
    return Strategy(
        tp=tp,
        sequence_parallel=draw(st.sampled_from(kinds)),
        cp=ranks // dp // tp,
        dp=dp,
        zero=zero,
        recompute=Recompute.NONE if samples is None else draw(st.sampled_from(list(Recompute))),
        offload=draw(st.sampled_from(offloads)),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any valid plan of up to a few dozen layers."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    pp = draw(st.integers(1, 4))
    virtual_stages = draw(st.integers(1, 3)) if pp > 1 else 1
    base = draw(strategies_for(ranks))
    micro_batch_size = draw(st.integers(1, 4))
    palette = draw(st.lists(strategies_for(ranks, micro_batch_size * base.dp), min_size=1, max_size=3))
    run = st.tuples(
        st.sampled_from(list(LayerKind)),
        st.sampled_from(palette),
        st.integers(1, 4),
        st.sampled_from(divisors(ranks)),
        st.sampled_from(divisors(ranks)),
    )
    stages = []
    for _ in range(pp * virtual_stages):
        runs = draw(st.lists(run, min_size=1, max_size=3))
        stages.append(
            StagePlan(
                layers=tuple(
                    LayerPlan(
                        kind=kind,
                        strategy=(
                            replace(strategy, expert_parallel=parallel, expert_tensor_parallel=split)
                            if kind.has_experts and ranks % (parallel * split) == 0
                            else strategy
                        ),
                    )
                    for kind, strategy, count, parallel, split in runs
                    for _ in range(count)
                )
            )
        )
    text = st.text("0123456789abcdef", max_size=16)
    return Plan(
        pp=pp,
        virtual_stages=virtual_stages,
        micro_batch_size=micro_batch_size,
        micro_batches=draw(st.integers(1, 64)),
        base=base,
        stages=tuple(stages),
        fingerprints=Fingerprints(model=draw(text), cluster=draw(text), profile=draw(text)),
    )


@st.composite
def stock_plans(draw: st.DrawFn) -> Plan:
    """A plan that Megatron's arguments can say, with any stages and recomputation."""
    tp, cp, dp, pp = (draw(st.integers(1, 3)) for _ in range(4))
    split = draw(st.sampled_from([None, *divisors(tp * cp * dp)]))
    parallel = draw(st.sampled_from(divisors(tp * cp * dp // (split or tp))))
    kinds = [SequenceParallel.NONE, SequenceParallel.MEGATRON] if tp > 1 else [SequenceParallel.NONE]
    base = Strategy(
        tp=tp, cp=cp, dp=dp, sequence_parallel=draw(st.sampled_from(kinds)), zero=draw(st.integers(0, 1))
    )
    recompute = draw(st.sampled_from(list(Recompute)))
    recomputed_layers = draw(st.integers(0, 4)) if recompute is Recompute.FULL else 99
    virtual_stages = draw(st.integers(1, 3)) if pp > 1 else 1
    gpt, hybrid = [LayerKind.BLOCK, LayerKind.MOE_BLOCK], list(LayerKind)[2:]
    names = st.lists(st.sampled_from(draw(st.sampled_from([gpt, hybrid]))), min_size=1, max_size=4)
    stages = []
    for _ in range(pp * virtual_stages):
        stage = [
            LayerPlan(
                kind=kind,
                strategy=replace(
                    base,
                    recompute=recompute if index < recomputed_layers else Recompute.NONE,
                    expert_parallel=parallel if kind.has_experts else 1,
                    expert_tensor_parallel=split if kind.has_experts else None,
                ),
            )
            for index, kind in enumerate(draw(names))
        ]
        stages.append(StagePlan(layers=tuple(stage)))
    return Plan(
        pp=pp,
        virtual_stages=virtual_stages,
        micro_batch_size=draw(st.integers(1, 3)),
        micro_batches=pp * draw(st.integers(1, 3)),
        base=base,
        stages=tuple(stages),
    )
