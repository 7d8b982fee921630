"""Hetu-Galvatron's profiles in the store: whole, checked, put together, and refused in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest

from galvatron_megatron.describe.galvatron_files import HARDWARE, MODEL, read_galvatron_directory
from galvatron_megatron.describe.galvatron_store import (
    find_import,
    galvatron_files,
    import_directories,
    import_from_file,
    import_json,
    list_imports,
    write_import,
)
from galvatron_megatron.describe.galvatron_tables import galvatron_profile, read_galvatron_profile
from galvatron_megatron.errors import DescriptionError

DATA = Path(__file__).parent.parent / "data" / "galvatron_a100_8gpu"
TIMES = "computation_profiling_bf16_llama2-7b_all.json"


def part(directory: Path, *patterns: str) -> Path:
    """The files of some patterns alone, as the tree of Hetu-Galvatron keeps machines and models apart."""
    directory.mkdir(parents=True)
    for pattern in patterns:
        for path in DATA.glob(pattern):
            shutil.copy2(path, directory)
    return directory


def edited(directory: Path, name: str, **changes: object) -> Path:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_a_directory_is_one_file_of_the_store_and_comes_back_equal(tmp_path):
    (entry,) = import_directories([DATA])
    path = write_import(tmp_path, entry)
    assert path.name == f"galvatron-{entry.fingerprint()}.json"
    assert find_import(tmp_path, entry.fingerprint()[:5]).fingerprint() == entry.fingerprint()
    assert list_imports(tmp_path)[0].sources == (str(DATA),)
    assert entry.changed <= entry.imported
    wanted = read_galvatron_profile(DATA, seq_length=2048, world_size=8)
    for files in (galvatron_files(entry.fingerprint()[:5], tmp_path), galvatron_files(str(path), tmp_path)):
        assert galvatron_profile(files, seq_length=2048, world_size=8) == wanted
    # The same tables again are the same profile.
    write_import(tmp_path, import_directories([DATA])[0])
    assert len(list(tmp_path.glob("galvatron-*.json"))) == 1


def test_machine_and_model_go_together_whenever_they_are_imported(tmp_path):
    machine, model = part(tmp_path / "machine", *HARDWARE), part(tmp_path / "model", *MODEL)
    (whole,) = import_directories([machine, model])
    assert whole.fingerprint() == import_directories([DATA])[0].fingerprint()
    halves = [import_directories([directory])[0] for directory in (machine, model)]
    assert [(half.has_machine, half.model) for half in halves] == [(True, ""), (False, "bf16_llama2-7b_all")]
    merged = halves[0].files.merged(halves[1].files)
    assert merged.documents == whole.files.documents
    with pytest.raises(
        DescriptionError, match=r"no computation_profiling_.*valid: profiles of a machine and of"
    ):
        galvatron_profile(halves[0].files, seq_length=2048, world_size=8)


def test_every_model_of_a_directory_is_a_profile_of_its_own(tmp_path):
    directory = part(tmp_path / "all", *HARDWARE, *MODEL)
    for kind in ("computation", "memory"):
        shutil.copy(
            directory / f"{kind}_profiling_bf16_llama2-7b_all.json",
            directory / f"{kind}_profiling_bf16_other_all.json",
        )
    found = import_directories([directory])
    assert [entry.model for entry in found] == ["bf16_llama2-7b_all", "bf16_other_all"]
    assert all(entry.has_machine for entry in found)
    with pytest.raises(DescriptionError, match=r"several models \(bf16_llama2-7b_all, bf16_other_all\)"):
        read_galvatron_profile(directory, seq_length=2048, world_size=8)


@pytest.mark.parametrize("missing", [*HARDWARE, *MODEL])
def test_what_a_partial_directory_lacks_is_named(tmp_path, missing):
    directory = part(tmp_path / "all", *(pattern for pattern in (*HARDWARE, *MODEL) if pattern != missing))
    with pytest.raises(DescriptionError, match="is partial, no ") as caught:
        import_directories([directory])
    assert f"no {missing}; valid: " in str(caught.value) and "\n" not in str(caught.value)


def test_damage_anywhere_is_named_in_one_line(tmp_path):
    directory = part(tmp_path / "all", *HARDWARE, *MODEL)
    overlap, machine = directory / "overlap_coefficient.json", "p2p_bandwidth_2nodes_8gpus_per_node.json"
    before = overlap.read_text()
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "holds list"),
        ('{"overlap_coe": -1}', "overlap_coe: -1"),
    ):
        overlap.write_text(text)
        with pytest.raises(DescriptionError, match=message):
            import_directories([directory])
    overlap.write_text(before)
    # A machine that no search has asked for yet is checked too.
    with pytest.raises(DescriptionError, match="pp_size_4"):
        import_directories([edited(directory, machine, pp_size_4="fast")])
    (directory / machine).unlink()
    with pytest.raises(DescriptionError, match="no p2p_bandwidth file for 16 devices; valid: 4, 8"):
        import_directories([directory])
    shutil.copy(DATA / machine, directory)
    with pytest.raises(DescriptionError, match="has no sequence length 4096; valid: 2048"):
        import_directories([edited(directory, TIMES, layertype_0_bsz1_seq4096=1.0)])


def test_contradictions_and_other_directories_are_refused(tmp_path):
    machine = part(tmp_path / "tree" / "machine", *HARDWARE)
    other = edited(part(tmp_path / "other", *HARDWARE), "overlap_coefficient.json", overlap_coe=1.5)
    with pytest.raises(DescriptionError, match=r"overlap_coefficient.json: .* differ in it"):
        import_directories([machine, other])
    with pytest.raises(DescriptionError, match=f"valid: below it: {machine}"):
        read_galvatron_directory(tmp_path / "tree")
    raw = part(tmp_path / "raw", "*_seqlen2048_all.json")
    with pytest.raises(DescriptionError, match="only raw measurements"):
        read_galvatron_directory(raw)
    two = part(tmp_path / "two", *HARDWARE, *MODEL)
    for prefix in ("allreduce_bandwidth", "p2p_bandwidth"):
        name = f"{prefix}_{{}}_per_node.json"
        shutil.copy(two / name.format("1nodes_8gpus"), two / name.format("2nodes_4gpus"))
    with pytest.raises(DescriptionError, match="are all of 8 devices"):
        read_galvatron_profile(two, seq_length=2048, world_size=8)
    files = read_galvatron_directory(two)
    assert galvatron_profile(files, seq_length=2048, world_size=8, nodes=1).world_size == 8


@pytest.mark.parametrize("damage", ["half", "other", "format", "kind", "value"])
def test_a_damaged_file_of_the_store_is_named_and_not_used(tmp_path, damage):
    (entry,) = import_directories([DATA])
    path = write_import(tmp_path, entry)
    text = path.read_text()
    content = json.loads(text)
    name = "overlap_coefficient.json"
    path.write_text(
        {
            "half": text[: len(text) // 2],
            "other": text.replace("1.125552573612729", "1.2"),
            "format": json.dumps(content | {"schema_version": 2}),
            "kind": json.dumps(content | {"files": {name: []}}),
            "value": text.replace("1.125552573612729", "NaN"),
        }[damage]
    )
    with pytest.raises(DescriptionError) as caught:
        find_import(tmp_path, entry.fingerprint())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "; valid: " in str(caught.value)
    assert list_imports(tmp_path) == []


def test_a_fingerprint_that_is_not_stored_is_named(tmp_path):
    with pytest.raises(DescriptionError, match=r"abc is not stored in .*; valid: galvatron profile import DIR"):
        galvatron_files("abc", tmp_path)
    with pytest.raises(DescriptionError, match="no such directory"):
        galvatron_files("/nonexistent", tmp_path)
    (entry,) = import_directories([DATA])
    write_import(tmp_path, entry)
    with pytest.raises(DescriptionError, match=f"did you mean|valid: {entry.fingerprint()}"):
        galvatron_files("f" * 16, tmp_path)
    os.link(tmp_path / f"galvatron-{entry.fingerprint()}.json", tmp_path / "galvatron-60ffffffffffffff.json")
    with pytest.raises(DescriptionError, match=r"60 is ambiguous; valid: 60f2.*, 60ff"):
        galvatron_files("60", tmp_path)
    assert import_from_file(tmp_path / f"galvatron-{entry.fingerprint()}.json") is not None
    assert json.loads(import_json(entry))["files"] == entry.files.documents
