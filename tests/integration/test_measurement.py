import json
from types import SimpleNamespace

import pytest
import torch
from test_decision import DECISION

from galvatron_megatron.integration.channel import Channel
from galvatron_megatron.integration.measurement import REPORT_ITERATIONS, Measurement


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)


def run(iterations, *, report=None, step=0.5, warm_up=5.0, first=1):
    """Trains for some iterations with a clock of our own: slow first steps, then equal ones."""
    now = [0.0]
    measurement = Measurement(DECISION, Channel(0, 1), iterations, report, clock=lambda: now[0])

    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *rest, is_first_iteration=False):
        return iteration

    training = SimpleNamespace(training_log=training_log)
    measurement.install(training)
    for iteration in range(first, iterations + 1):
        now[0] += warm_up if iteration < first + 2 else step
        loss = torch.tensor([8.0 * (100 - iteration), 8.0])
        assert (
            training.training_log({"lm loss": loss}, {}, 1e-3, iteration, is_first_iteration=True) == iteration
        )
    return measurement


def test_warm_up_does_not_count_and_figures_stand_beside_the_prediction(capsys):
    run(REPORT_ITERATIONS + 5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip("= ") == f"galvatron: after {REPORT_ITERATIONS} iterations"
    assert lines[1] == "step time: measured 500.0 ms, predicted 250.0 ms (-50%)"
    assert lines[2] == "memory, pipeline rank 0: measured 1.000 GiB, predicted 0.000 GiB"
    # Shown once.
    assert len(lines) == 4


def test_short_jobs_are_shown_at_their_end(capsys):
    run(5)
    assert "after 5 iterations" in capsys.readouterr().out
    run(1)
    assert "after 1 iterations" in capsys.readouterr().out


def test_a_resumed_job_counts_its_own_iterations(capsys):
    run(130, first=101)
    assert "after 110 iterations" in capsys.readouterr().out


def test_the_report_has_every_loss(tmp_path):
    path = tmp_path / "report.json"
    run(REPORT_ITERATIONS + 3, report=path)
    found = json.loads(path.read_text())
    assert found["iterations"] == REPORT_ITERATIONS + 3
    assert found["measured_step_seconds"] == 0.5
    assert found["losses"] == [[step, {"lm loss": 100.0 - step}] for step in range(1, REPORT_ITERATIONS + 4)]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_training_goes_on_where_the_report_cannot_be_written(capsys, tmp_path):
    folder = tmp_path / "gone"
    measurement = run(REPORT_ITERATIONS + 3, report=folder / "report.json")
    error = capsys.readouterr().err.splitlines()
    # Once after ten iterations, once at the end.
    assert len(error) == 2 and all(line.endswith("; training goes on") for line in error)
    assert str(folder / "report.json") in error[0]
    kept = [loss for found in measurement._losses.values() for loss in found.values()]
    assert {type(loss) for loss in kept} == {float}
    assert len(kept) == REPORT_ITERATIONS + 3
