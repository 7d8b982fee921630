"""``galvatron validate``."""

import json
from pathlib import Path

import pytest

from galvatron_megatron.cli import main
from galvatron_megatron.commands.validate import shipped_table

B200 = str(shipped_table("megatron_b200"))


def test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", B200, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["megatron_b200"]
    assert (document["kind"], document["rows"], document["fitted_rows"]) == ("b200", 16, 5)
    assert document["time"]["mean"] <= document["time"]["percentile_90"] <= document["time"]["worst"]
    assert document["memory"]["rows"] == 13
    assert document["gates"]["time mean"]["passes"]
    assert document["time"]["worst_row"].startswith("llama3_70b")


def test_another_cluster_gives_other_figures(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Path(__file__).parents[2] / "configs" / "clusters" / "h100.yaml"
    assert main(["validate", B200, "--cluster", str(cluster), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["megatron_b200"]
    assert document["time"]["mean"] > 0.1
    assert not document["gates"]["time mean"]["passes"]


def test_tables_and_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", B200]) == 0
    text = capsys.readouterr().out
    assert "megatron_b200" in text and "reached" in text
    assert main(["validate", B200, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# How accurate the cost model is\n")


def test_unknown_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    assert main(["validate", str(path)]) == 2
    error = capsys.readouterr().err
    assert "columns of no known kind" in error and error.count("\n") == 1
