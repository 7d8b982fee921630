"""A job that goes on from a universal checkpoint goes on from its own when it is started again."""

import contextlib
import io
import queue
import runpy
import shutil
import sys

import pytest
from jobs import SIZES, SMALL, Job
from runtime_cases import case

pytestmark = pytest.mark.distributed
HALFWAY, SAVED, LAST = 3, 4, 7
MODEL = {
    "hidden-size": 64,
    "seq-length": 64,
    "max-position-embeddings": 64,
    "vocab-size": 255,
    "make-vocab-size-divisible-by": 128,
    "ffn-hidden-size": 256,
    "adam-eps": 1e-8,
}
PLAN = (
    "{schema_version: 1, pp: 1, micro_batch_size: 4, micro_batches: 2, base: {tp: 1, dp: 1}, stages: [["
    "{count: 1, kind: block, tp: 1, dp: 1, zero: 3}, {count: 3, kind: block, tp: 1, dp: 1, zero: 1}]]}"
)


def on_engine(rank, world_size, made, folder):
    from universal_engine import train_engine

    return train_engine(rank, world_size, made, folder, HALFWAY, HALFWAY)


def on_script(rank, world_size, words):
    """The script in a process that has imported what it needs, and nothing else happened in."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import arguments as module

    from galvatron_megatron.integration import arguments

    # A process that was forked here may not start one of its own to serve the queue.
    filesystem_async._results_queue = queue.Queue()
    arguments.attach(module)
    sys.argv = words
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return code, said.getvalue()


def start(ranks, words):
    """The command line, in processes of its own."""
    ranks(1).close()
    codes, outputs = zip(*ranks(1).run(on_script, words), strict=True)
    ranks(1).close()
    return Job(codes=list(codes), outputs=list(outputs))


def test_the_same_command_line_goes_on_from_the_jobs_own_checkpoint(ranks, tmp_path):
    source, own, plan = tmp_path / "engine", tmp_path / "own", tmp_path / "plan.yaml"
    made = case("engine", "classic", "tp1 zero2", ["tp1 zero2"] * 4, arguments=MODEL)
    ranks(1).run(on_engine, made, str(source))
    plan.write_text(PLAN)
    words = [str(SMALL), *SIZES, "--train-iters", str(LAST), "--galvatron-plan", str(plan)]
    words += ["--galvatron-load-universal", str(source), "--load", str(own), "--save", str(own)]
    words += ["--save-interval", "2", "--exit-on-missing-checkpoint"]
    first = start(ranks, words)
    assert first.codes == [0], first.text[-3000:]
    assert f"goes on behind iteration {HALFWAY} and sample {8 * HALFWAY}" in first.text
    assert list(first.losses) == list(range(HALFWAY + 1, LAST + 1))
    # As if it had ended before it saved for the second time.
    for step in (SAVED + 2, LAST):
        shutil.rmtree(own / f"iter_{step:07d}")
    (own / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    again = start(ranks, words)
    assert again.codes == [0], again.text[-3000:]
    assert "holds a checkpoint; the universal one is not read again" in again.text
    assert list(again.losses) == list(range(SAVED + 1, LAST + 1))
    # Megatron logs the first two iterations of a job as their mean, with the second one.
    expected = {step: loss for step, loss in first.losses.items() if step > SAVED}
    expected[SAVED + 1] = 2 * first.losses[SAVED + 1] - first.losses[SAVED]
    expected[SAVED + 2] = (expected[SAVED + 1] + expected[SAVED + 2]) / 2
    assert again.losses == pytest.approx(expected, abs=1e-5)
    for file in (own / f"iter_{LAST:07d}").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])
    damaged = start(ranks, words)
    assert damaged.codes == [2] and damaged.losses == {}
    (line,) = (line for line in damaged.errors if "; valid: " in line)
    assert " bytes; valid: a complete checkpoint" in line and "Traceback" not in damaged.text
