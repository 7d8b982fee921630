"""What a planned job is refused for, and where it goes on from."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from galvatron_megatron.errors import GalvatronError, PlanError
from galvatron_megatron.integration.channel import Channel
from galvatron_megatron.integration.job import PlannedJob, end_in_one_line, universal_to_read
from galvatron_megatron.integration.options import Options
from galvatron_megatron.runtime.agreement import AgreedError


def test_a_job_with_a_checkpoint_of_its_own_reads_no_other_again(tmp_path: Path, capsys) -> None:
    universal, own = tmp_path / "universal", tmp_path / "own"
    (universal / "zero" / "weight").mkdir(parents=True)
    torch.save(3, universal / "zero" / "weight" / "step.pt")
    for load in (None, str(own)):
        assert universal_to_read(Namespace(load=load), universal) == str(universal)
    assert capsys.readouterr().out == ""
    own.mkdir()
    (own / "latest_checkpointed_iteration.txt").write_text("5")
    assert universal_to_read(Namespace(load=str(own)), universal) is None
    assert f"--load {own} holds a checkpoint" in capsys.readouterr().out
    # Nor does it have to be there any more.
    assert universal_to_read(Namespace(load=str(own)), tmp_path / "gone") is None
    with pytest.raises(PlanError, match="no latest_universal file"):
        universal_to_read(Namespace(load=None), tmp_path / "gone")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError("two\nlines"), "under it: two lines; valid: "),
        (AssertionError(), "under it: raise error; "),
    ],
)
def test_what_megatron_itself_asserts_of_the_arguments_is_one_line(error: Exception, said: str) -> None:
    def validate(args: Namespace, defaults: dict) -> None:
        raise error

    job = PlannedJob(Namespace(rank=0, world_size=1), {}, Options(auto=True), validate)
    with pytest.raises(GalvatronError) as refused:
        job.validate()
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_rank_that_megatron_refuses_waits_for_the_word_of_the_first(monkeypatch) -> None:
    """Rank 0 may have had no objection: the rank ends with its own then."""
    asked = []
    monkeypatch.setattr(Channel, "__init__", lambda self, rank, world_size: None)
    monkeypatch.setattr(Channel, "share", lambda self, work: asked.append(work))

    def validate(args: Namespace, defaults: dict) -> None:
        raise ValueError("not here")

    job = PlannedJob(Namespace(rank=1, world_size=2), {}, Options(auto=True), validate)
    with pytest.raises(GalvatronError, match="not here"):
        job.validate()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("error", "rank", "said"),
    [
        (AgreedError("all of us"), "0", "galvatron: all of us\n"),
        (AgreedError("all of us"), "1", ""),
        (PlanError("I alone"), "1", "galvatron rank 1: I alone\n"),
    ],
)
def test_errors_of_loading_end_the_job_with_one_line(error, rank, said, monkeypatch, capsys) -> None:
    def load(place: str) -> None:
        raise error

    training = SimpleNamespace(load_checkpoint=load)
    end_in_one_line(training, "load_checkpoint")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        training.load_checkpoint("place")
    assert ended.value.code == 2
    assert capsys.readouterr().err == said


def test_other_errors_of_loading_keep_their_traceback() -> None:
    def load(place: str) -> None:
        raise KeyError(place)

    training = SimpleNamespace(load_checkpoint=load)
    end_in_one_line(training, "load_checkpoint")
    with pytest.raises(KeyError):
        training.load_checkpoint("place")
