"""Which back end shards what, and which modules a ZeRO 3 engine is given."""

from argparse import Namespace

import pytest
import torch

from galvatron_megatron.plan.strategy import Offload, Strategy
from galvatron_megatron.runtime.context import StateClass
from galvatron_megatron.runtime.zero import is_deepspeed, zero_backend
from galvatron_megatron.runtime.zero_optimizer import _borrowing_modules, _owning_modules


@pytest.mark.parametrize(
    ("strategy", "backend", "expected"),
    [
        (Strategy(), "deepspeed", False),
        (Strategy(zero=1), "megatron", False),
        (Strategy(zero=1), "deepspeed", True),
        (Strategy(zero=2), "megatron", True),
        (Strategy(zero=1, offload=Offload.OPTIMIZER), "megatron", True),
    ],
)
def test_stage_1_is_whose_the_flag_says_and_the_host_is_deepspeeds(strategy, backend, expected):
    assert is_deepspeed(strategy, backend) is expected
    assert is_deepspeed(StateClass.of(strategy), backend) is expected


def test_megatron_shards_optimizer_states_by_default():
    assert zero_backend(Namespace()) == "megatron"


class Tied(torch.nn.Module):
    """Embedding, two layers and a head that computes with the embedding's weight."""

    share_embeddings_and_output_weights = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2))
        self.output_layer = torch.nn.Linear(4, 8, bias=False)
        self.output_layer.weight = None

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        return self.embedding.weight


def test_an_engine_gets_the_largest_modules_that_hold_its_parameters_alone():
    model = Tied()
    of_layer = list(model.layers[1].parameters())
    assert _owning_modules(model, of_layer) == [model.layers[1]]
    rest = [model.embedding.weight, *model.layers[0].parameters()]
    assert _owning_modules(model, rest) == [model.embedding, model.layers[0]]
    assert _owning_modules(model, [*rest, *of_layer]) == [model]


def test_a_head_with_a_borrowed_weight_is_found():
    model = Tied()
    assert _borrowing_modules(model, [model.embedding.weight]) == [(model.output_layer, model.embedding.weight)]
    assert _borrowing_modules(model, list(model.layers.parameters())) == []
