"""Jobs that may keep states in host memory: when they do, and what stands in the way."""

import pytest
from programs import answer_of

PROGRAM = """
import json
from argparse import Namespace
from dataclasses import replace
from profiles import FOUR_RANKS, small_model, small_profile
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.cluster import Host
from galvatron_megatron.describe.megatron_args import parse_command_line
from galvatron_megatron.describe.profile import StepPoint
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration import planning
from galvatron_megatron.integration.options import Options
from galvatron_megatron.integration.planning import JobPlanner
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.strategy import Offload, Recompute

WORDS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 300 --tokenizer-type NullTokenizer --micro-batch-size 1 --global-batch-size 8"
).split()

def planner(offload):
    return JobPlanner(
        Namespace(**parse_command_line(WORDS)), {}, Options(offload=offload), WORDS,
        Namespace(world_size=4), None,
    )

def said(work):
    try:
        plan = (decision := work()).plan
    except GalvatronError as error:
        return str(error)
    return [sorted({s.offload.value for s in (plan.base, *plan.strategies)}), list(decision.notes)]

model = small_model()
step = StepPoint(tensors=1, parameters=10**6, updated=10**6, zero=1, seconds=0.01)
profile = replace(small_profile(model), host_steps=(step,))
# CPU ranks: four devices of 42 MB are 168 MB of the node.
device = replace(FOUR_RANKS.device, memory_gib=42e6 / 2**30)

def planned(offload, node_bytes=1e9, problem=""):
    found = planner(offload)
    needs = found._needs()
    found.model = model
    found.constraints = Constraints(tp=1, pp=1, zero=1, recompute=Recompute.NONE, micro_batch_size=1)
    found._run_options = lambda: RunOptions(implementation="local")
    found._runtime_problem = lambda plan: problem
    host = Host(gb_per_second=4.0, memory_gb_per_second=8.0, memory_gib=node_bytes / 2**30, source="measured")
    cluster = replace(FOUR_RANKS, device=device, host=host)
    return [needs.host_step, said(lambda: found._search(profile, cluster, 0.0, ()))]

answers = {
    "fits": planned(Offload.OPTIMIZER),
    "full": planned(Offload.OPTIMIZER, 168e6 + 10e6),
    "nothing left": planned(Offload.OPTIMIZER, 168e6),
    "refused": planned(Offload.OPTIMIZER, problem="no compiler"),
    "not asked": planned(Offload.NONE),
}
planning.find_spec = lambda name: None
answers["not installed"] = said(lambda: planner(Offload.OPTIMIZER))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict:
    """What the planner says, from a process of its own: it imports torch and megatron."""
    return answer_of(PROGRAM)


def test_states_lie_in_host_memory_where_asked_for_and_only_that_fits(answers: dict) -> None:
    assert answers["fits"][0] and answers["fits"][1][0] == ["none", "optimizer"]
    is_measured, refused = answers["not asked"]
    assert not is_measured
    assert "nothing fits" in refused and refused.endswith("by --galvatron-offload optimizer")


def test_no_node_keeps_more_than_the_memory_that_is_left_of_it(answers: dict) -> None:
    assert answers["fits"][1][1] == []
    assert "host memory: the fastest plan would keep" in answers["full"][1]
    assert "nothing fits" in answers["full"][1] and "nothing fits" in answers["nothing left"][1]
    assert answers["nothing left"][1].endswith(
        "a node has none beside that of its devices, which may use all of it"
    )


def test_a_refusal_of_the_runtime_is_named(answers: dict) -> None:
    assert "nothing fits" in answers["refused"][1]
    assert answers["refused"][1].endswith("; nothing is offloaded: no compiler")
    assert answers["not installed"].startswith("--galvatron-offload optimizer: deepspeed, which keeps states")
