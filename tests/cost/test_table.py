import math
from dataclasses import replace

import pytest

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.galvatron_table import GalvatronCostModel, interpolated, zero_fraction
from galvatron_megatron.cost.table import Recorder, TableCostModel
from galvatron_megatron.describe.cluster import read_cluster
from galvatron_megatron.describe.galvatron_tables import read_galvatron_profile
from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.describe.shipped import find_description
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.request import SearchRequest


@pytest.fixture(scope="module")
def recorded():
    model = read_model(find_description("models", "gpt3-125m"))
    cluster = read_cluster(find_description("clusters", "a100-80g"), nodes=1)
    request = SearchRequest(
        model=model,
        world_size=4,
        devices_per_node=4,
        memory_bytes=20 * 2**30,
        global_batch_size=8,
        max_zero=1,
        allow_cp=False,
    )
    recorder = Recorder(AnalyticCostModel(model, cluster), model)
    return request, search(request, recorder), recorder.table()


def test_a_recorded_table_gives_the_same_search(recorded):
    request, first, table = recorded
    again = search(request, table)
    assert (again.plan, again.step_seconds) == (first.plan, first.step_seconds)


def test_a_missing_strategy_is_named(recorded):
    request, _, table = recorded
    prices = {key: cost for key, cost in table.layers.items() if key[1].tp != 2}
    with pytest.raises(DescriptionError, match="no price of layer 0 under tp2"):
        search(request, replace(table, layers=prices))


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
def test_bad_numbers_are_refused_when_the_table_is_made(recorded, bad):
    _, _, table = recorded
    key, cost = next(iter(table.layers.items()))
    with pytest.raises(DescriptionError, match="sync_seconds"):
        TableCostModel(model=table.model, layers={key: replace(cost, sync_seconds=bad)}, ends={})


def test_interpolation():
    table = {1: 2.0, 2: 3.0, 4: 7.0}
    assert [interpolated(table, at) for at in (0.5, 1, 1.5, 3, 4, 8)] == [2.0, 2.0, 2.5, 5.0, 7.0, 14.0]


def test_zero_fractions_are_those_of_mixed_precision():
    assert [round(zero_fraction(zero, 4), 6) for zero in range(4)] == [1.0, 0.4375, 0.34375, 0.25]


@pytest.fixture(scope="module")
def galvatron():
    from pathlib import Path

    directory = Path(__file__).parent.parent / "data" / "galvatron_a100_8gpu"
    model = replace(read_model(find_description("models", "llama2-7b")), seq_length=2048)
    return model, read_galvatron_profile(directory, seq_length=2048, world_size=8)


def test_galvatron_tables_price_a_layer_from_its_entries(galvatron):
    model, profile = galvatron
    from galvatron_megatron.cost.protocol import Setting
    from galvatron_megatron.plan.strategy import Recompute, Strategy

    costs = GalvatronCostModel(model, profile)
    base = Strategy(dp=8)
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=2, micro_batches=4, base=base)
    plain = costs.layer_cost(0, base, setting)
    assert plain.micro_batch_seconds == pytest.approx(3 * 2 * profile.layer_ms[2] * 1e-3)
    assert plain.state_bytes == round(4 * profile.parameter_mb * 2**20)
    assert plain.activation_bytes == round(2 * profile.activation_mb[1] * 2**20)
    again = costs.layer_cost(0, Strategy(dp=8, recompute=Recompute.FULL), setting)
    assert again.micro_batch_seconds == pytest.approx(4 * 2 * profile.layer_ms[2] * 1e-3)
    assert again.activation_bytes == round(2 * profile.checkpoint_mb * 2**20)
    assert costs.layer_cost(0, Strategy(dp=8, zero=3), setting).state_bytes == round(
        profile.parameter_mb / 2 * 2**20
    )
    with pytest.raises(DescriptionError, match="cp 1"):
        costs.layer_cost(0, Strategy(cp=2, dp=4), setting)


def test_sequence_parallel_layers_without_data_parallelism_still_synchronise(galvatron):
    # Its own planner lets layers with dp 1 reduce their gradients for nothing.
    from galvatron_megatron.cost.protocol import Setting
    from galvatron_megatron.plan.strategy import SequenceParallel, Strategy

    model, profile = galvatron
    costs = GalvatronCostModel(model, profile)
    setting = Setting(pp=1, virtual_stages=1, micro_batch_size=1, micro_batches=4, base=Strategy(dp=8))
    ulysses = Strategy(tp=8, sequence_parallel=SequenceParallel.ULYSSES, dp=1)
    megatron = Strategy(tp=8, sequence_parallel=SequenceParallel.MEGATRON, dp=1)
    assert costs.layer_cost(0, ulysses, setting).sync_seconds > 0
    assert costs.layer_cost(0, megatron, setting).sync_seconds == 0
    assert costs.embedding_cost(setting).sync_seconds > 0


def test_more_memory_never_lowers_throughput_on_galvatron_tables(galvatron):
    # Its own planner gave 21-24 GB devices worse plans than 20 GB ones.
    model, profile = galvatron
    costs, last = GalvatronCostModel(model, profile), 0.0
    for gigabytes in (20, 21, 24, 36):
        request = SearchRequest(
            model=model,
            world_size=8,
            devices_per_node=8,
            memory_bytes=gigabytes * 2**30,
            global_batch_size=16,
            allow_cp=False,
            allow_plain_tp=False,
            allow_interleaving=False,
        )
        found = search(request, costs).samples_per_second
        assert found >= last * (1 - 1e-12)
        last = found


def test_another_sequence_length_is_refused(galvatron):
    model, profile = galvatron
    with pytest.raises(DescriptionError, match="sequence length"):
        GalvatronCostModel(replace(model, seq_length=4096), profile)
