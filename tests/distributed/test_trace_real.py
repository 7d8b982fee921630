"""What autograd saves in real runs of the traced layers, with data and with real ranks over gloo."""

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from galvatron_megatron.describe.megatron_args import model_from_arguments, parse_command_line
from galvatron_megatron.plan.strategy import Strategy
from galvatron_megatron.profiler.trace import run_worker, settings_of
from tests.profiler.trace_cases import MEGATRON, STRATEGIES, argv

pytestmark = [pytest.mark.distributed, pytest.mark.jobs]
SHARED_OUT = Strategy(tp=2, sequence_parallel=MEGATRON, expert_parallel=2, expert_tensor_parallel=1)
TP_AND_SP = [s for s in STRATEGIES if s.tp == 2 and s.sequence_parallel is MEGATRON]
COMPARED = (
    "activation_bytes",
    "activation_terms",
    "parameters_sharded",
    "parameters_replicated",
    "operators",
    "collectives",
)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def run(case: str, tp: int, kernels: str, strategies: Sequence[Strategy] = STRATEGIES) -> None:
    model = model_from_arguments(parse_command_line(argv(case)))
    request = {
        "argv": argv(case),
        "settings": settings_of(model, [s for s in strategies if s.ranks == tp], [2]),
        "kernels": kernels,
        "fused_attention": case != "unfused",
    }
    port = free_port()

    def start(rank: int) -> list[dict]:
        if rank < 0:
            return run_worker(request, 150)
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": tp,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {name: str(value) for name, value in places.items()}
        return run_worker(request | {"fake": False}, 150, environment)

    with ThreadPoolExecutor(tp + 1) as workers:
        traced, *ranks = workers.map(start, range(-1, tp))
    compared = 0
    for rank in ranks:
        for fake, real in zip(traced, rank, strict=True):
            for name in COMPARED if "counts" in fake else ():
                where = f"{case} {kernels} {fake['part']} {fake['layout']} {fake['recompute']} {name}"
                mine, theirs = fake["counts"][name], real["counts"][name]
                if name in ("operators", "collectives"):
                    mine, theirs = (
                        sorted(row for row in rows if row[1] != "memory") for rows in (mine, theirs)
                    )
                assert mine == theirs, where
                compared += 1
    assert compared >= 4 * len(COMPARED)


@pytest.mark.parametrize(("case", "kernels"), [("grouped", "cpu"), ("experts", "gpu")])
def test_one_rank_saves_what_was_traced(case: str, kernels: str) -> None:
    run(case, 1, kernels)


def test_two_ranks_with_experts_save_what_was_traced() -> None:
    """Experts split over tp, shared out whole, and shared out without tensor parallelism."""
    run("experts", 2, "gpu", [*TP_AND_SP, Strategy(dp=2, expert_parallel=2), SHARED_OUT])


@pytest.mark.parametrize("case", ["gpt", "latent"])
def test_two_ranks_save_what_was_traced(case: str) -> None:
    run(case, 2, "gpu")
