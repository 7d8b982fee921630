import json
from pathlib import Path

import pytest

from galvatron_megatron.describe.galvatron_files import (
    galvatron_config,
    read_galvatron_config,
    read_galvatron_profile,
    write_galvatron_config,
)
from galvatron_megatron.errors import DescriptionError, PlanError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel

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


def test_reads_a_strategy_file():
    plan = read_galvatron_config(CONFIG, world_size=8)
    assert (plan.pp, plan.micro_batches, plan.global_batch_size, len(plan.layers)) == (1, 1, 16, 32)
    assert {layer.strategy.zero for layer in plan.layers} == {3}
    assert sum(layer.strategy.recompute is Recompute.FULL for layer in plan.layers) == 20
    assert plan.base.tp == 2 and plan.base.sequence_parallel is SequenceParallel.ULYSSES


@pytest.mark.parametrize("key", ["embed_sdp", "vocab_sdp"])
def test_writes_what_it_reads_in_both_spellings(tmp_path, key):
    wanted = json.loads(CONFIG.read_text())
    wanted[key] = wanted.pop("embed_sdp")
    source = tmp_path / "source.json"
    source.write_text(json.dumps(wanted))
    plan = read_galvatron_config(source, world_size=8)
    write_galvatron_config(plan, tmp_path / "out.json", sharded_vocabulary_key=key)
    assert json.loads((tmp_path / "out.json").read_text()) == wanted
    assert read_galvatron_config(tmp_path / "out.json", world_size=8) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_bsz": 97}, "valid: 96"),
        ({"pp_division": "31"}, "pp_division"),
        ({"tp_sizes_enc": "3"}, "tp_sizes_enc|dp_types_enc"),
        ({"default_dp_type": "zero9"}, "default_dp_type"),
        ({"chunks": 0}, "chunks"),
    ],
)
def test_bad_strategy_files_are_refused(tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**json.loads(CONFIG.read_text()), **change}))
    with pytest.raises(PlanError, match=message):
        read_galvatron_config(path, world_size=8)


def test_what_it_has_no_word_for_is_refused():
    from dataclasses import replace

    plan = read_galvatron_config(CONFIG, world_size=8)
    stage = plan.stages[0]
    first = replace(stage.layers[0], strategy=replace(stage.layers[0].strategy, zero=1))
    mixed = replace(plan, stages=(replace(stage, layers=(first, *stage.layers[1:])),))
    with pytest.raises(PlanError, match="only 0 or only 2"):
        galvatron_config(mixed)
