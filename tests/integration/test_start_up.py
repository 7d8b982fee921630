import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from galvatron_megatron.integration.start_up import TARGET, Watch, is_launcher

ROOT = Path(__file__).parents[2]

LOOK = textwrap.dedent("""
    import sys
    packages = ("galvatron_megatron", "megatron", "torch")
    own = sorted(name for name in sys.modules if name.split(".")[0] in packages)
    watches = [type(finder).__name__ for finder in sys.meta_path if type(finder).__name__ == "Watch"]
    print(own, watches)
""")


def build_wheel(kind: str, place: Path) -> Path:
    """Builds a wheel of the repository as pip would, away from its working tree."""
    source = place / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("galvatron_megatron", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = place / "wheel"
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=["build_wheel", "build_editable"])
def site_directory(request, tmp_path_factory):
    """A site directory with the package installed in it, in the ordinary and in the editable way."""
    place = tmp_path_factory.mktemp(request.param)
    site = place / "site"
    with zipfile.ZipFile(build_wheel(request.param, place)) as wheel:
        wheel.extractall(site)
    return site


def run(site: Path, *words: str) -> str:
    """Runs LOOK in a Python that has only this site directory, and gives what it printed."""
    script = site.parent / "look.py"
    script.write_text(LOOK)
    start = (
        f"import sys; sys.argv = {[str(script), *words]!r}; import site; site.addsitedir({str(site)!r}); "
        f"exec(open({str(script)!r}).read())"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", start], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_hook_wakes_only_for_its_flags(site_directory):
    assert run(site_directory) == "[] []"
    assert run(site_directory, "--num-layers", "4", "galvatron-auto", "--galvatronic") == "[] []"
    armed = run(site_directory, "--num-layers", "4", "--galvatron-auto")
    # Waiting for Megatron takes the package's own small module and nothing of torch or Megatron.
    assert (
        armed
        == str(
            ["galvatron_megatron", "galvatron_megatron.integration", "galvatron_megatron.integration.start_up"]
        )
        + " ['Watch', 'Watch']"
    )


@pytest.mark.parametrize(
    ("words", "launcher"),
    [
        (
            ["python", "/venv/bin/torchrun", "--nproc-per-node", "2", "pretrain_gpt.py", "--galvatron-auto"],
            True,
        ),
        (["python", "/venv/bin/deepspeed", "pretrain_gpt.py", "--galvatron-auto"], True),
        (["python", "-m", "torch.distributed.run", "pretrain_gpt.py", "--galvatron-auto"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "pretrain_gpt.py", "--galvatron-auto"], True),
        (["python", "-W", "ignore", "-m", "torch.distributed.run", "x.py"], True),
        (["python", "-u", "pretrain_gpt.py", "--galvatron-auto"], False),
        (["python", "-W", "ignore", "pretrain_gpt.py", "torchrun"], False),
        (["python", "-m", "galvatron_megatron", "pretrain_gpt.py", "--galvatron-auto"], False),
        (["python", "-m"], False),
        (["python"], False),
    ],
)
def test_launchers_are_told_from_ranks(words, launcher):
    assert is_launcher(words) is launcher


def test_watch_waits_for_one_module_and_leaves(tmp_path, monkeypatch):
    (tmp_path / "watched_one.py").write_text("value = 1\n")
    (tmp_path / "watched_other.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    watch = Watch("watched_one", lambda module: seen.append((module.__name__, module.value)))
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    import watched_other  # noqa: F401

    assert seen == [] and watch in sys.meta_path
    import watched_one

    assert seen == [("watched_one", 1)] and watch not in sys.meta_path
    assert type(watched_one.__loader__).__name__ == "SourceFileLoader"
    del sys.modules["watched_one"], sys.modules["watched_other"]


def test_without_a_flag_megatron_stays_as_it_is():
    look = textwrap.dedent(f"""
        import sys
        import {TARGET} as arguments
        assert not [name for name in sys.modules if name.split(".")[0] == "galvatron_megatron"], "imported"
        assert all(
            getattr(arguments, name).__module__ == arguments.__name__
            for name in ("add_megatron_arguments", "parse_args", "validate_args")
        )
        from megatron.training import training
        assert training.training_log.__module__ == training.__name__
        print("untouched")
    """)
    words = [sys.executable, "-W", "ignore", "-c", look, "--num-layers", "4"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "untouched", done.stderr[-2000:]
