"""Hetu-Galvatron's strategy files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from galvatron_megatron.describe.galvatron_config import (
    galvatron_config,
    read_galvatron_config,
    write_galvatron_config,
)
from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel

DATA = Path(__file__).parent.parent / "data" / "galvatron_a100_8gpu"
CONFIG = DATA / "galvatron_config_llama2-7b_1nodes_8gpus_per_node_36GB_bf16.json"


def every_layer(value: int) -> str:
    return ",".join([str(value)] * 32)


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
    assert plan.base.zero == 3
    write_galvatron_config(plan, tmp_path / "out.json")
    # One program writes embed_sdp and another reads vocab_sdp.
    assert json.loads((tmp_path / "out.json").read_text()) == {**wanted, "embed_sdp": 1, "vocab_sdp": 1}
    assert read_galvatron_config(tmp_path / "out.json", world_size=8) == plan


def test_only_what_its_runtime_demands_must_be_there(tmp_path):
    document = json.loads(CONFIG.read_text())
    for key in ("pp_division", "checkpoint", "use_sp", "pipeline_type", "vtp", "vsp", "embed_sdp"):
        del document[key]
    document |= {"pp_deg": 3, "chunks": 2}
    path = tmp_path / "short.json"
    path.write_text(json.dumps(document))
    plan = read_galvatron_config(path, world_size=24)
    assert [len(stage.layers) for stage in plan.stages] == [10, 10, 12]
    assert plan.base.zero == 2 and plan.base.tp == 1
    assert {layer.strategy.recompute for layer in plan.layers} == {Recompute.NONE}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_bsz": 97}, "valid: 96"),
        ({"pp_division": "31"}, "pp_division"),
        ({"tp_sizes_enc": "3"}, "tp_sizes_enc|dp_types_enc"),
        ({"default_dp_type": "zero9"}, "default_dp_type"),
        ({"chunks": 0}, "chunks"),
        ({"vocab_sdp": 0}, "contradict"),
        (
            {"tp_sizes_enc": ",".join(["2"] * 32), "tp_consecutive_flags": ",".join(["0"] * 32)},
            "layer 0: tp_con",
        ),
        ({"ep_sizes_enc": ",".join(["2"] * 32)}, "no expert parallelism"),
    ],
)
def test_bad_strategy_files_are_refused(tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**json.loads(CONFIG.read_text()), **change}))
    with pytest.raises(PlanError, match=message):
        read_galvatron_config(path, world_size=8)


def test_what_it_has_no_word_for_is_refused():
    plan = read_galvatron_config(CONFIG, world_size=8)
    stage = plan.stages[0]
    first = replace(stage.layers[0], strategy=replace(stage.layers[0].strategy, zero=1))
    mixed = replace(plan, stages=(replace(stage, layers=(first, *stage.layers[1:])),))
    with pytest.raises(PlanError, match="only 0 or only 2"):
        galvatron_config(mixed)
