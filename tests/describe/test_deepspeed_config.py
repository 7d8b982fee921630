"""DeepSpeed's configuration file and Megatron-DeepSpeed's flags for plans in which all layers run alike."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from galvatron_megatron.cli import main
from galvatron_megatron.describe.deepspeed_config import deepspeed_config
from galvatron_megatron.describe.megatron_deepspeed import megatron_deepspeed_arguments
from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.serialization import write_plan
from galvatron_megatron.plan.strategy import Offload, Recompute, SequenceParallel, Strategy


def plan_of(
    strategy: Strategy, *, stages: tuple[int, ...] = (4,), kind: LayerKind = LayerKind.BLOCK, **changes: object
) -> Plan:
    base = replace(strategy.without_experts, recompute=Recompute.NONE)
    layer = LayerPlan(kind=kind, strategy=strategy)
    values = {"pp": len(stages), "micro_batch_size": 2, "micro_batches": 8, "base": base, **changes}
    return Plan(stages=tuple(StagePlan(layers=(layer,) * count) for count in stages), **values)


CASES = [
    (Strategy(tp=2, dp=4, sequence_parallel=SequenceParallel.MEGATRON, zero=1), "bf16"),
    (Strategy(dp=4), "fp32"),
    (Strategy(dp=4), "fp16"),
    (Strategy(dp=8, zero=2, recompute=Recompute.FULL), "fp16"),
    (Strategy(dp=8, zero=2, offload=Offload.OPTIMIZER), "bf16"),
    (Strategy(dp=8, zero=3), "bf16"),
    (Strategy(dp=2, tp=2, zero=3, offload=Offload.PARAMETERS), "bf16"),
    (Strategy(tp=2), "bf16"),
]


def test_deepspeed_takes_every_file_and_understands_it(tmp_path: Path) -> None:
    """DeepSpeed is imported in a process of its own, which tells what it read."""
    files = []
    for index, (strategy, precision) in enumerate(CASES):
        model = read_model("gpt3-125m") if index % 2 else None
        document = deepspeed_config(plan_of(strategy), precision=precision, clip_grad=0.5, model=model)
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps(document))
    script = """
import json, sys
from types import SimpleNamespace
import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
for path in sys.argv[1:]:
    dp = json.load(open(path))
    dp = dp["train_batch_size"] // dp["train_micro_batch_size_per_gpu"] // dp["gradient_accumulation_steps"]
    mpu = SimpleNamespace(get_data_parallel_world_size=lambda: dp)
    c = DeepSpeedConfig(path, mpu)
    z = c.zero_config
    print("READ", json.dumps([
        c.train_batch_size, c.train_micro_batch_size_per_gpu, c.gradient_accumulation_steps,
        c.gradient_clipping,
        int(c.zero_optimization_stage), c.float16_config.enabled, c.bfloat16_config.enabled, c.grad_accum_dtype,
        str(z.offload_optimizer and z.offload_optimizer.device),
        str(z.offload_param and z.offload_param.device), z.prefetch_bucket_size,
    ]))
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | places | {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, files)], capture_output=True, text=True, env=environment
    )
    read = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("READ ")]
    assert len(read) == len(CASES), done.stderr[-3000:]
    for index, ((strategy, precision), found) in enumerate(zip(CASES, read, strict=True)):
        stage = max(strategy.zero, 1) if precision == "bf16" else strategy.zero
        offload = strategy.offload
        assert found == [
            *(2 * 8 * strategy.dp, 2, 8, 0.5, stage, precision == "fp16", precision == "bf16"),
            "fp32" if precision == "bf16" else None,
            "cpu" if offload is not Offload.NONE else "None",
            "cpu" if offload is Offload.PARAMETERS else "None",
            int(0.9 * 768 * 768) if stage == 3 and index % 2 else 50_000_000,
        ]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            replace(plan_of(Strategy(dp=8)), base=Strategy(tp=2, dp=4)),
            "plan layer 0: tp1 dp8, but the base layout is tp2 dp4; valid for DeepSpeed's engine: all layers",
        ),
        (plan_of(Strategy(cp=2, dp=4)), "plan.base: tp1 cp2 dp4; valid for DeepSpeed's engine: cp 1"),
        (plan_of(Strategy(dp=4, zero=2), stages=(2, 2)), "plan.base.zero: 2 with pp 2"),
        (
            plan_of(Strategy(dp=4, expert_parallel=2), kind=LayerKind.MOE_BLOCK),
            "plan expert_parallel: DeepSpeed's engine does not know",
        ),
        (plan_of(Strategy(dp=4)), "plan zero: 0 in bf16"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        deepspeed_config(plan, precision="bf16", clip_grad=1.0)
    assert str(caught.value).startswith(message)


def test_flags_of_megatron_deepspeed() -> None:
    strategy = Strategy(
        tp=2, dp=4, sequence_parallel=SequenceParallel.MEGATRON, zero=1, recompute=Recompute.FULL
    )
    assert " ".join(megatron_deepspeed_arguments(plan_of(strategy, stages=(4, 4)), "ds.json")) == (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 2 "
        "--global-batch-size 64 --deepspeed --deepspeed_config ds.json --zero-stage 1 --sequence-parallel "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--deepspeed-activation-checkpointing"
    )
    offloaded = Strategy(dp=8, zero=3, offload=Offload.PARAMETERS, recompute=Recompute.SELECTIVE)
    words = megatron_deepspeed_arguments(plan_of(offloaded), "ds.json")
    assert " ".join(words[words.index("--zero-stage") :]) == (
        "--zero-stage 3 --no-pipeline-parallel --cpu-optimizer --remote-device cpu "
        "--recompute-granularity selective"
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(Strategy(dp=4), stages=(3, 5)), "plan.stages: of different length"),
        (plan_of(Strategy(dp=4), stages=(2, 2, 2, 2), pp=2, virtual_stages=2), "plan.virtual_stages: "),
        (plan_of(Strategy(dp=4), kind=LayerKind.MAMBA), "plan layers of kind mamba"),
    ],
)
def test_what_megatron_deepspeed_cannot_do_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        megatron_deepspeed_arguments(plan, "ds.json")
    assert str(caught.value).startswith(message)


