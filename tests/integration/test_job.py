"""Where a planned job goes on from."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from galvatron_megatron.errors import PlanError
from galvatron_megatron.integration.job import universal_to_read


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
