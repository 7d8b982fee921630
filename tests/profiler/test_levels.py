"""NUMA nodes and NVLink, read from what machines print.

The texts are written by hand in the format of Linux and of nvidia-smi, not recorded on such machines.
"""

import os

import pytest

from galvatron_megatron.profiler.levels import (
    NUMA_ROOT,
    Place,
    bus_of,
    level_notes,
    numa_of_bus,
    numa_of_cores,
    nvlinks_of,
    parse_buses,
    parse_cores,
    parse_nvlinks,
)

SWITCHED = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tNV18\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNV18\tNODE\t0-47\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tNV18\tSYS\t48-95\t1\t\tN/A
GPU3\tNV18\tNV18\tNV18\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""
PAIRS = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity
GPU0\t X \tSYS\tNV12\tSYS\t0-15\t0
GPU1\tSYS\t X \tSYS\tNV12\t16-31\t1
GPU2\tNV12\tSYS\t X \tSYS\t0-15\t0
GPU3\tSYS\tNV12\tSYS\t X \t16-31\t1
"""
BUSES = "0, 00000000:07:00.0\n1, 00000000:0B:00.0\n2, 00000000:48:00.0\n3, 00000001:4C:00.0\n"


def at(node: str = "host net:[1]", **known: object) -> Place:
    return Place(node=node, **known)


@pytest.mark.parametrize(
    ("text", "cores"), [("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}), ("5", {5}), ("\n", set()), ("", set())]
)
def test_lists_of_cores(text, cores):
    assert parse_cores(text) == cores


def test_numa_nodes_of_cores_and_of_devices(tmp_path):
    for node, cores in (("node0", "0-3,8-11"), ("node1", "4-7,12-15"), ("node10", "")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cores + "\n")
    assert numa_of_cores({1, 9}, tmp_path) == (0,)
    assert numa_of_cores(range(16), tmp_path) == (0, 1)
    assert numa_of_cores({1}, tmp_path / "missing") == ()
    for bus, node in ((bus_of(0, 7, 0), "1"), (bus_of(0, 0x4C, 0), "-1")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "numa_node").write_text(node + "\n")
    assert numa_of_bus("0000:07:00.0", tmp_path) == (1,)
    assert numa_of_bus("0000:4c:00.0", tmp_path) == ()
    assert numa_of_bus("0000:99:00.0", tmp_path) == ()


def test_the_cores_of_this_machine_have_a_numa_node_where_the_kernel_lists_them():
    if not list(NUMA_ROOT.glob("node[0-9]*/cpulist")):
        pytest.skip("this kernel lists no NUMA nodes")
    assert numa_of_cores(os.sched_getaffinity(0))


def test_nvlink_is_read_off_the_matrix():
    assert parse_nvlinks(SWITCHED) == {
        f"GPU{own}": tuple(f"GPU{other}" for other in range(4) if other != own) for own in range(4)
    }
    assert parse_nvlinks(PAIRS) == {"GPU0": ("GPU2",), "GPU1": ("GPU3",), "GPU2": ("GPU0",), "GPU3": ("GPU1",)}
    assert parse_nvlinks("") == {} == parse_nvlinks("Failed to initialize NVML: Unknown Error\n")
    assert parse_buses(BUSES)["GPU3"] == "0001:4c:00.0"
    assert parse_buses("no devices were found\n") == {}


def test_links_are_given_by_address():
    def ask(words):
        return PAIRS if words[0] == "topo" else BUSES

    assert nvlinks_of("0000:0b:00.0", ask) == ("0001:4c:00.0",)
    assert nvlinks_of("0000:ff:00.0", ask) == ()
    assert nvlinks_of("0000:0b:00.0", lambda words: "") == ()
    # Without the tool.
    assert nvlinks_of("0000:ff:00.0") == ()


def test_levels_of_a_node_are_told():
    in_order = [at(numa=(rank // 2,)) for rank in range(4)]
    assert level_notes(in_order) == ("NUMA nodes of host: ranks 0-1; 2-3",)
    two_hosts = [at(node=f"host{rank // 4} x", numa=(rank // 2 % 2,)) for rank in range(8)]
    assert level_notes(two_hosts) == ("NUMA nodes of host0: ranks 0-1; 2-3",)
    joined = [at(bus=f"{rank}", nvlinks=tuple(f"{o}" for o in range(4) if o != rank)) for rank in range(4)]
    assert level_notes(joined) == ("NVLink islands of host: ranks 0-3",)
    # Every rank may use all cores, or nothing is known.
    assert (
        level_notes([at(numa=(0, 1))] * 4) == level_notes([at()] * 4) == level_notes([at(numa=(0,))] * 4) == ()
    )


def test_ranks_that_do_not_follow_the_levels_are_named():
    crossed = [at(numa=(rank % 2,)) for rank in range(4)]
    first, second = level_notes(crossed)
    assert first == "NUMA nodes of host: ranks 0, 2; 1, 3"
    assert "not consecutive (0, 2; 1, 3)" in second and "tensor parallelism" in second
    pairs = [at(bus=f"{rank}", nvlinks=(f"{(rank + 2) % 4}",)) for rank in range(4)]
    assert [("NVLink" in note) for note in level_notes(pairs)] == [True, True]
    # A chain of bridges is one island.
    chain = [at(bus=f"{rank}", nvlinks=(f"{rank + 1}",) if rank < 3 else ()) for rank in range(4)]
    assert level_notes(chain) == ("NVLink islands of host: ranks 0-3",)
