import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
finders = [type(finder).__name__ for finder in sys.meta_path]
print(__name__, sys.argv[1:], sys.path[0], finders.count("Watch"))
"""


def run(*words: str, options: tuple[str, ...] = ("-S",)) -> subprocess.CompletedProcess:
    """Runs the package as a module in a Python that runs no start-up hooks."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *options, "-m", "galvatron_megatron", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_script_runs_as_if_python_had_started_it(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run(str(script), "--lr", "1", "--galvatron-auto")
    assert done.stderr == ""
    assert done.stdout.split("\n")[0] == f"__main__ ['--lr', '1', '--galvatron-auto'] {tmp_path} 2"


def test_a_missing_script_is_named_in_one_line():
    done = run("nowhere.py", "--galvatron-auto")
    assert done.returncode == 2
    assert done.stderr == "galvatron: script nowhere.py: no such file; valid: a Megatron training script\n"


def test_other_words_go_to_the_command_line():
    done = run("--version", options=())
    assert done.returncode == 0 and done.stdout.startswith("galvatron_megatron ")
