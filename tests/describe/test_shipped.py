import pytest

from galvatron_megatron.describe.cluster import read_cluster
from galvatron_megatron.describe.model_file import read_model
from galvatron_megatron.describe.shipped import find_description, shipped_directory
from galvatron_megatron.errors import DescriptionError


def test_a_name_reads_the_shipped_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert read_model("llama2-7b") == read_model(shipped_directory("models") / "llama2-7b.yaml")
    assert read_cluster("a100-80g", nodes=2).nodes == 2


def test_a_file_here_wins_over_a_shipped_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama2-7b").mkdir()
    assert str(find_description("models", "llama2-7b")) == "llama2-7b"


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(DescriptionError, match="did you mean 'a100-80g'"):
        find_description("clusters", "a100-80gb")


def test_a_path_that_does_not_exist_stays_a_path():
    with pytest.raises(DescriptionError, match="nowhere/missing"):
        read_model("nowhere/missing.yaml")
