"""Switches that decide which code computes a layer."""

from argparse import ArgumentParser, Namespace
from enum import Enum

import pytest
import torch

from galvatron_megatron.profiler.switches import USUAL_VALUES, switches_of


@pytest.fixture(scope="module")
def megatron_parser():
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser())


def parsed(parser: ArgumentParser, *words: str) -> Namespace:
    return parser.parse_args(list(words))


def test_the_usual_values_are_megatrons_defaults(megatron_parser):
    defaults = {action.dest: action.default for action in megatron_parser._actions}
    found = {
        name: defaults[name].name if isinstance(defaults[name], Enum) else defaults[name]
        for name in USUAL_VALUES
    }
    assert found == USUAL_VALUES
    assert switches_of(parsed(megatron_parser)) == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--transformer-impl local --no-gradient-accumulation-fusion", "gradient_accumulation_fusion=False"),
        ("--fp8-format hybrid", "fp8=hybrid"),
        ("--attention-backend flash", "attention_backend=flash"),
        ("--spec some.module name", "spec=some.module,name"),
        ("--optimizer sgd", "optimizer=sgd"),
    ],
)
def test_what_differs_is_named(megatron_parser, words, expected):
    assert expected in switches_of(parsed(megatron_parser, *words.split())).split()


def test_neither_the_plan_nor_the_course_of_training_is_a_switch(megatron_parser):
    words = "--tensor-model-parallel-size 2 --num-layers 8 --lr 1e-3 --train-iters 7 --recompute-activations"
    assert switches_of(parsed(megatron_parser, *words.split())) == ""


def test_validated_and_parsed_arguments_agree():
    before, after = Namespace(main_grads_dtype="bf16"), Namespace(main_grads_dtype=torch.bfloat16)
    assert switches_of(before) == switches_of(after) == "main_grads_dtype=bf16"
