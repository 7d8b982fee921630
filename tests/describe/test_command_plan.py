import shlex

import pytest

from galvatron_megatron.describe.command_plan import plan_from_command_line
from galvatron_megatron.describe.megatron_args import model_from_arguments, parse_command_line
from galvatron_megatron.describe.plan_check import check_plan
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.plan.megatron_arguments import command_line
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

SIZES = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 8 --seq-length 128 --max-position-embeddings 128 "
    "--vocab-size 1000 --bf16"
)


def plan_of(flags: str, world_size: int = 8) -> Plan:
    words = shlex.split(f"pretrain_gpt.py {SIZES} {flags}")
    model = model_from_arguments(parse_command_line(words))
    plan = plan_from_command_line(words, model, world_size)
    check_plan(plan, model=model, world_size=world_size)
    return plan


def test_degrees_and_batch() -> None:
    plan = plan_of(
        "--micro-batch-size 2 --global-batch-size 32 --tensor-model-parallel-size 2 --sequence-parallel "
        "--pipeline-model-parallel-size 2 --use-distributed-optimizer --recompute-granularity selective"
    )
    assert (plan.pp, plan.base.tp, plan.base.dp, plan.base.zero) == (2, 2, 2, 1)
    assert (plan.micro_batch_size, plan.micro_batches) == (2, 8)
    assert plan.base.sequence_parallel is SequenceParallel.MEGATRON
    assert {layer.strategy.recompute for layer in plan.layers} == {Recompute.SELECTIVE}
    # As Megatron, which makes one micro-batch where no batch is given.
    assert plan_of("--micro-batch-size 3").global_batch_size == 24


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ("--pipeline-model-parallel-size 4", [2, 2, 2, 2]),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2", [2, 2, 2, 2]),
        ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 4", [1] * 8),
        ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 5", [5, 1, 1, 1]),
        (
            "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 1 "
            "--decoder-last-pipeline-num-layers 3",
            [1, 2, 2, 3],
        ),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*3|t*5L", [3, 5]),
    ],
)
def test_stages(flags: str, stages: list[int]) -> None:
    plan = plan_of(f"--micro-batch-size 1 --global-batch-size 16 {flags}")
    assert [len(stage.layers) for stage in plan.stages] == stages


def test_first_layers_of_every_stage_are_recomputed() -> None:
    plan = plan_of(
        "--micro-batch-size 1 --pipeline-model-parallel-size 2 --recompute-granularity full "
        "--recompute-method block --recompute-num-layers 1"
    )
    found = [layer.strategy.recompute is Recompute.FULL for layer in plan.layers]
    assert found == [True, False, False, False] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "no --micro-batch-size"),
        ("--micro-batch-size 0", "micro_batch_size: 0"),
        ("--micro-batch-size 1 --tensor-model-parallel-size 3", "does not divide 8 ranks"),
        ("--micro-batch-size 1 --global-batch-size 12", "--global-batch-size 12 is not divisible"),
        (
            "--micro-batch-size 1 --pipeline-model-parallel-size 8 --decoder-first-pipeline-num-layers 7",
            "divide",
        ),
        (
            "--micro-batch-size 1 --pipeline-model-parallel-size 1 --decoder-first-pipeline-num-layers 9",
            "8 layers",
        ),
        (
            "--micro-batch-size 1 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*3|tL",
            "[3, 1]",
        ),
        (
            "--micro-batch-size 1 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
            "--num-layers-per-virtual-pipeline-stage 3 x pp 2 does not divide 8 layers",
        ),
        (
            "--micro-batch-size 1 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3",
            "3 virtual stages",
        ),
        ("--micro-batch-size 1 --num-virtual-stages-per-pipeline-rank 2", "needs pp > 1"),
    ],
)
def test_what_megatron_refuses_is_refused_in_one_line(flags: str, message: str) -> None:
    with pytest.raises(GalvatronError) as caught:
        plan_of(flags)
    assert message in str(caught.value)
    assert "; valid: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_degrees_of_experts() -> None:
    flags = "--micro-batch-size 1 --global-batch-size 8 --num-experts 4 --moe-layer-freq ([0]*2+[1]*6) "
    plan = plan_of(f"{flags} --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2")
    assert plan.base == plan.layers[0].strategy == plan.layers[2].strategy.without_experts
    assert (plan.layers[2].strategy.expert_parallel, plan.layers[2].strategy.expert_shards) == (2, 2)
    whole = plan_of(
        f"{flags} --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4 "
        "--expert-tensor-parallel-size 1"
    )
    assert whole.expert_degrees == ((4, 1),)
    assert "--expert-tensor-parallel-size 1" in " ".join(command_line(whole))
    for bad, message in (
        ("--expert-model-parallel-size 8", "expert_parallel 8 does not divide 4, the experts"),
        ("--expert-model-parallel-size 3", "does not divide the 8 ranks"),
        ("--num-experts 0 --expert-model-parallel-size 2", "without experts"),
    ):
        with pytest.raises(GalvatronError, match=message):
            plan_of(f"{flags} {bad}")


def test_context_parallelism_by_all_to_all_is_ulysses() -> None:
    plan = plan_of("--micro-batch-size 1 --context-parallel-size 4 --cp-comm-type a2a")
    assert plan.base == Strategy(tp=4, dp=2, sequence_parallel=SequenceParallel.ULYSSES)
    assert plan_of("--micro-batch-size 1 --context-parallel-size 4 --cp-comm-type p2p").base.cp == 4
    assert " ".join(command_line(plan)).count("--cp-comm-type a2a") == 1
