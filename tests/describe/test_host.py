"""What is said about a host, held against made-up file systems."""

import os

import pytest

from galvatron_megatron.describe.host import memory_bytes

PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
GIB = 1 << 30


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        # Version 2: the least of a group and all above it; no limit is "max".
        ("0::/jobs/one", {"jobs/one/memory.max": "max", "jobs/memory.max": str(GIB)}, GIB),
        ("0::/jobs/one", {"jobs/one/memory.max": str(GIB // 2), "jobs/memory.max": str(GIB)}, GIB // 2),
        ("0::/jobs", {"jobs/memory.max": "max"}, PHYSICAL),
        # A container that sees the host's path, or one above its own root, at its own mount.
        ("0::/host/path", {"memory.max": str(GIB)}, GIB),
        ("0::/../other", {"memory.max": str(GIB)}, GIB),
        # Version 1, beside a version 2 without controllers; no limit is a huge number.
        (
            "4:cpu,memory:/slurm/job\n0::/",
            {"memory/slurm/job/memory.limit_in_bytes": str(GIB), "memory/memory.limit_in_bytes": str(1 << 62)},
            GIB,
        ),
        ("4:memory:/\n3:cpu:/small", {"memory/memory.limit_in_bytes": str(1 << 62)}, PHYSICAL),
        ("", {}, PHYSICAL),
    ],
)
def test_memory_ends_at_the_limits_of_control_groups(tmp_path, groups, limits, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert memory_bytes(tmp_path) == expected


def test_a_host_without_control_groups_has_its_own_memory(tmp_path):
    assert memory_bytes(tmp_path) == PHYSICAL
    assert 0 < memory_bytes() <= PHYSICAL
