"""Tables of measured runs: recognised, read, refused."""

from pathlib import Path

import pytest

from galvatron_megatron.commands.validate import SHIPPED, shipped_table
from galvatron_megatron.cost.records.tables import fitting_rows, read_table
from galvatron_megatron.cost.records.values import even_split
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel

VTRAIN = "gpus,global_batch,micro_batch,hidden,heads,layers,seq,tp,dp,pp,iter_ms\n"


@pytest.mark.parametrize(
    ("name", "kind", "rows"),
    [
        ("vtrain_a100_multi", "vtrain", 62),
        ("vtrain_a100_single", "vtrain", 707),
        ("megatron_papers", "papers", 8),
        ("megatron_b200", "b200", 16),
        ("megatron_golden_memory", "golden", 364),
        ("heterogeneous_plans", "heterogeneous", 14),
    ],
)
def test_every_row_is_read_or_has_a_reason(name: str, kind: str, rows: int) -> None:
    table = read_table(shipped_table(name))
    assert table.kind == kind
    assert len(table.runs) + len(table.unread) == rows
    assert all(row.reason for row in table.unread)
    assert {run.row for run in table.runs}.isdisjoint({row.row for row in table.unread})
    assert name in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_at_most_a_third_is_fitted(name: str) -> None:
    runs = read_table(shipped_table(name)).runs
    chosen = fitting_rows(runs)
    assert 0 < len(chosen) <= len(runs) / 3
    assert chosen == fitting_rows(reversed(runs))
    assert not chosen & {run.row for run in runs if run.doubt}


def test_a_vtrain_row() -> None:
    run = next(run for run in read_table(shipped_table("vtrain_a100_multi")).runs if run.row == 1)
    assert (run.nodes, run.step_seconds) == (32, pytest.approx(9.6036))
    assert run.plan.global_batch_size == 1024
    assert run.plan.micro_batches == 4
    assert run.plan.layers[0].strategy.recompute is Recompute.FULL
    # 18.4 billion parameters.
    hidden = run.model.hidden_size
    assert len(run.model.layers) * 12 * hidden**2 + 51200 * hidden == pytest.approx(18.4e9, rel=0.01)


def test_a_b200_row() -> None:
    runs = read_table(shipped_table("megatron_b200")).runs
    run = next(run for run in runs if "tp2_cp4" in run.label and "131072" in run.label)
    only = run.plan.layers[0].strategy
    assert (only.tp, only.cp, only.dp, only.zero) == (2, 4, 1, 1)
    assert only.sequence_parallel is SequenceParallel.MEGATRON
    assert run.model.seq_length == 131072
    piped = next(run for run in runs if "pp2" in run.label)
    assert [stage for stage, _ in piped.peak_bytes] == [0, 1]
    assert piped.peak_bytes[0][1] == pytest.approx(66.55 * 2**30)


def test_an_operator_plan() -> None:
    run = read_table(shipped_table("heterogeneous_plans")).runs[0]
    assert run.plan.world_size == 16
    assert run.plan.stages[-1].first + run.plan.stages[-1].count == 40 * 13 + 3
    assert run.plan.stages[-1].recomputed == 0


def test_even_split() -> None:
    assert even_split(10, 4) == (3, 3, 2, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "columns of no known kind"),
        (VTRAIN, "no rows"),
    ],
)
def test_unusable_tables(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(DescriptionError, match=words):
        read_table(path)


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DescriptionError, match="No such file"):
        read_table(tmp_path / "none.csv")


def test_bad_rows_are_kept_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    good = "2,16,8,1024,16,24,1024,1,1,2,372.1\n"
    path.write_text(VTRAIN + good + good.replace("372.1", "soon") + good.replace("2,16", "3,16"))
    table = read_table(path)
    assert [run.row for run in table.runs] == [1]
    assert "row 2 column iter_ms: 'soon'; valid: a number" in table.unread[0].reason
    assert "tp 1 x dp 1 x pp 2 on 3 devices" in table.unread[1].reason


def test_a_golden_row_with_experts() -> None:
    runs = {run.row: run for run in read_table(shipped_table("megatron_golden_memory")).runs}
    run = runs[350]
    experts = run.model.layers[0].experts
    assert (experts.count, experts.top_k, experts.ffn_hidden_size) == (8, 2, 1024)
    assert (experts.shared_ffn_hidden_size, experts.dispatcher) == (512, "alltoall")
    strategy = run.plan.layers[0].strategy
    assert (strategy.tp, strategy.dp, strategy.expert_parallel, strategy.expert_shards) == (4, 1, 2, 2)
    assert runs[303].options.optimizer_instances == 2
    assert runs[303].model.layers[0].experts.dispatcher == "allgather"
