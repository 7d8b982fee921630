"""The Chrome trace of a schedule."""

import json

from galvatron_megatron.cost.schedule import ChunkWork, simulate
from galvatron_megatron.report.trace import chrome_trace


def test_events_follow_the_format() -> None:
    simulation = simulate([ChunkWork(forward_seconds=1e-3, backward_seconds=2e-3)] * 2, 2, 3)
    document = json.loads(json.dumps(chrome_trace(simulation)))
    passes = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert len(passes) == len(simulation.events)
    assert {event["tid"] for event in passes} == {0, 1}
    assert {round(event["dur"]) for event in passes if event["cat"] == "forward"} == {1000}
    assert max(event["ts"] + event["dur"] for event in passes) == round(simulation.pipeline_seconds * 1e6)
    names = [event for event in document["traceEvents"] if event["ph"] == "M"]
    assert [event["args"]["name"] for event in names] == ["pipeline rank 0", "pipeline rank 1"]