def test_flags_are_those_that_megatron_deepspeed_has() -> None:
    """Held against a checkout where one is named."""
    checkout = os.environ.get("GALVATRON_MEGATRON_DEEPSPEED")
    if checkout is None:
        pytest.skip("GALVATRON_MEGATRON_DEEPSPEED does not name a checkout of Megatron-DeepSpeed")
    text = Path(checkout, "megatron", "arguments.py").read_text()
    strategy = Strategy(dp=8, zero=3, offload=Offload.PARAMETERS, recompute=Recompute.FULL)
    sharded = Strategy(tp=2, dp=4, sequence_parallel=SequenceParallel.MEGATRON)
    for plan in (plan_of(strategy), plan_of(sharded, stages=(2, 2))):
        words = megatron_deepspeed_arguments(plan, "ds.json")
        for flag in (word for word in words if word.startswith("--") and not word.startswith("--deepspeed")):
            assert f"'{flag}'" in text or f'"{flag}"' in text, flag


def test_a_pipeline_is_not_for_deepspeed_alone(tmp_path: Path, capsys) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "ds.json"
    write_plan(plan_of(Strategy(dp=4, zero=1), stages=(4, 4)), plan)
    assert main(["export", str(plan), "--deepspeed", str(out)]) == 2
    error = capsys.readouterr().err
    assert "--deepspeed: pp 2" in error and "--megatron-deepspeed" in error and not out.exists()
    assert main(["export", str(plan), "--megatron-deepspeed", str(out)]) == 0 and out.exists()


def test_flag_and_file_say_the_same_stage(tmp_path: Path, capsys) -> None:
    """A lone replica in bf16 runs stage 1 where the plan says 0."""
    plan, out = tmp_path / "plan.yaml", tmp_path / "ds.json"
    write_plan(plan_of(Strategy(tp=4)), plan)
    assert main(["export", str(plan), "--megatron-deepspeed", str(out)]) == 0
    assert json.loads(out.read_text())["zero_optimization"]["stage"] == 1
    assert "--zero-stage 1" in capsys.readouterr().out


def test_the_command_writes_the_file_and_prints_the_flags(tmp_path: Path, capsys) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "ds.json"
    write_plan(plan_of(Strategy(dp=4, zero=2)), plan)
    assert main(["export", str(plan), "--deepspeed", str(out)]) == 0
    assert capsys.readouterr().out == ""
    found = json.loads(out.read_text())
    assert (found["zero_optimization"]["stage"], found["gradient_clipping"]) == (2, 1.0)
    assert found["bf16"] == {"enabled": True} and "fp16" not in found
    words = ["export", str(plan), "--megatron-deepspeed", str(out), "--precision", "fp16", "--clip-grad", "0"]
    assert main(words) == 0
    assert f"--deepspeed_config {out} --zero-stage 2 --no-pipeline-parallel" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["fp16"]["enabled"] and found["gradient_clipping"] == 0
    before = out.read_text()
    write_plan(plan_of(Strategy(cp=2, dp=4)), plan)
    assert main(["export", str(plan), "--deepspeed", str(out)]) == 2
    assert out.read_text() == before
    assert main(["export", str(plan), "--clip-grad", "2"]) == 2
    assert main(["export", str(plan), "--deepspeed", str(out), "--format", "yaml"]) == 2
    assert main(["export", str(plan), "--deepspeed", str(tmp_path / "none" / "ds.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4
