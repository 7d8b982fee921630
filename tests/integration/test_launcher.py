import argparse

import pytest

from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.launcher import (
    accepting_local_rank,
    adopt_environment,
    first_host,
    tasks_by_node,
)

SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_NTASKS": "7",
}


def test_torchrun_needs_nothing():
    said = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **SLURM}
    environment = dict(said)
    adopt_environment(environment)
    assert environment == said


def test_deepspeed_names_the_ranks_of_a_node_differently():
    environment = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    adopt_environment(environment)
    assert environment["LOCAL_WORLD_SIZE"] == "2"


def test_srun_names_no_rank_and_no_meeting_point():
    environment = dict(SLURM)
    adopt_environment(environment)
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "6",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    assert environment["MASTER_ADDR"] == "gpu007"
    other = dict(SLURM, SLURM_PROCID="0", SLURM_NODEID="0")
    adopt_environment(other)
    assert other["LOCAL_WORLD_SIZE"] == "2"
    # All ranks of a step meet at one port, another step's ranks at another one.
    assert other["MASTER_PORT"] == environment["MASTER_PORT"]
    next_step = dict(SLURM, SLURM_STEP_ID="3")
    adopt_environment(next_step)
    assert next_step["MASTER_PORT"] != environment["MASTER_PORT"]
    assert 1024 < int(next_step["MASTER_PORT"]) < 32768


def test_a_batch_script_is_no_rank():
    said = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    environment = dict(said)
    adopt_environment(environment)
    assert environment == said


def test_mpirun():
    environment = {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    with pytest.raises(GalvatronError, match=r"MASTER_ADDR: not set for 4 ranks.*-x MASTER_ADDR"):
        adopt_environment(dict(environment))
    there = environment | {"MASTER_ADDR": "node0"}
    adopt_environment(there)
    assert (there["RANK"], there["WORLD_SIZE"], there["LOCAL_RANK"], there["LOCAL_WORLD_SIZE"]) == (
        "3",
        "4",
        "1",
        "2",
    )
    assert there["MASTER_ADDR"] == "node0"
    alone = {"PMI_RANK": "1", "PMI_SIZE": "2"}
    adopt_environment(alone)
    assert (alone["RANK"], alone["LOCAL_RANK"], alone["MASTER_ADDR"]) == ("1", "1", "127.0.0.1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": "six"}, "SLURM_PROCID: 'six' is not a number"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE: '2\\(x'"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST: ''"),
        ({"SLURM_NODEID": "4"}, "SLURM_NODEID: 4 of 4 nodes"),
    ],
)
def test_what_cannot_be_understood_is_said(change, message):
    environment = SLURM | change
    before = dict(environment)
    with pytest.raises(GalvatronError, match=message):
        adopt_environment(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-003,7],other", "node001"),
        ("rack[2,4-5]-gpu,x", "rack2-gpu"),
        ("a.b-c.d", "a.b-c.d"),
    ],
)
def test_first_host(text, host):
    assert first_host(text) == host


def test_tasks_by_node():
    assert tasks_by_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_by_node("8") == [8]


def test_the_argument_of_the_deepspeed_launcher_is_taken():
    def own(parser):
        parser.add_argument("--mine")
        return parser

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--local-rank", type=int, default=5)
    accepting_local_rank(own)(parser)
    parsed = parser.parse_args(["--local_rank=3", "--mine", "x"])
    assert (parsed.local_rank, parsed.mine) == (3, "x")
    assert parser.parse_args([]).local_rank == 5

    def has_it(parser):
        parser.add_argument("--local_rank", type=int, default=-1)
        return parser

    parser = argparse.ArgumentParser()
    accepting_local_rank(has_it)(parser)
    assert parser.parse_args(["--local_rank=2"]).local_rank == 2
    assert accepting_local_rank(None)(argparse.ArgumentParser()).parse_args(["--local_rank=1"]).local_rank == 1
