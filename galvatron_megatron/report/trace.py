"""A simulated schedule as a Chrome trace, to look at in Perfetto (ui.perfetto.dev) or chrome://tracing."""

import json
from pathlib import Path

from galvatron_megatron.cost.schedule import FORWARD, Simulation
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.plan.document import write_document

_MICROSECONDS = 1e6


def chrome_trace(simulation: Simulation) -> dict[str, object]:
    """The passes of every pipeline rank as complete events, and its live memory as a counter.

    Args:
        simulation: what happened.

    Returns:
        A document in the Trace Event Format (JSON object format); times in microseconds.
    """
    rows: list[dict[str, object]] = []
    for rank in sorted({event.rank for event in simulation.events}):
        rows.append(
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"pipeline rank {rank}"}}
        )
    for event in simulation.events:
        forward = event.direction == FORWARD
        rows.append(
            {
                "ph": "X",
                "name": f"{'forward' if forward else 'backward'} {event.micro_batch}",
                "cat": "forward" if forward else "backward",
                "cname": "thread_state_running" if forward else "thread_state_iowait",
                "pid": 0,
                "tid": event.rank,
                "ts": event.start_seconds * _MICROSECONDS,
                "dur": (event.end_seconds - event.start_seconds) * _MICROSECONDS,
                "args": {"micro_batch": event.micro_batch, "chunk": event.chunk},
            }
        )
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def write_chrome_trace(simulation: Simulation, path: Path) -> None:
    """Writes the trace of a simulation.

    Raises:
        GalvatronError: the file cannot be written.
    """
    write_document(json.dumps(chrome_trace(simulation)) + "\n", path, GalvatronError)
