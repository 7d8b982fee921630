"""The trace of Megatron's own layers, and the closed forms that take its place where torch is missing."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from galvatron_megatron.cost.counts import embedding_counts, head_counts, layer_counts
from galvatron_megatron.cost.counts_values import LayerCounts
from galvatron_megatron.describe.model import Layer
from galvatron_megatron.errors import DescriptionError, GalvatronError, UnsupportedPlanError
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy
from galvatron_megatron.profiler.trace import Trace, layout_of, trace_layers
from tests.profiler.trace_cases import CASES, EXPERT_STRATEGIES, MEGATRON, STRATEGIES, argv

INDIVISIBLE = Strategy(tp=3)
SAMPLES = {"gpt": (1, 2), "latent": (1,)}
"""Samples traced; two where not said."""


def samples_of(case: str) -> tuple[int, ...]:
    return SAMPLES.get(case, (2,))


def traced_layers(trace: Trace) -> set[Layer]:
    return {layer for layer in trace.model.layers if layer.kind is not LayerKind.MAMBA}


def strategies_of(case: str) -> tuple[Strategy, ...]:
    match case:
        case "unfused":
            return STRATEGIES[:-1]  # two groups of heads do not go over four ranks
        case "gpt":
            return (*STRATEGIES, INDIVISIBLE)
        case "experts":
            return (*STRATEGIES, *EXPERT_STRATEGIES)
        case "hybrid":
            return (*STRATEGIES, *EXPERT_STRATEGIES[-1:])
    return STRATEGIES


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    cache = tmp_path_factory.mktemp("traces")

    def trace(case: str) -> Trace:
        world_size = 1024 if case == "gpt" else 0
        return trace_layers(
            argv(case), strategies_of(case), samples_of(case), cache_directory=cache, world_size=world_size
        )

    with ThreadPoolExecutor(2) as workers:
        return dict(zip(CASES, workers.map(trace, CASES), strict=True))


def assert_equal(traced: LayerCounts, counted: LayerCounts, where: str) -> None:
    for name in (
        "parameters_sharded",
        "parameters_replicated",
        "parameters_expert",
        "parameter_tensors",
        "activation_bytes",
    ):
        assert getattr(traced, name) == getattr(counted, name), f"{where}: {name}"
    assert traced.gemm_shapes() == counted.gemm_shapes(), where
    assert traced.flops() == counted.flops() > 0 or not traced.gemm_shapes(), where
    assert traced.collective_bytes() == counted.collective_bytes(), where


@pytest.mark.parametrize("case", CASES)
def test_closed_forms_equal_the_trace(traces: dict[str, Trace], case: str) -> None:
    trace = traces[case]
    compared = 0
    for strategy in strategies_of(case):
        for samples in samples_of(case):
            if layout_of(trace.model, strategy) in trace.refused:
                continue
            where = f"{case} {strategy} {samples}"
            for layer in traced_layers(trace):
                counted = layer_counts(trace.model, layer, strategy, samples, "local")
                assert_equal(trace.layer(layer, strategy, samples), counted, f"{where} {layer.kind}")
                compared += 1
            base = replace(strategy, recompute=Recompute.NONE)
            assert_equal(
                trace.embedding(base, samples), embedding_counts(trace.model, base, samples, "local"), where
            )
            assert_equal(trace.head(base, samples), head_counts(trace.model, base, samples, "local"), where)
    assert compared >= 6


@pytest.mark.parametrize("case", ["gpt", "grouped", "latent", "unfused"])
def test_closed_forms_are_near_the_traced_transient_bytes(traces: dict[str, Trace], case: str) -> None:
    """Temporaries depend on the order of every operator; the closed forms name the largest moments only."""
    trace = traces[case]
    samples = samples_of(case)[-1]
    for strategy in strategies_of(case):
        if layout_of(trace.model, strategy) in trace.refused:
            continue
        for traced, counted in (
            (
                trace.layer(trace.model.layers[0], strategy, samples),
                layer_counts(trace.model, trace.model.layers[0], strategy, samples, "local"),
            ),
            (trace.head(strategy, samples), head_counts(trace.model, strategy, samples, "local")),
        ):
            assert 0.65 < counted.transient_bytes / traced.transient_bytes < 1.5, f"{case} {strategy}"


def test_every_layer_kind_with_a_closed_form_was_traced(traces: dict[str, Trace]) -> None:
    kinds = {layer.kind for trace in traces.values() for layer in traced_layers(trace)}
    assert kinds == set(LayerKind) - {LayerKind.MAMBA}


def test_mamba_layers_come_from_closed_forms_and_say_so(traces: dict[str, Trace]) -> None:
    trace = traces["hybrid"]
    sources = {layer.kind: trace.layer(layer, Strategy(), 2).source for layer in trace.model.layers}
    assert sources.pop(LayerKind.MAMBA) == "modelled"
    assert set(sources.values()) == {"traced"}


def test_experts_shared_out_are_traced_and_not_refused(traces: dict[str, Trace]) -> None:
    trace = traces["experts"]
    experts = next(layer for layer in trace.model.layers if layer.experts is not None)
    for strategy in EXPERT_STRATEGIES:
        traced = trace.layer(experts, strategy, 2)
        groups = {collective.group for collective in traced.collectives}
        assert ("ep" in groups) == (strategy.expert_parallel > 1)
        assert ("etp" in groups) == (strategy.expert_shards > 1)
    one, four = (trace.layer(experts, strategy, 2) for strategy in (Strategy(), EXPERT_STRATEGIES[0]))
    assert one.parameters_expert == 4 * four.parameters_expert > 0


def test_an_exchange_that_depends_on_data_is_refused() -> None:
    words = " ".join(argv("experts")).replace("type flex", "type allgather").split()
    with pytest.raises(UnsupportedPlanError, match=r"allgather picks rows .*valid: alltoall"):
        trace_layers(words, [Strategy(dp=2, expert_parallel=2)], [1])


def test_a_score_matrix_is_kept_only_where_the_run_keeps_one(traces: dict[str, Trace]) -> None:
    model = traces["unfused"].model
    assert not model.fused_attention
    assert traces["gpt"].model.fused_attention
    scores = 2 * 8 * model.seq_length**2
    kept = traces["unfused"].layer(model.layers[0], Strategy(), 2)
    assert dict(kept.activation_terms)[f"bool 2x8x{model.seq_length}x{model.seq_length}"] == scores
    assert not any(
        f"{model.seq_length}x{model.seq_length}" in name
        for name, _ in traces["gpt"].layer(traces["gpt"].model.layers[0], Strategy(), 1).activation_terms
    )


def test_recomputation_keeps_the_input_alone_and_repeats_the_forward_pass(traces: dict[str, Trace]) -> None:
    trace = traces["gpt"]
    layer = trace.model.layers[0]
    parallel = Strategy(tp=2, sequence_parallel=MEGATRON)
    full = trace.layer(layer, replace(parallel, recompute=Recompute.FULL), 2)
    plain = trace.layer(layer, parallel, 2)
    assert full.activation_bytes == 2 * trace.model.seq_length * trace.model.hidden_size * 2 // 2
    assert full.flops("recompute") == plain.flops("forward")
    assert full.transient_bytes + full.activation_bytes > plain.activation_bytes


def test_a_setting_that_megatron_refuses_is_named(traces: dict[str, Trace]) -> None:
    trace = traces["experts"]
    experts = next(layer for layer in trace.model.layers if layer.kind is LayerKind.MOE_BLOCK)
    with pytest.raises(UnsupportedPlanError, match="sequence parallelism"):
        trace.layer(experts, Strategy(tp=2), 2)
    with pytest.raises(DescriptionError, match="not asked for"):
        trace.layer(experts, Strategy(tp=8, sequence_parallel=MEGATRON), 1)


def test_strategies_without_a_local_layer_are_refused() -> None:
    for strategy in (Strategy(cp=2), Strategy(tp=2, sequence_parallel=SequenceParallel.ULYSSES)):
        with pytest.raises(UnsupportedPlanError, match="context parallelism"):
            trace_layers(argv("gpt"), [strategy], [1])


def test_a_second_trace_comes_from_the_cache(tmp_path) -> None:
    first = trace_layers(argv("gpt"), [Strategy()], [1], cache_directory=tmp_path)
    (cached,) = tmp_path.glob("trace-*.json")
    content = json.loads(cached.read_text())
    for row in content["rows"]:
        row["counts"]["transient_bytes"] += 1
    cached.write_text(json.dumps(content))
    layer = first.model.layers[0]
    again = trace_layers(argv("gpt"), [Strategy()], [1], cache_directory=tmp_path)
    assert (
        again.layer(layer, Strategy(), 1).transient_bytes
        == first.layer(layer, Strategy(), 1).transient_bytes + 1
    )
    cached.write_text("{")
    fresh = trace_layers(argv("gpt"), [Strategy()], [1], cache_directory=tmp_path)
    assert fresh.layer(layer, Strategy(), 1) == first.layer(layer, Strategy(), 1)


def test_an_impossible_degree_is_one_line(traces: dict[str, Trace]) -> None:
    trace = traces["gpt"]
    with pytest.raises(GalvatronError, match="tp3") as raised:
        trace.layer(trace.model.layers[0], INDIVISIBLE, 1)
    assert "\n" not in str(raised.value)


def test_the_caller_keeps_its_own_state() -> None:
    """Asking for a trace imports neither torch nor megatron into the caller."""
    program = (
        "import sys, galvatron_megatron.profiler.trace;"
        "print(sorted(set(sys.modules) & {'torch', 'megatron', 'deepspeed'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
