"""How the speeds of devices and hosts are measured."""

import pytest

from galvatron_megatron.integration.cpu_device import CpuDevice
from galvatron_megatron.profiler import topology
from galvatron_megatron.profiler.fit import undisturbed


@pytest.mark.parametrize("measure", [topology._host_speed, lambda size: topology._device_speed(16, size)])
def test_ranks_begin_every_measurement_together(monkeypatch, measure):
    events = []

    def measured(times):
        events.append("measured")
        return undisturbed(times)

    monkeypatch.setattr(topology.dist, "barrier", lambda: events.append("met"))
    monkeypatch.setattr(topology, "undisturbed", measured)
    monkeypatch.setattr(topology, "gather", lambda value: [value])
    with CpuDevice(even_with_gpu=True):
        speeds = dict(measure(1 << 16))
    assert all(value > 0 for value in speeds.values())
    assert events == ["met", "measured"] * (len(events) // 2) and len(events) >= 6


def rank_facts(node: str, cores: set[int]) -> topology.RankFacts:
    return topology.RankFacts(
        node=node,
        device="a processor",
        memory_bytes=1 << 30,
        processors=frozenset(cores),
        multiprocessors=len(cores),
    )


@pytest.mark.parametrize(
    ("cores", "expected"),
    [([{0}, {1}], 2), ([{0, 1}, {0, 1}], 2), ([{0}, {0}], 1), ([{0, 1}, {1, 2}], 3)],
    ids=["bound", "shared", "crowded", "overlapping"],
)
def test_processors_of_a_node_are_those_of_all_its_ranks(cores, expected):
    facts = [rank_facts(node, own) for node in ("a", "b") for own in cores]
    place = topology.provenance_of_ranks("model", "gloo", facts, switches="")
    assert (place.nodes, place.ranks_per_node, place.processors_per_node) == (2, 2, expected)
