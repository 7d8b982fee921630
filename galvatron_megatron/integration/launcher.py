"""What a launcher says of a rank, turned into what PyTorch and Megatron read.

``torchrun`` says everything. ``deepspeed`` names the ranks of a node differently and adds ``--local_rank`` to
the script's arguments; ``srun`` and ``mpirun`` have names of their own for all of it and name no meeting point.

This module imports the standard library only, and the errors.
"""

import argparse
import os
import re
from collections.abc import Callable, MutableMapping

from galvatron_megatron.errors import GalvatronError

_MPI = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""Rank, world size, rank in its node and ranks of its node: Open MPI's names, then MPICH's and Intel MPI's."""

_LOCAL_SIZES = ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
"""Other names of LOCAL_WORLD_SIZE; the first is DeepSpeed's."""

_FIRST_PORT, _PORTS = 20000, 12000
"""Where a Slurm job step meets: below the ports that Linux hands out by itself (32768 and above)."""


def adopt_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the variables that PyTorch reads (RANK, WORLD_SIZE, MASTER_ADDR, ...) from what a launcher says.

    What is set already stays; a process that no launcher started stays alone.

    Args:
        environment: of this process; changed in place.

    Raises:
        GalvatronError: a launcher's variable cannot be understood, or the ranks have no place to meet.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        _adopt_local_size(environment)
        return
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        # Only srun sets it: the batch script itself has SLURM_PROCID and SLURM_NTASKS too, and is no rank.
        _adopt_slurm(environment)
        return
    for names in _MPI:
        if _number(environment, names[1], 1) > 1:
            _adopt_mpi(environment, names)
            return


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list, such as ``node001`` of ``node[001-003,7],other``.

    Raises:
        GalvatronError: it is no node list.
    """
    match = re.fullmatch(r"([^\[\],]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?(?:,.*)?", node_list)
    if match is None:
        raise GalvatronError(f"SLURM_STEP_NODELIST: {node_list!r} names no host; valid: start ranks with srun")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


def tasks_by_node(counts: str) -> list[int]:
    """Tasks of every node from Slurm's short form: ``2(x3),1`` is 2, 2, 2, 1.

    Raises:
        GalvatronError: it is not such a list.
    """
    found: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise GalvatronError(
                f"SLURM_STEP_TASKS_PER_NODE: {counts!r}; valid: such as 2(x3),1, as srun sets it"
            )
        found += [int(match[1])] * int(match[2] or 1)
    return found


def accepting_local_rank(
    provider: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] | None,
) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """A provider of extra arguments that also takes ``--local_rank``, which the deepspeed launcher adds.

    Megatron itself knows ``--local-rank`` only.

    Args:
        provider: the script's own, or None.
    """

    def with_local_rank(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = parser if provider is None else provider(parser)
        if "--local_rank" not in parser._option_string_actions:
            # Megatron's own spelling, --local-rank, has the same destination.
            parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
        return parser

    return with_local_rank


def _adopt_local_size(environment: MutableMapping[str, str]) -> None:
    for name in _LOCAL_SIZES:
        if name in environment and "LOCAL_WORLD_SIZE" not in environment:
            environment["LOCAL_WORLD_SIZE"] = str(_number(environment, name))


def _adopt_slurm(environment: MutableMapping[str, str]) -> None:
    here = tasks_by_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environment, "SLURM_NODEID")
    if node >= len(here):
        raise GalvatronError(f"SLURM_NODEID: {node} of {len(here)} nodes; valid: start ranks with srun")
    job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
    _adopt(
        environment,
        RANK=_number(environment, "SLURM_PROCID"),
        WORLD_SIZE=_number(environment, "SLURM_STEP_NUM_TASKS"),
        LOCAL_RANK=_number(environment, "SLURM_LOCALID"),
        LOCAL_WORLD_SIZE=here[node],
        MASTER_ADDR=first_host(environment.get("SLURM_STEP_NODELIST", "")),
        # Steps that share a node meet at different ports.
        MASTER_PORT=_FIRST_PORT + (job * 31 + step) % _PORTS,
    )


def _adopt_mpi(environment: MutableMapping[str, str], names: tuple[str, str, str, str]) -> None:
    rank, size = (_number(environment, name) for name in names[:2])
    local_size = _number(environment, names[3], size)
    if "MASTER_ADDR" not in environment and local_size < size:
        raise GalvatronError(
            f"MASTER_ADDR: not set for {size} ranks on several nodes; valid: the first node's name, which "
            "mpirun hands on with -x MASTER_ADDR (Open MPI) or -genv MASTER_ADDR (MPICH)"
        )
    _adopt(
        environment,
        RANK=rank,
        WORLD_SIZE=size,
        LOCAL_RANK=_number(environment, names[2], rank),
        LOCAL_WORLD_SIZE=local_size,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=29500,
    )


def _adopt(environment: MutableMapping[str, str], **values: object) -> None:
    for name, value in values.items():
        environment.setdefault(name, str(value))


def _number(environment: MutableMapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise GalvatronError(f"{name}: {text!r} is not a number; valid: as the launcher sets it for its ranks")
    return int(text)
