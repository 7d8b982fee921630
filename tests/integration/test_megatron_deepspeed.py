"""Megatron-DeepSpeed's argument parser reads a plan."""

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from programs import answer_of

from galvatron_megatron.describe.deepspeed_config import deepspeed_config
from galvatron_megatron.describe.megatron_deepspeed import COMMIT
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.megatron_deepspeed import DECIDED, attach, planned
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.serialization import write_plan
from galvatron_megatron.plan.strategy import Strategy

CHECKOUT = os.environ.get("GALVATRON_MEGATRON_DEEPSPEED")
MODEL = ["--num-layers", "4", "--bf16", "--clip-grad", "0.5"]


def plan_of(*strategies: Strategy) -> Plan:
    layers = tuple(LayerPlan(kind=LayerKind.BLOCK, strategy=strategy) for strategy in strategies)
    return Plan(
        pp=1, micro_batch_size=2, micro_batches=4, base=strategies[0], stages=(StagePlan(layers=layers),)
    )


ALIKE = plan_of(*[Strategy(tp=2, dp=4, zero=2)] * 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_plan(ALIKE, tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def test_a_plan_becomes_flags_and_a_configuration(file: Path) -> None:
    words, document, line = planned([*MODEL, "--galvatron-plan", str(file), "--lr", "1"], 8)
    assert words[:7] == [*MODEL, "--lr", "1"]
    assert words[words.index("--zero-stage") + 1] == "2" and "--no-pipeline-parallel" in words
    assert not [word for word in words if word.startswith("--galvatron")]
    # What the flags say is what a user may not say beside them.
    assert {word for word in words[7:] if word.startswith("--")} <= set(DECIDED)
    assert document == deepspeed_config(ALIKE, precision="bf16", clip_grad=0.5)
    assert line == "pp1 tp2 dp4 zero2 micro-batch 2 x 4"


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        (["--galvatron-auto"], 8, "--galvatron-auto: not with Megatron-DeepSpeed.*valid: galvatron search"),
        (["--galvatron-device", "cpu"], 8, "--galvatron-device: not with"),
        (["--galvatron-device", "cuda"], 8, "--galvatron-plan: missing"),
        (["--galvatron-plam", "FILE"], 8, "--galvatron-plam: unknown flag"),
        (["--galvatron-plan", "FILE"], 4, "plan.yaml: for 8 ranks; valid: 4"),
        (["--galvatron-plan", "FILE", "--zero-stage=3"], 8, "--zero-stage: beside --galvatron-plan"),
        (["--galvatron-plan", "FILE", "--sequence-parallel"], 8, "--sequence-parallel: beside"),
        (["--galvatron-plan", "FILE", "--num-layers", "6"], 8, "4 layers; valid: 6, as --num-layers says"),
        (["--galvatron-plan", "/nowhere.yaml"], 8, "/nowhere.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], ranks: int, message: str, file: Path) -> None:
    with pytest.raises(GalvatronError, match=message) as refused:
        planned([str(file) if word == "FILE" else word for word in words], ranks)
    assert "\n" not in str(refused.value)


def test_layers_that_differ_are_refused(tmp_path: Path) -> None:
    write_plan(plan_of(Strategy(dp=8, zero=1), Strategy(dp=8, zero=3)), tmp_path / "plan.yaml")
    with pytest.raises(GalvatronError, match=r"layer 1: .*valid for DeepSpeed's engine: all layers alike"):
        planned(["--galvatron-plan", str(tmp_path / "plan.yaml")], 8)


def test_the_parser_is_asked_with_the_plans_flags(file: Path, monkeypatch, capsys) -> None:
    module = ModuleType("megatron.arguments")

    def parse_args(extra=None, ignore_unknown_args=False):
        return argparse.Namespace(words=sys.argv[1:], rank=0)

    module.parse_args, module._add_zero_args = parse_args, None
    attach(module)
    words = ["train.py", *MODEL, "--galvatron-plan", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = module.parse_args(ignore_unknown_args=True)
    assert "--zero-stage" in args.words and args.deepspeed_config["zero_optimization"]["stage"] == 2
    assert sys.argv == words and "zero2" in capsys.readouterr().out
    # As all refusals: one line, exit code 2.
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as ended:
        module.parse_args()
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_another_old_megatron_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        attach(ModuleType("megatron.arguments"))
    assert "neither megatron-core nor Megatron-DeepSpeed" in capsys.readouterr().err


PARSE = """
import json, sys
from unittest.mock import MagicMock

# What its tokenizers and kernels import; arguments need none of it.
for name in ("megatron.tokenizer", "megatron.tokenizer.tokenizer", "tools", "tools.retro", "tools.retro.utils",
             "transformers", "apex", "amp_C", "einops", "regex", "six", "nltk"):
    sys.modules[name] = MagicMock()
import torch

torch.cuda.current_device = lambda: 0
checkout, *words = sys.argv[1:]
sys.path.insert(0, checkout)
sys.argv = ["pretrain_gpt.py", *words]
from galvatron_megatron.integration.start_up import arm

arm()
from megatron.arguments import parse_args, validate_args

args = parse_args()
validate_args(args, {})
names = ("zero_stage", "tensor_model_parallel_size", "micro_batch_size", "global_batch_size", "deepspeed",
         "no_pipeline_parallel", "data_parallel_size", "deepspeed_config")
print("\\n" + json.dumps({name: getattr(args, name) for name in names}))
"""


@pytest.mark.skipif(
    CHECKOUT is None, reason="GALVATRON_MEGATRON_DEEPSPEED names no checkout of Megatron-DeepSpeed"
)
def test_its_own_parser_and_validation_accept_a_plan(file: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    sizes = ["--hidden-size", "64", "--num-attention-heads", "8", "--seq-length", "64"]
    sizes += ["--max-position-embeddings", "64", "--train-iters", "3", "--lr", "1e-4"]
    seen = answer_of(PARSE, CHECKOUT, *MODEL, *sizes, "--galvatron-plan", str(file))
    assert seen.pop("deepspeed_config") == deepspeed_config(ALIKE, precision="bf16", clip_grad=0.5), COMMIT
    assert seen == {
        "zero_stage": 2,
        "tensor_model_parallel_size": 2,
        "micro_batch_size": 2,
        "global_batch_size": 32,
        "deepspeed": True,
        "no_pipeline_parallel": True,
        "data_parallel_size": 4,
    }
