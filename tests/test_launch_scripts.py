"""The starters in launch/: the commands they make, and what they say where something is missing."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SHOW = """import os
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
print("SAW", *(os.environ.get(name) for name in names), flush=True)
"""


def run(
    script: str, *words: str, cwd: Path | None = None, **settings: str | None
) -> subprocess.CompletedProcess:
    """Runs a starter with this test's interpreter and no settings of the job that the test itself is.

    Args:
        script: in launch/.
        words: its arguments.
        cwd: directory to run it in.
        settings: environment; None takes a variable out of it.
    """
    foreign = ("SLURM_", "PBS_", "MASTER_", "NODE_RANK", "NNODES", "HOSTFILE", "RANK", "WORLD_SIZE", "LOCAL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    kept |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words],
        env={name: value for name, value in (kept | settings).items() if value is not None},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "script", sorted(LAUNCH.glob("*.sh")) + sorted(LAUNCH.glob("*.sbatch")), ids=lambda p: p.name
)
def test_bash_can_read_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("script", "words", "settings", "message"),
    [
        ("torchrun.sh", [], {}, "launch/torchrun.sh pretrain_gpt.py"),
        ("deepspeed.sh", [], {}, "launch/deepspeed.sh pretrain_gpt.py"),
        ("deepspeed.sh", ["x.py"], {"HOSTFILE": "/nowhere"}, "HOSTFILE: /nowhere cannot be read"),
        ("deepspeed.sh", ["x.py"], {"NODE_RANK": "1"}, "NODE_RANK: 1 without HOSTFILE"),
        (
            "deepspeed.sh",
            ["x.py"],
            {"CUDA_VISIBLE_DEVICES": "2,3", "RANKS_PER_NODE": "3"},
            "RANKS_PER_NODE: 3, but CUDA_VISIBLE_DEVICES=2,3; valid: 1 to 2",
        ),
        (
            "torchrun.sh",
            ["x.py"],
            {"CUDA_VISIBLE_DEVICES": "GPU-12ab,GPU-34cd", "RANKS_PER_NODE": "3"},
            "RANKS_PER_NODE: 3, but CUDA_VISIBLE_DEVICES=GPU-12ab,GPU-34cd; valid: 1 to 2",
        ),
        ("torchrun.sh", ["x.py"], {"RANKS_PER_NODE": "all"}, "RANKS_PER_NODE: all; valid: a number from 1"),
        ("torchrun.sh", ["x.py"], {"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK: not set for NNODES=2"),
        ("torchrun.sh", ["x.py"], {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: not set for NNODES=2"),
        (
            "deepspeed.sh",
            ["x.py"],
            {"HOSTFILE": "/dev/null", "RANKS_PER_NODE": "3"},
            "RANKS_PER_NODE: 3 beside HOSTFILE",
        ),
        ("deepspeed.sh", ["x.py"], {"CUDA_VISIBLE_DEVICES": "GPU-12ab"}, "takes numbers alone"),
        ("deepspeed.sh", ["x.py"], {"CUDA_VISIBLE_DEVICES": "2,,3"}, "takes numbers alone"),
        (
            "deepspeed.sh",
            ["x.py"],
            {"CUDA_VISIBLE_DEVICES": "2,3", "HOSTFILE": "/dev/null"},
            "CUDA_VISIBLE_DEVICES: 2,3 beside HOSTFILE",
        ),
        ("slurm.sbatch", ["x.py"], {}, "not in a Slurm job"),
        ("slurm.sbatch", [], {"SLURM_JOB_ID": "1"}, "no script"),
        ("pbs.sh", ["x.py"], {}, "not in a PBS job"),
        ("pbs.sh", ["x.py"], {"PBS_NODEFILE": "/nowhere"}, "PBS_NODEFILE: /nowhere cannot be read"),
    ],
)
def test_what_is_missing_is_said(script: str, words: list[str], settings: dict, message: str) -> None:
    done = run(script, *words, **settings)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_deepspeed_commands(tmp_path: Path) -> None:
    words = shlex.split(run("deepspeed.sh", "x.py", "--a", "b c", DRY_RUN="1", RANKS_PER_NODE="3").stdout)
    assert words[words.index("--num_gpus") + 1] == "3" and words[-3:] == ["x.py", "--a", "b c"]
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=1\n")
    settings = {"DRY_RUN": "1", "HOSTFILE": str(hosts), "MASTER_ADDR": "a"}
    words = shlex.split(run("deepspeed.sh", "x.py", NODE_RANK="1", **settings).stdout)
    assert words[words.index("--no_ssh") :][:3] == ["--no_ssh", "--node_rank", "1"]
    assert "--no_ssh" not in run("deepspeed.sh", "x.py", **settings).stdout


def test_devices_given_to_a_job_are_those_it_runs_on(tmp_path: Path) -> None:
    """A stand-in for nvidia-smi lists four; a rank is started for each of the job's two."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0\\nGPU 1\\nGPU 2\\nGPU 3\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    # Nobody said which: all. None, however it is said: ranks on processors.
    for visible, count in ((None, 4), ("", 1), ("-1", 1), ("NoDevFiles", 1)):
        command = run("deepspeed.sh", "x.py", DRY_RUN="1", PATH=path, CUDA_VISIBLE_DEVICES=visible).stdout
        assert f"--num_gpus {count} " in command
        # Else a /job/hostfile would start other nodes.
        assert "--hostfile /dev/null " in command
    for ranks, taken in (("", "2,3"), ("2", "2,3"), ("1", "2")):
        settings = {"DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": "2,3", "RANKS_PER_NODE": ranks, "PATH": path}
        command = run("deepspeed.sh", "x.py", **settings).stdout
        # Without --num_gpus the launcher itself takes the devices that the variable names.
        assert command.startswith(f"CUDA_VISIBLE_DEVICES={taken} ") and "--num_gpus" not in command
    (tmp_path / "show.py").write_text(SHOW)
    done = run("torchrun.sh", str(tmp_path / "show.py"), CUDA_VISIBLE_DEVICES="2,3", PATH=path)
    ranks = sorted(line.split()[:3] for line in done.stdout.splitlines() if line.startswith("SAW"))
    assert ranks == [["SAW", "0", "2"], ["SAW", "1", "2"]], done.stderr


