"""Two nodes on one machine: the profile finds them and the bandwidth of the link between them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from galvatron_megatron.describe.profile_store import list_profiles

ROOT = Path(__file__).resolve().parents[2]
MEGATRON = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 200 --tokenizer-type NullTokenizer"
)


def why_not() -> str:
    """Why this machine cannot make two nodes of itself, or nothing."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root to make network namespaces"
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"needs {' and '.join(missing)} (iproute2)"
    probe = subprocess.run(["ip", "netns", "add", "galvatron-probe"], capture_output=True, text=True)
    if probe.returncode:
        return f"cannot make a network namespace: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "galvatron-probe"], check=True)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rate", "mega_bytes_per_second", "per_node"), [("400mbit", 50, 2), ("200mbit", 25, 1)]
)
def test_two_nodes_and_the_limit_of_their_link_are_found(tmp_path, rate, mega_bytes_per_second, per_node):
    if reason := why_not():
        pytest.skip(reason)
    request = tmp_path / "request.json"
    store = tmp_path / "store"
    store.mkdir()
    request.write_text(
        json.dumps(
            {
                "megatron": MEGATRON.split(),
                "directory": str(store),
                "device": "cpu",
                "global_batch_size": 2,
                "micro_batch_sizes": [1],
                "tps": [1],
                "again": False,
            }
        )
    )
    worker = [sys.executable, "-m", "galvatron_megatron.commands.profile_worker", str(request)]
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "two_nodes.sh"), rate, str(per_node), *worker],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (profile,) = list_profiles(store)
    assert (profile.provenance.nodes, profile.provenance.ranks_per_node) == (2, per_node)

    from galvatron_megatron.profiler.topology import cluster_from_ranks

    cluster = cluster_from_ranks(profile)
    assert (cluster.nodes, cluster.devices_per_node) == (2, per_node)
    # One rank a node has the whole link; of two, each has the half.
    share = mega_bytes_per_second / per_node
    assert cluster.inter_node.gb_per_second * 1e3 == pytest.approx(share, rel=0.1)
    if per_node > 1:
        assert cluster.intra_node.gb_per_second > 3 * cluster.inter_node.gb_per_second
