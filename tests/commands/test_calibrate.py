"""``galvatron calibrate``."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from galvatron_megatron.cli import main
from galvatron_megatron.commands.validate import shipped_table
from galvatron_megatron.cost.validation import shipped_test_bed
from galvatron_megatron.describe.cluster import cluster_document, read_cluster

L4 = str(shipped_table("heterogeneous_plans"))


@pytest.fixture
def start(tmp_path: Path) -> Path:
    bed = shipped_test_bed("mist-l4")
    path = tmp_path / "start.yaml"
    path.write_text(cluster_document(replace(bed, constants=replace(bed.constants, gemm_efficiency=0.9))))
    return path


def test_writes_a_better_cluster(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = tmp_path / "fitted.yaml"
    assert main(["calibrate", L4, "--cluster", str(start), "--output", str(fitted), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["runs"] == 4
    assert document["constants"]["constants.gemm_efficiency"]["after"] < 0.8
    assert read_cluster(fitted).calibration.runs == 4
    errors = []
    for cluster in (start, fitted):
        assert main(["validate", L4, "--cluster", str(cluster), "--json"]) == 0
        errors.append(json.loads(capsys.readouterr().out)["heterogeneous_plans"]["time"]["mean"])
    assert errors[1] < 0.06 < errors[0]


def test_all_rows_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b200.yaml"
    path.write_text(cluster_document(shipped_test_bed("simumax-b200")))
    table = str(shipped_table("megatron_b200"))
    assert main(["calibrate", table, "--cluster", str(path), "--all-rows", "--folds", "2"]) == 0
    text = capsys.readouterr().out
    assert "fitted on 16 runs" in text
    assert "2-fold cross-validation" in text
    assert "held-out" not in text


def test_memory_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "golden.yaml"
    bed = shipped_test_bed("golden")
    path.write_text(cluster_document(replace(bed, constants=replace(bed.constants, workspace_mib=0.0))))
    table = str(shipped_table("megatron_golden_memory"))
    assert main(["calibrate", table, "--cluster", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["constants"]["constants.workspace_mib"]["after"] == bed.constants.workspace_mib


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (["--folds", "1"], "--folds: 1"),
        (["--output", "/none/c.yaml"], "--output /none/c.yaml: directory /none does not exist"),
        (["--output", "c.txt"], "--output c.txt: unknown kind of file; valid: a name that ends with .yaml"),
        ([], "none.csv: does not exist"),
    ],
)
def test_bad_requests(
    flag: list[str], words: str, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = L4 if flag else str(tmp_path / "none.csv")
    assert main(["calibrate", table, "--cluster", str(start), *flag]) == 2
    assert words in capsys.readouterr().err
