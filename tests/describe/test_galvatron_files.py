import json
from pathlib import Path

import pytest

from galvatron_megatron.describe.galvatron_tables import (
    read_galvatron_profile,
)
from galvatron_megatron.errors import DescriptionError

DATA = Path(__file__).parent.parent / "data" / "galvatron_a100_8gpu"
CONFIG = DATA / "galvatron_config_llama2-7b_1nodes_8gpus_per_node_36GB_bf16.json"


def copy(directory: Path, **changes) -> Path:
    for path in DATA.glob("*.json"):
        text = path.read_text()
        for name, change in changes.items():
            if path.name.startswith(name):
                text = json.dumps(change(json.loads(text)))
        (directory / path.name).write_text(text)
    return directory


def test_reads_the_measured_tables():
    profile = read_galvatron_profile(DATA, seq_length=2048, world_size=8)
    assert profile.layer_ms[8] == pytest.approx(3.9369729995727534)
    assert profile.parameter_mb == pytest.approx(778.2236328125)
    assert profile.activation_mb[4] == pytest.approx(136.885498046875)
    assert profile.all_reduce_gb_per_second[2, False] == pytest.approx(151.344)
    assert profile.send_gb_per_second[8] == pytest.approx(109.45)
    assert profile.all_to_all_ms[8][64] == pytest.approx(0.3997)


def test_reads_the_main_branch_spelling(tmp_path):
    def rename(document):
        return {key.removesuffix("_sp"): value for key, value in document.items()}

    directory = copy(tmp_path, memory_profiling=rename)
    assert read_galvatron_profile(directory, seq_length=2048, world_size=8) == read_galvatron_profile(
        DATA, seq_length=2048, world_size=8
    )


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("overlap", lambda d: {}, "overlap_coe"),
        (
            "allreduce_bandwidth_1nodes_8",
            lambda d: {**d, "allreduce_size_8_consec_1": -1},
            "allreduce_size_8_consec_1",
        ),
        ("allreduce_bandwidth_1nodes_8", lambda d: {**d, "allreduce_size_8_consec_1": float("nan")}, "finite"),
        ("computation", lambda d: {k: v for k, v in d.items() if "layertype_0" not in k}, "layertype_0_bsz"),
    ],
)
def test_bad_tables_are_named(tmp_path, file, change, message):
    with pytest.raises(DescriptionError, match=message):
        read_galvatron_profile(copy(tmp_path, **{file: change}), seq_length=2048, world_size=8)


def test_unmeasured_sizes_are_named():
    with pytest.raises(DescriptionError, match="seq8192"):
        read_galvatron_profile(DATA, seq_length=8192, world_size=8)
    with pytest.raises(DescriptionError, match="for 32 devices; valid: 4, 8, 16"):
        read_galvatron_profile(DATA, seq_length=2048, world_size=32)