def test_a_hostfile_of_this_node_alone_needs_no_ssh(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW)
    hosts = tmp_path / "hosts"
    hosts.write_text("# this one\nlocalhost slots=2\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = run("deepspeed.sh", str(tmp_path / "show.py"), HOSTFILE=str(hosts), MASTER_PORT=port)
    assert done.returncode == 0 and done.stdout.count("SAW") == 2, done.stderr
    hosts.write_text("elsewhere slots=2\n")
    # The first devices are what its slots mean.
    done = run("deepspeed.sh", "x.py", HOSTFILE=str(hosts), DRY_RUN="1", CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 0 and "--no_ssh" not in done.stdout


def test_slurm_tasks_know_their_ranks(tmp_path: Path) -> None:
    """A stand-in for srun starts the tasks of two uneven nodes as Slurm would, with Slurm's variables."""
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'first\\nsecond\\n'\n")
    (tmp_path / "srun").write_text(
        "#!/bin/bash\n"
        "while [[ $1 == --* ]]; do shift; done\n"
        "export SLURM_NTASKS=3 SLURM_STEP_NUM_TASKS=3 SLURM_STEP_TASKS_PER_NODE='2,1'\n"
        'SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 "$@" || exit\n'
        'SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NODEID=0 "$@" || exit\n'
        'SLURM_PROCID=2 SLURM_LOCALID=0 SLURM_NODEID=1 "$@"\n'
    )
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    settings = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run("slurm.sbatch", str(tmp_path / "show.py"), **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["SAW 0 3 0 2 first", "SAW 1 3 1 2 first", "SAW 2 3 0 1 first"]
    shown = run("slurm.sbatch", "x.py", DRY_RUN="1", **settings).stdout.splitlines()
    assert shown[0] == "MASTER_ADDR=first MASTER_PORT=20007" and shown[1].startswith("srun ")


def test_pbs_starts_torchrun_on_every_node(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("a\na\nb\nb\n")
    settings = {"PBS_NODEFILE": str(nodes), "PBS_JOBID": "123.server", "DRY_RUN": "1", "RANKS_PER_NODE": "2"}
    first, second = run("pbs.sh", "x.py", "--a", "b c", cwd=tmp_path, **settings).stdout.splitlines()
    words = shlex.split(second)
    assert words[:5] == ["pbsdsh", "-o", "-n", "2", "--"] and shlex.split(first)[3] == "0"
    inner = shlex.split(words[-1])
    assert {"NNODES=2", "NODE_RANK=1", "MASTER_ADDR=a", "MASTER_PORT=20123", "RANKS_PER_NODE=2"} <= set(inner)
    assert inner[:2] == ["cd", str(tmp_path)] and inner[-3:] == ["x.py", "--a", "b c"]
    first, _ = run("pbs.sh", "x.py", REMOTE="ssh", **settings).stdout.splitlines()
    assert first.startswith("ssh -o BatchMode=yes a ")


def test_pbs_runs_on_one_node(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "nodes").write_text("localhost\n")
    done = run(
        "pbs.sh",
        "show.py",
        cwd=tmp_path,
        PBS_NODEFILE=str(tmp_path / "nodes"),
        PBS_JOBID="5",
        RANKS_PER_NODE="1",
    )
    assert done.returncode == 0 and "SAW 0 1 0 1" in done.stdout, done.stderr[-2000:]


def test_deepspeed_runs_on_one_node(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW)
    done = run("deepspeed.sh", str(tmp_path / "show.py"), RANKS_PER_NODE="1")
    assert done.returncode == 0 and "SAW 0 1 0 None 127.0.0.1" in done.stdout, done.stderr[-2000:]
