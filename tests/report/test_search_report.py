"""What `galvatron search` says about its answer."""

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.plan import Fingerprints, LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Recompute, Strategy
from galvatron_megatron.report.search_report import print_search
from galvatron_megatron.search.request import SearchRequest
from galvatron_megatron.search.result import SearchResult

MODEL = Path(__file__).resolve().parents[2] / "configs" / "models" / "llama2-7b.yaml"
FAST, SMALL = Strategy(dp=4), Strategy(dp=4, recompute=Recompute.FULL)


def plan(*strategies: Strategy, micro_batches: int = 2) -> Plan:
    layers = tuple(LayerPlan(kind=LayerKind.BLOCK, strategy=strategy) for strategy in strategies)
    return Plan(
        pp=1,
        virtual_stages=1,
        micro_batch_size=1,
        micro_batches=micro_batches,
        base=FAST,
        stages=(StagePlan(layers=layers),),
    )


UNIFORM, LAYERWISE, OTHER = plan(SMALL, SMALL), plan(FAST, SMALL), plan(SMALL, SMALL, micro_batches=4)


def shown(chosen: Plan, seconds: float, gap: float = 0.0) -> str:
    result = SearchResult(
        # What a plan was made for is written into the chosen one alone.
        plan=replace(chosen, fingerprints=Fingerprints(model="m")),
        step_seconds=seconds,
        stage_seconds=[seconds / 2],
        sync_seconds=[0.0],
        memory_bytes=[2**30],
        samples_per_second=8 / seconds,
        search_seconds=0.1,
        runners_up=[(LAYERWISE, 1.0), (OTHER, 2.2)],
        best_uniform=(UNIFORM, 1.01),
        best_layerwise=(LAYERWISE, 1.0),
        gap=gap,
        outer_points=3,
        solved_points=1,
    )
    request = SearchRequest(
        model=read_model(MODEL),
        world_size=4,
        devices_per_node=4,
        memory_bytes=2**31,
        global_batch_size=8,
    )
    console = Console(file=io.StringIO(), width=250)
    print_search(console, result, request)
    return console.file.getvalue()


def row_of(text: str, word: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if word in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_preferred_uniform_plan_is_not_called_the_fastest():
    text = shown(UNIFORM, 1.01)
    assert "proven fastest uniform plan, preferred to a layer-wise one only 1.00% faster" in text
    assert row_of(text, "best uniform")[:4] == ["best uniform, chosen", "uniform", "1.0100", "0.00%"]
    assert row_of(text, "│ fastest")[:4] == ["fastest", "layer-wise", "1.0000", "-0.99%"]


def test_every_plan_stands_once_with_its_kind():
    text = shown(LAYERWISE, 1.0)
    assert "proven fastest of the space" in text
    assert row_of(text, "fastest, chosen")[1] == "layer-wise"
    # Twice the samples in 2.2 times the time.
    assert row_of(text, "competitor")[1:4] == ["uniform", "2.2000", "10.00%"]


def test_an_interrupted_search_says_what_it_may_have_missed():
    assert "not proven fastest, at most 3.00% off" in shown(UNIFORM, 1.01, gap=0.03)
