"""A small model, a small cluster and cost models for tests."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.protocol import Setting
from galvatron_megatron.cost.records.values import gpt_layer
from galvatron_megatron.describe.cluster import Cluster, read_cluster
from galvatron_megatron.describe.model import Model
from galvatron_megatron.plan.strategy import Strategy

CONFIGS = Path(__file__).parents[2] / "configs"


@cache
def cluster(name: str = "a100-80g", nodes: int = 2) -> Cluster:
    return read_cluster(CONFIGS / "clusters" / f"{name}.yaml", nodes=nodes)


@cache
def model(layers: int = 8, hidden: int = 2048, seq_length: int = 2048) -> Model:
    return Model(
        name="small",
        hidden_size=hidden,
        seq_length=seq_length,
        vocab_size=32000,
        layers=(gpt_layer(hidden, 16, gated=True, ffn=hidden * 2, bias=False),) * layers,
        normalization="RMSNorm",
        position_embedding="rope",
        tied_embeddings=False,
    )


def costs(**changes: object) -> AnalyticCostModel:
    options = changes.pop("options", RunOptions())
    return AnalyticCostModel(replace(model(), **changes), cluster(), options)


def setting(strategy: Strategy, *, pp: int = 1, micro_batch_size: int = 2, micro_batches: int = 4) -> Setting:
    return Setting(
        pp=pp,
        virtual_stages=1,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        base=Strategy(
            tp=strategy.tp, cp=strategy.cp, dp=strategy.dp, sequence_parallel=strategy.sequence_parallel
        ),
    )
