"""Jobs that are refused before anything is measured."""

import json

import pytest
from programs import answer_of

SIZES = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 300 --tokenizer-type NullTokenizer --micro-batch-size 1 --global-batch-size 8 --num-experts 4"
)
PROGRAM = """
import importlib.util, json, sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from profiles import FOUR_RANKS, small_model, small_profile, ulysses_problem
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.describe.megatron_args import parse_command_line
from galvatron_megatron.describe.profile_cluster import cluster_from_ranks
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration import planning
from galvatron_megatron.integration.options import Options
from galvatron_megatron.integration.planning import JobPlanner
from galvatron_megatron.plan.constraints import Constraints

answers = []
for line, plan_file, changes in json.loads(sys.argv[1]):
    words = line.split()
    options = Options(plan_file=Path(plan_file) if plan_file else None)
    try:
        args = Namespace(**{**parse_command_line(words), **changes})
        planner = JobPlanner(args, {}, options, words, None, None)
        answers.append("")
    except GalvatronError as error:
        answers.append(str(error))
highest = [planner._max_zero()]
planning.find_spec = lambda name: None
highest.append(planner._max_zero())
planning.find_spec = importlib.util.find_spec
for options in (Options(uniform=True), Options(zero_backend="megatron"), Options(zero_backend="deepspeed")):
    planner.options = options
    highest.append(planner._max_zero())

# Device memory for ZeRO 2 and 3 alone, which the runtime may refuse.
planner.options = Options()
planner.constraints = Constraints(tp=1, pp=1)
planner.channel = Namespace(world_size=4)
planner._run_options = lambda: RunOptions(implementation="local", bucket_elements=1000)
planner.model = small_model()
device = replace(FOUR_RANKS.device, memory_gib=36e6 / 2**30)
found = []
for problem in ("", "no large gradients with it"):
    planner._runtime_problem = lambda plan: problem
    try:
        decision = planner._search(small_profile(planner.model), replace(FOUR_RANKS, device=device), 0.0, ())
        found.append(max(strategy.zero for strategy in (decision.plan.base, *decision.plan.strategies)))
    except GalvatronError as error:
        found.append(str(error))

# Ulysses is best, measured as far as the search asks for it.
planner.model, profile, exchanged = ulysses_problem()
planner.channel = Namespace(world_size=2)
planner.args.global_batch_size = 1
planner._runtime_problem = lambda plan: ""
kinds = []
for uniform, parts in ((False, ()), (False, exchanged), (True, exchanged)):
    planner.options, planner.constraints = Options(uniform=uniform), Constraints()
    measured = replace(profile, parts=(*profile.parts, *parts))
    decision = planner._search(measured, cluster_from_ranks(measured), 0.0, ())
    layers = {strategy.sequence_parallel.value for strategy in decision.plan.strategies}
    kinds.append([list(planner._needs().ulysses), sorted(layers)])
print(json.dumps([*answers, highest, found, kinds]))
"""
LINES = {
    "": "",
    "--expert-model-parallel-size 1 --tensor-model-parallel-size 2 --expert-tensor-parallel-size 2": "",
    "--expert-model-parallel-size 2": "--expert-model-parallel-size 2: a job measures layers with all experts",
    "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1": "--expert-tensor-parallel-size 1: a job",
    "--num-distributed-optimizer-instances 2": "--num-distributed-optimizer-instances 2: a job measures",
}
CHANGING_BATCH = {
    "rampup_batch_size": [4, 4, 100],
    "step_batch_size_schedule": "0:8 1K:16",
    "decrease_batch_size_if_needed": True,
}


@pytest.fixture(scope="module")
def answers() -> list:
    """What the planner says, from a process of its own: it imports torch and megatron."""
    lines = [(f"{SIZES} {flags}", "", {}) for flags in LINES]
    lines += [(SIZES, "", {name: value}) for name, value in CHANGING_BATCH.items()]
    lines.append((f"{SIZES} --expert-model-parallel-size 2", "plan.yaml", {}))
    return answer_of(PROGRAM, json.dumps(lines))


@pytest.mark.parametrize("flags", LINES)
def test_degrees_that_are_not_measured_are_refused(answers: list, flags: str) -> None:
    answer = answers[list(LINES).index(flags)]
    assert answer.startswith(LINES[flags]) if LINES[flags] else not answer
    assert not answer or "; valid: " in answer


def test_numbers_of_micro_batches_that_change_are_refused(answers: list) -> None:
    for name, answer in zip(CHANGING_BATCH, answers[len(LINES) :], strict=False):
        assert answer.startswith(f"--{name.replace('_', '-')}: is not planned for; valid: ")


def test_a_plan_file_may_share_out_experts(answers: list) -> None:
    assert answers[-4] == ""


def test_zero_2_and_3_need_deepspeed_and_layers_of_their_own(answers: list) -> None:
    assert answers[-3] == [3, 1, 1, 1, 3]


def test_sharded_states_that_alone_fit_are_planned_and_a_refusal_of_theirs_is_named(answers: list) -> None:
    zero, refused = answers[-2]
    assert zero > 1
    assert "nothing fits" in refused
    assert refused.endswith("; only ZeRO 0 and 1: no large gradients with it")


def test_ulysses_is_measured_where_the_search_asks_for_it_and_chosen_where_it_is_best(answers: list) -> None:
    assert answers[-1] == [[[2], ["none"]], [[2], ["ulysses"]], [[], ["none"]]]
