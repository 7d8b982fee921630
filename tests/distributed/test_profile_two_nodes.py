"""Two nodes on one machine: the profile finds them and their link, and the search plans around it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from galvatron_megatron.cost.estimate import estimate_plan
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.cluster import Cluster
from galvatron_megatron.describe.megatron_args import model_from_arguments, parse_command_line
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.describe.profile_cluster import cluster_from_ranks
from galvatron_megatron.describe.profile_store import list_profiles
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan
from galvatron_megatron.plan.strategy import Recompute, Strategy
from galvatron_megatron.search.engine import search
from galvatron_megatron.search.request import SearchRequest

pytestmark = pytest.mark.alone
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


def profile_over(rate: str, folder: Path, tps: list[int]) -> Profile:
    """What two ranks in each of two nodes measure, joined by a link of a rate."""
    store = folder / "store"
    store.mkdir()
    request = folder / "request.json"
    request.write_text(
        json.dumps(
            {
                "megatron": MEGATRON.split(),
                "directory": str(store),
                "device": "cpu",
                "global_batch_size": 4,
                "micro_batch_sizes": [1],
                "tps": tps,
                "again": False,
            }
        )
    )
    worker = [sys.executable, str(Path(__file__).with_name("short_profile_worker.py")), str(request)]
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "two_nodes.sh"), rate, "2", *worker],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (profile,) = list_profiles(store)
    return profile


def check_nodes_and_link(profile: Profile, mega_bytes_per_second: float) -> Cluster:
    """Two nodes of two ranks, which share the link."""
    cluster = cluster_from_ranks(profile)
    assert (profile.provenance.nodes, profile.provenance.ranks_per_node) == (2, 2)
    assert (cluster.nodes, cluster.devices_per_node) == (2, 2)
    assert cluster.inter_node.gb_per_second * 1e3 == pytest.approx(mega_bytes_per_second / 2, rel=0.1)
    assert cluster.intra_node.gb_per_second > 3 * cluster.inter_node.gb_per_second
    # Of two pairs on the link, one alone has all of it.
    together, alone = (profile.collective("send", 2, 2, contention=at_once) for at_once in (True, False))
    assert together.nodes == alone.nodes == 2
    assert alone.bandwidth_bytes_per_second / 1e6 == pytest.approx(mega_bytes_per_second, rel=0.1)
    return cluster


@pytest.mark.distributed
def test_two_nodes_and_the_limit_of_a_slow_link_are_found(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    check_nodes_and_link(profile_over("600mbit", tmp_path, [1]), 75)


@pytest.mark.distributed
def test_tensor_parallelism_is_placed_inside_the_nodes_that_were_found(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    profile = profile_over("400mbit", tmp_path, [1, 2, 4])
    cluster = check_nodes_and_link(profile, 50)
    model = model_from_arguments(parse_command_line(MEGATRON.split()))
    costs = MeasuredCostModel(model, cluster, profile, RunOptions(implementation="local"))

    def uniform(pp: int, tp: int, zero: int = 0) -> Plan:
        dp = 4 // pp // tp
        base = Strategy(tp=tp, dp=dp, zero=zero)
        layer = LayerPlan(kind=model.layers[0].kind, strategy=replace(base, recompute=Recompute.FULL))
        stage = StagePlan(layers=(layer,) * (len(model.layers) // pp))
        return Plan(pp=pp, micro_batch_size=1, micro_batches=4 // dp, base=base, stages=(stage,) * pp)

    def memory(*plan: int) -> int:
        return estimate_plan(uniform(*plan), costs).peak_bytes

    # Just enough for a quarter of the model on a rank; without tensor parallelism that is never reached.
    limit = max(memory(2, 2), memory(1, 4))
    assert limit < min(memory(2, 1, 1), memory(2, 1), memory(1, 1, 1))
    request = SearchRequest(
        model=model,
        world_size=4,
        devices_per_node=2,
        memory_bytes=limit,
        global_batch_size=4,
        max_zero=1,
        allow_ulysses=False,
        allow_cp=False,
        allow_interleaving=False,
        # No rule keeps tensor parallelism off the link: what was measured must.
        tp_across_nodes=True,
    )
    for memory_bytes, least in ((limit, 2), (1 << 40, 1)):
        plan = search(replace(request, memory_bytes=memory_bytes), costs).plan
        degrees = {layer.strategy.tp for stage in plan.stages for layer in stage.layers} | {plan.base.tp}
        assert max(degrees) >= least
        # Inside a node, so that stages or replicas are what the link is between.
        assert max(degrees) <= cluster.devices_per_node, plan
    across = estimate_plan(uniform(1, 4), costs).step_seconds
    assert estimate_plan(uniform(2, 2), costs).step_seconds < across
