import os
import subprocess
import sys
from pathlib import Path

import pytest

from galvatron_megatron.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serch"], "galvatron: unknown command 'serch'; did you mean 'search'?"),
        (["--verzion"], "galvatron: unrecognized arguments: --verzion; did you mean '--version'? (see"),
        (
            ["export", "p.yaml", "--modle=x"],
            "galvatron export: unrecognized arguments: --modle=x; did you mean",
        ),
        (["validate", "--folds", "3"], "galvatron validate: unrecognized arguments: --folds"),
        (["calibrate", "--cluster", "h100"], "galvatron calibrate: the following arguments are required: RUNS"),
    ],
)
def test_a_wrong_word_ends_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_a_path_that_the_system_refuses_ends_in_one_line(capsys):
    assert main(["export", "p" * 5000]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "File name too long; valid: a path" in error and len(error) < 250
    words = ["search", "--model", "gpt3-125m", "--cluster", "h100", "--global-batch-size", "8"]
    assert main([*words, "--output", "p" * 5000 + ".yaml"]) == 2
    assert "cannot be written (File name too long)" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert f"galvatron {command}" in shown and "--" in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device without space")
def test_a_full_disk_behind_the_output_ends_in_one_line():
    words = [sys.executable, "-m", "galvatron_megatron", "export", "llama2-7b-16-ranks"]
    with open("/dev/full", "w") as full:  # noqa: PTH123 a device
        found = subprocess.run(
            words, stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ, timeout=60
        )
    assert found.returncode == 2
    assert found.stderr == "galvatron export: output cannot be written (No space left on device)\n"
