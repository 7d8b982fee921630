"""Megatron's training loop on CPU ranks: parallel layouts of one model train alike."""

import shlex

import pytest
from jobs import SIZES, SMALL, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.jobs]

FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def losses(world_size: int, words: str) -> dict[int, float]:
    job = run_ranks(world_size, [str(SMALL), *SIZES, "--micro-batch-size", "2", *shlex.split(words)])
    assert job.codes == [0] * world_size, job.text[-3000:]
    assert len(job.losses) == 10
    return job.losses


def test_tensor_and_sequence_parallelism_with_recomputation_equal_one_rank():
    one = losses(1, "")
    both = f"--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer {FULL}"
    assert losses(2, both) == pytest.approx(one, abs=1e-5)
    assert one[10] < one[1] - 0.1


def test_interleaved_pipelines_with_data_parallel_ranks_equal_one_without():
    # A pipeline's ranks draw other initial weights than one rank does: compare two pipelines.
    interleaved = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    plain = losses(2, interleaved)
    assert losses(4, f"{interleaved} --use-distributed-optimizer {FULL}") == pytest.approx(plain, abs=1e-5)
    assert plain[10] < plain[1] - 0.1
