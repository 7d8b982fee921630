"""Clusters: reading, refusing, fingerprints."""

from dataclasses import replace
from pathlib import Path

import pytest

from galvatron_megatron.describe.cluster import (
    Cluster,
    Constants,
    Device,
    Link,
    cluster_document,
    read_cluster,
)
from galvatron_megatron.errors import DescriptionError

CLUSTERS = sorted((Path(__file__).parents[2] / "configs" / "clusters").glob("*.yaml"))


def small_cluster(**changes: object) -> Cluster:
    device = Device(
        name="d",
        memory_gib=10,
        bf16_tflops=100,
        fp16_tflops=100,
        fp32_tflops=10,
        memory_gb_per_second=1000,
    )
    content = {
        "name": "c",
        "nodes": 2,
        "devices_per_node": 4,
        "device": device,
        "intra_node": Link(gb_per_second=100, latency_us=5),
        "inter_node": Link(gb_per_second=10, latency_us=10),
    }
    return Cluster(**(content | changes))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_shipped_clusters_read_and_cite_sources(path: Path) -> None:
    cluster = read_cluster(path, nodes=3)
    assert cluster.name == path.stem
    assert cluster.world_size == 3 * cluster.devices_per_node
    assert len(cluster.sources) >= 2
    # What the vendor sells is at least what is usable.
    assert 16 <= cluster.device.memory_gib <= 192
    assert cluster.intra_node.gb_per_second > cluster.inter_node.gb_per_second


def test_the_seven_clusters_are_shipped() -> None:
    assert {path.stem for path in CLUSTERS} == {"a100-80g", "a100-40g", "h100", "h200", "b200", "l4", "v100"}


def test_document_round_trip(tmp_path: Path) -> None:
    link = Link(gb_per_second=100, latency_us=5, group_efficiency=((2, 0.3), (4, 0.6)))
    device = replace(small_cluster().device, gemm_efficiencies=((1, 128, 256, 512, 0.5),))
    cluster = small_cluster(device=device, intra_node=link, sources=("a datasheet",))
    path = tmp_path / "c.yaml"
    path.write_text(cluster_document(cluster))
    assert read_cluster(path) == cluster


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: [", ("not YAML", "line")),
        ("- 1", ("holds a list; valid: a mapping",)),
        ("nodes: 1\nnodes: 2", ("'nodes' is given twice",)),
        ("nodes: !!timestamp x", ("does not fit its tag",)),
        ("device: 3", ("device: 3 is not a mapping",)),
        ("nodes: 2", ("missing", "device")),
        ("devise: {}", ("unknown key 'devise'", "did you mean 'device'")),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(DescriptionError) as error:
        read_cluster(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


def test_bad_numbers_name_file_and_field(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(cluster_document(small_cluster()).replace("memory_gib: 10", "memory_gib: -1"))
    with pytest.raises(DescriptionError, match=r"c\.yaml.*device\.memory_gib: -1; valid: a number > 0"):
        read_cluster(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("nodes: 2\n", f"nodes: 0x{'f' * 6000}\n"),
            "nodes: an integer of 24000 bits; valid: an integer > 0 and <=",
        ),
        (("nodes: 2\n", "nodes: 1.0\n"), "nodes: 1.0; valid: an integer > 0"),
        (("name: c\n", "name: [small]\n"), "cluster name: ['small']; valid: text"),
        (("group_efficiency: {}", "group_efficiency: {2: 0.5, a: 1}"), "group_efficiency: ('a', 1); valid"),
        (("group_efficiency: {}", "group_efficiency: {2: a}"), "group_efficiency: (2, 'a'); valid"),
        (("group_efficiency: {}", "group_efficiency: [2]"), "group_efficiency: [2]; valid"),
    ],
)
def test_odd_values_are_refused_in_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "c.yaml"
    text = cluster_document(small_cluster())
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(DescriptionError) as error:
        read_cluster(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DescriptionError, match="No such file"):
        read_cluster(tmp_path / "none.yaml")


@pytest.mark.parametrize("entry", [(1, 2, 3, 0.5), (1, 2, 3, 0, 0.5), (1, 2, 3, 4, 1.5), (1, 2, 3, 4, "fast")])
def test_measured_shapes_are_checked(entry: tuple) -> None:
    with pytest.raises(DescriptionError, match="gemm_efficiencies"):
        replace(small_cluster().device, gemm_efficiencies=(entry,))


@pytest.mark.parametrize("value", [0, -1, "4", True, 1.5])
def test_node_count_is_checked(value: object) -> None:
    with pytest.raises(DescriptionError, match="nodes"):
        small_cluster(nodes=value)


def test_slowdown_below_one_is_refused() -> None:
    with pytest.raises(DescriptionError, match="overlap_slowdown"):
        Constants(overlap_slowdown=0.9)


def test_fingerprint_follows_costs_alone() -> None:
    cluster = small_cluster()
    assert replace(cluster, name="other", sources=("x",)).fingerprint() == cluster.fingerprint()
    faster = replace(cluster, constants=replace(cluster.constants, gemm_efficiency=0.9))
    assert faster.fingerprint() != cluster.fingerprint()
    assert cluster.with_nodes(4).fingerprint() != cluster.fingerprint()


@pytest.mark.parametrize(
    ("ranks", "stride", "members"), [(4, 1, 4), (8, 1, 4), (2, 4, 1), (4, 2, 2), (2, 1, 2)]
)
def test_members_per_node(ranks: int, stride: int, members: int) -> None:
    assert small_cluster().members_per_node(ranks, stride) == members


def test_measured_group_efficiency_wins() -> None:
    link = Link(gb_per_second=100, latency_us=1, efficiency=0.5, group_efficiency=((2, 0.25),))
    assert link.bandwidth(2) == 25e9
    assert link.bandwidth(8) == 50e9


def test_hosts_are_optional_and_change_the_fingerprint_only_where_given(tmp_path: Path) -> None:
    cluster = read_cluster("a100-80g")
    bare = replace(cluster, host=None)
    assert bare.fingerprint() != cluster.fingerprint()
    path = tmp_path / "bare.yaml"
    path.write_text(cluster_document(bare))
    assert read_cluster(path) == bare and "host:" not in path.read_text()
    path.write_text(cluster_document(cluster))
    assert read_cluster(path) == cluster
    path.write_text(cluster_document(cluster).replace("memory_gb_per_second: 51.2", "memory_gb_per_second: 0"))
    with pytest.raises(DescriptionError, match=r"host\.memory_gb_per_second: 0; valid: a number > 0"):
        read_cluster(path)
