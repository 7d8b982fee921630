"""Prices of states that lie in host memory."""

from dataclasses import replace

import pytest

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.memory import Share, parameter_bytes
from galvatron_megatron.cost.offload import host_traffic, link_seconds, update_seconds
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Offload, Strategy
from tests.cost.machines import cluster, costs, model, setting

PARAMETERS = 2048 * (4 * 2048 + 3 * 4096) + 2 * 2048


def priced(zero: int, offload: Offload, micro_batches: int = 4):
    strategy = Strategy(dp=8, zero=zero, offload=offload)
    return costs().priced_layer(0, strategy, setting(strategy, micro_batches=micro_batches))


@pytest.mark.parametrize(
    ("zero", "offload", "bytes_left"),
    [
        (1, Offload.OPTIMIZER, 6 * PARAMETERS),
        (2, Offload.OPTIMIZER, 2 * PARAMETERS + 4 * PARAMETERS // 8),
        (3, Offload.OPTIMIZER, 6 * PARAMETERS // 8),
        (3, Offload.PARAMETERS, 4 * PARAMETERS // 8),
    ],
)
def test_what_stays_on_the_device(zero: int, offload: Offload, bytes_left: int) -> None:
    assert priced(zero, offload).cost.state_bytes == pytest.approx(bytes_left)


def test_time_over_the_link_is_bytes_over_bandwidth() -> None:
    host = cluster().host
    rate = host.gb_per_second * 1e9 * host.efficiency
    shard = PARAMETERS / 8
    plain, moved = priced(3, Offload.NONE), priced(3, Offload.PARAMETERS)
    # Weights twice a micro-batch.
    added = moved.cost.micro_batch_seconds - plain.cost.micro_batch_seconds
    assert added == pytest.approx(2 * shard * 2 / rate, rel=1e-6)
    sync = {term.name: term.value for term in moved.sync_terms}
    assert "optimizer" not in sync
    assert sync["offloading gradients and weights"] == pytest.approx(shard * 4 / rate)
    # Adam in host memory: fp32 weight and two moments read and written, gradient read, 16-bit weight written.
    assert sync["optimizer on the host"] == pytest.approx(shard * 30 / (host.memory_gb_per_second * 1e9))
    first = priced(1, Offload.OPTIMIZER)
    assert first.cost.micro_batch_seconds == priced(1, Offload.NONE).cost.micro_batch_seconds
    sync = {term.name: term.value for term in first.sync_terms}
    assert sync["offloading gradients and weights"] == pytest.approx(shard * (4 + 2) / rate)


@pytest.mark.parametrize(
    ("zero", "offload", "each"),
    [(0, Offload.NONE, 0), (1, Offload.OPTIMIZER, 18), (3, Offload.OPTIMIZER, 16), (3, Offload.PARAMETERS, 18)],
)
def test_what_the_host_keeps(zero: int, offload: Offload, each: int) -> None:
    assert priced(zero, offload).host_bytes == pytest.approx(each * PARAMETERS / 8)


def test_terms_say_whether_the_link_was_measured() -> None:
    live = replace(cluster(), host=replace(cluster().host, source="measured", gb_per_second=1.0))
    assert live.fingerprint() != cluster().fingerprint()
    for where, source in ((cluster(), "modelled"), (live, "measured")):
        strategy = Strategy(dp=8, zero=3, offload=Offload.PARAMETERS)
        found = AnalyticCostModel(model(), where).priced_layer(0, strategy, setting(strategy))
        copies = [t for t in (*found.micro_batch_terms, *found.sync_terms) if "offloading" in t.name]
        assert len(copies) == 3 and {term.source for term in copies} == {source}


def test_fp32_weights_are_their_own_masters() -> None:
    element = parameter_bytes("fp32", RunOptions())
    traffic = host_traffic(
        [Share(parameters=1000, replicas=4, stride=1)],
        Strategy(dp=4, zero=1, offload=Offload.OPTIMIZER),
        element,
    )
    assert traffic.updated_per_step == 250 * (2 * 12 + 4 + 4)
    assert (traffic.stored_per_step, traffic.returned_per_step) == (1000, 1000)
    assert host_traffic([], Strategy(), element) == host_traffic([], Strategy(dp=2, zero=3), element)


def test_a_cluster_without_hosts_cannot_offload() -> None:
    bare = replace(cluster(), host=None)
    strategy = Strategy(dp=8, zero=1, offload=Offload.OPTIMIZER)
    with pytest.raises(DescriptionError, match="no host, which offloading needs; valid: host:"):
        AnalyticCostModel(model(), bare).layer_cost(0, strategy, setting(strategy))
    assert link_seconds(0, bare) == update_seconds(0, bare) == 0.0
