from dataclasses import replace

import pytest

from galvatron_megatron.describe.model import Attention, Experts, Layer, Mamba, Mlp, Model
from galvatron_megatron.describe.plan_check import check_plan, strategy_problem
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import Fingerprints, LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import SequenceParallel, Strategy

BLOCK = Layer(
    kind=LayerKind.BLOCK,
    attention=Attention(heads=12, query_groups=4, head_dim=8),
    mlp=Mlp(ffn_hidden_size=96),
)
MODEL = Model(name="small", hidden_size=96, seq_length=48, vocab_size=1000, layers=(BLOCK,) * 4)


def plan_of(strategy: Strategy, layers: int = 4, **settings: object) -> Plan:
    stage = StagePlan(layers=(LayerPlan(kind=LayerKind.BLOCK, strategy=strategy),) * layers)
    return Plan(pp=1, micro_batch_size=1, micro_batches=4, base=strategy, stages=(stage,), **settings)


def test_a_plan_that_belongs() -> None:
    plan = plan_of(Strategy(tp=4, dp=2), fingerprints=Fingerprints(model=MODEL.fingerprint()))
    check_plan(plan, model=MODEL, world_size=8, global_batch_size=8)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(Strategy(dp=4)), "made for 4 ranks (pp 1 x 4 a stage), but there are 8; valid: start 4 ranks"),
        (plan_of(Strategy(dp=8)), "made for 32 samples per step, but the job has 8"),
        (plan_of(Strategy(tp=4, dp=2), layers=3), "p.yaml.stages: 3 layers; valid: 4"),
        (
            plan_of(Strategy(tp=4, dp=2), fingerprints=Fingerprints(model="0123")),
            "p.yaml.fingerprints.model: '0123' is another model",
        ),
        (plan_of(Strategy(tp=8, dp=2, cp=1), layers=4), "made for 16 ranks"),
    ],
)
def test_plans_of_another_job(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_plan(plan, model=MODEL, world_size=8, global_batch_size=8, where="p.yaml")
    assert message in str(caught.value)


def test_kinds_are_compared() -> None:
    moe = Layer(
        kind=LayerKind.MOE_BLOCK,
        attention=BLOCK.attention,
        experts=Experts(count=4, top_k=2, ffn_hidden_size=96),
    )
    with pytest.raises(PlanError, match=r"p layer 1: kind 'block'; valid: 'moe_block'"):
        check_plan(plan_of(Strategy()), model=replace(MODEL, layers=(BLOCK, moe) * 2), where="p")


def test_interleaving_needs_whole_groups_of_micro_batches() -> None:
    stage = StagePlan(layers=(LayerPlan(kind=LayerKind.BLOCK, strategy=Strategy()),))
    settings = {"pp": 2, "virtual_stages": 2, "micro_batch_size": 1, "base": Strategy(), "stages": (stage,) * 4}
    check_plan(Plan(micro_batches=4, **settings), model=MODEL)
    with pytest.raises(PlanError, match=r"micro_batches: 3 .*multiple of pp 2"):
        check_plan(Plan(micro_batches=3, **settings), model=MODEL)


PER_RANK = "the sequence length per cp rank"
MEGATRON, ULYSSES = SequenceParallel.MEGATRON, SequenceParallel.ULYSSES


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        (Strategy(tp=4), None),
        (Strategy(tp=12), None),
        (Strategy(tp=5), "tp 5 does not divide 12, the attention heads"),
        (Strategy(tp=6), "tp 6 neither divides nor is a multiple of 4, the query groups"),
        (Strategy(tp=2, sequence_parallel=MEGATRON, cp=3), None),
        (Strategy(tp=4, sequence_parallel=ULYSSES), None),
        (Strategy(tp=5, sequence_parallel=ULYSSES), f"tp 5 does not divide 48, {PER_RANK}"),
        (Strategy(cp=16), "2 x cp 32 does not divide 48, the sequence length"),
        (
            Strategy(cp=12, tp=3, sequence_parallel=MEGATRON),
            f"tp 3 does not divide 4, {PER_RANK}",
        ),
    ],
)
def test_divisibility_of_a_block(strategy: Strategy, problem: str | None) -> None:
    assert strategy_problem(BLOCK, strategy, MODEL) == problem


def test_divisibility_of_other_layers() -> None:
    mamba = Layer(kind=LayerKind.MAMBA, mamba=Mamba(heads=12, groups=4))
    assert strategy_problem(mamba, Strategy(tp=4), MODEL) is None
    assert strategy_problem(mamba, Strategy(tp=12), MODEL) == "tp 12 does not divide 4, the Mamba groups"
    assert strategy_problem(mamba, Strategy(tp=8), MODEL) == "tp 8 does not divide 12, the Mamba heads"
    experts = Experts(count=4, top_k=1, ffn_hidden_size=90, shared_ffn_hidden_size=30)
    moe = Layer(kind=LayerKind.MOE, experts=experts)
    assert "experts' feed-forward size" in strategy_problem(moe, Strategy(tp=4), MODEL)
    assert "shared experts' feed-forward size" in strategy_problem(moe, Strategy(tp=9), MODEL)
    mlp = Layer(kind=LayerKind.MLP, mlp=Mlp(ffn_hidden_size=90))
    assert "feed-forward size" in strategy_problem(mlp, Strategy(tp=4), MODEL)
    # Ulysses keeps the weights whole.
    assert strategy_problem(mlp, Strategy(tp=4, sequence_parallel=ULYSSES), MODEL) is None
    assert strategy_problem(None, Strategy(tp=7), MODEL) is None
    assert "sequence length" in strategy_problem(None, Strategy(tp=7, sequence_parallel=MEGATRON), MODEL)
