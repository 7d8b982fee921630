"""galvatron profile: managing the store, and the errors of measuring."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from profiles import small_model, small_profile

from galvatron_megatron.cli import main
from galvatron_megatron.commands import profile as command
from galvatron_megatron.describe.megatron_args import model_from_arguments, parse_command_line
from galvatron_megatron.describe.megatron_flags_of import flags_of
from galvatron_megatron.describe.profile_store import from_json, read_profile, to_json, write_profile
from galvatron_megatron.errors import DescriptionError, GalvatronError

PROFILE = small_profile(small_model())
GALVATRON = Path(__file__).parent.parent / "data" / "galvatron_a100_8gpu"


def profile(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["profile", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list_and_show(tmp_path, capsys):
    write_profile(tmp_path, PROFILE)
    code, out, _ = profile(capsys, "list", "--directory", tmp_path)
    assert code == 0 and PROFILE.fingerprint() in out and "1 x 4" in out
    code, out, _ = profile(capsys, "list", "--directory", tmp_path, "--json")
    assert json.loads(out) == [PROFILE.fingerprint()]
    for words in (["show"], ["show", PROFILE.fingerprint()], ["show", PROFILE.fingerprint()[:6]]):
        code, out, _ = profile(capsys, *words, "--directory", tmp_path)
        assert code == 0 and "reduce_scatter" in out and "a processor" in out
    code, out, _ = profile(capsys, "show", "--directory", tmp_path, "--json")
    assert from_json(out, "output") == PROFILE


def test_export_and_import_merge(tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    write_profile(here, replace(PROFILE, parts=PROFILE.parts[:5]))
    write_profile(there, replace(PROFILE, parts=PROFILE.parts[5:]))
    file = tmp_path / "exported.json"
    assert profile(capsys, "export", PROFILE.fingerprint(), file, "--directory", here)[0] == 0
    assert profile(capsys, "import", file, "--directory", there)[0] == 0
    found, _ = read_profile(there, PROFILE.fingerprint())
    assert {p.key for p in found.parts} == {p.key for p in PROFILE.parts}


def test_profiles_of_hetu_galvatron_stand_beside_measured_ones(tmp_path, capsys):
    store, exported = tmp_path / "store", tmp_path / "exported.json"
    store.mkdir()
    code, out, _ = profile(capsys, "import", GALVATRON, "--directory", store)
    assert code == 0 and "machine of 1 x 4, 1 x 8, 2 x 8 devices; model bf16_llama2-7b_all" in out
    name = out.split()[1].rstrip(":")
    code, out, _ = profile(capsys, "show", "--directory", store)
    assert code == 0 and f"profile {name}: imported" in out and str(GALVATRON) in out and "154.2" in out
    write_profile(store, PROFILE)
    code, out, _ = profile(capsys, "list", "--directory", store)
    assert code == 0 and "2048" in out and "a processor" in out
    _, out, _ = profile(capsys, "list", "--directory", store, "--json")
    assert json.loads(out) == [PROFILE.fingerprint(), name]
    _, out, _ = profile(capsys, "show", name[:4], "--directory", store, "--json")
    assert json.loads(out)["format"] == "hetu-galvatron profile"
    code, _, err = profile(capsys, "show", name, "--plot", tmp_path / "p.png", "--directory", store)
    assert code == 2 and "no fitted curves" in err and err.count("\n") == 1
    assert profile(capsys, "export", name, exported, "--directory", store)[0] == 0
    for path in store.glob("galvatron-*"):
        path.unlink()
    code, out, _ = profile(capsys, "import", exported, "--directory", store)
    assert code == 0 and name in out and len(list(store.glob("galvatron-*.json"))) == 1


def test_an_import_that_changes_a_profile_forgets_the_plans_made_with_it(tmp_path, capsys):
    write_profile(tmp_path, PROFILE)
    kept, file = tmp_path / "plan-a.json", tmp_path / "new.json"
    kept.write_text(json.dumps({"decision": {"plan": {"fingerprints": {"profile": PROFILE.fingerprint()}}}}))
    file.write_text(to_json(PROFILE))
    assert profile(capsys, "import", file, "--directory", tmp_path)[0] == 0 and kept.exists()
    file.write_text(to_json(replace(PROFILE, notes=("a slow rank",))))
    code, out, _ = profile(capsys, "import", file, "--directory", tmp_path)
    assert code == 0 and "1 kept plan(s) forgotten" in out and not kept.exists()


def test_plot_draws_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_profile(tmp_path, PROFILE)
    picture = tmp_path / "curves.png"
    assert profile(capsys, "show", "--directory", tmp_path, "--plot", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, err = profile(capsys, "show", "--directory", tmp_path, "--plot", tmp_path / "no" / "such.png")
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--", "pretrain_gpt.py", "--galvatron-oto"], "did you mean '--galvatron-auto'"),
        (["shwo"], "did you mean 'show'"),
        (["show"], "holds no profile"),
        (["measure"], "no model"),
        (["measure", "--ranks", "0", "--", "--num-layers", "2"], "--ranks"),
        (["import", "missing.json"], "cannot be read"),
        (["import"], "needs 1"),
        (["import", "/", "missing.json"], "missing.json is no directory; valid: one exported file"),
        (["import", str(GALVATRON.parent)], f"valid: below it: {GALVATRON}"),
        (["export", "abc"], "holds no profile|needs 2"),
        (["list", "too", "much"], "too much"),
        (["measure", "--model", "missing.yaml"], "missing.yaml"),
        (["measure", "--model", "gpt3-125m", "--tp", "0"], "--tp: 0; valid: an integer >= 1"),
        (["measure", "--model", "gpt3-125m", "--micro-batch-size", "-1"], "--micro-batch-size: -1"),
        (["measure", "--model", "gpt3-125m", "--ranks", "4", "--tp", "3"], "3 does not divide 4 .*: 1, 2, 4"),
        (["measure", "--model", "gpt3-125m", "--plot", "/none/p.png"], "--plot /none/p.png: directory /none"),
        (["list", "--plot", "p.png"], "profile list: --plot: unused"),
        (["list", "--", "--num-layers", "2"], "profile list: --: unused"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, words, reason):
    import re

    split = words.index("--") if "--" in words else len(words)
    code, out, err = profile(capsys, *words[:split], "--directory", tmp_path, *words[split:])
    assert code == 2 and not out
    assert err.count("\n") == 1 and re.search(reason, err)


def test_a_missing_directory_is_named(tmp_path, capsys):
    code, _, err = profile(capsys, "list", "--directory", tmp_path / "none")
    assert code == 2 and "does not exist" in err


def test_an_unreadable_import_changes_nothing(tmp_path, capsys):
    write_profile(tmp_path, PROFILE)
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    code, _, err = profile(capsys, "import", bad, "--directory", tmp_path)
    assert code == 2 and "damaged" in err
    assert read_profile(tmp_path, PROFILE.fingerprint())[0] == PROFILE


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_flags_of_a_model_describe_it(precision, tied):
    model = replace(small_model(tied=tied), precision=precision, max_position_embeddings=64)
    words = flags_of(model)
    found = model_from_arguments(parse_command_line(words))
    wanted = replace(model, name=found.name, fused_attention=found.fused_attention)
    assert found == replace(wanted, layers=found.layers)
    assert found.layers[0].attention.heads == 4 and found.layers[0].mlp.ffn_hidden_size == 512
    assert len(found.layers) == 4


def test_a_model_that_flags_cannot_say_is_refused():
    model = small_model()
    other = replace(model.layers[0], mlp=replace(model.layers[0].mlp, ffn_hidden_size=256))
    with pytest.raises(DescriptionError, match="not equal dense blocks"):
        flags_of(replace(model, layers=(*model.layers, other)))


def test_a_batch_script_under_slurm_is_no_rank_and_starts_ranks(tmp_path, capsys, monkeypatch):
    def start(request, count, timeout_seconds):
        raise GalvatronError(f"{count} ranks are to be started")

    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command, "_start_ranks", start)
    code, _, err = profile(capsys, "--model", "gpt3-125m", "--ranks", "3", "--directory", tmp_path)
    assert code == 2 and err == "galvatron profile: 3 ranks are to be started\n"


def test_the_line_of_a_job_is_measured_as_it_stands(tmp_path, monkeypatch):
    asked = []

    def start(request: dict, count: int, timeout_seconds: float) -> str:
        asked.append(request)
        raise GalvatronError("far enough")

    monkeypatch.setattr(command, "_start_ranks", start)
    megatron = ["--num-layers", "2", "--cp-comm-type", "p2p", "a2a", "--lr", "-1e-4", "--hidden-size", "64"]
    own = ["--galvatron-auto", "--galvatron-device", "cpu", "--galvatron-memory-gb=2", "--galvatron-offload"]
    own += ["optimizer", "--galvatron-profile-dir", str(tmp_path)]
    line = ["pretrain_gpt.py", *megatron[:5], *own, *megatron[5:]]
    assert main(["profile", "--ranks", "2", "--", *line]) == 2
    (request,) = asked
    assert request["megatron"] == megatron
    assert (request["device"], request["directory"], request["offload"]) == ("cpu", str(tmp_path), True)


def test_the_first_rank_that_failed_is_heard(tmp_path):
    request = tmp_path / "request.json"
    assert command._first_error(request, 4, 2) == ""
    for rank in (2, 3, 0):
        request.with_suffix(f".error{rank}").write_text(f"rank {rank}")
        os.utime(request.with_suffix(f".error{rank}"), ns=(0, 5 - rank))
    assert command._first_error(request, 4, 2) == "rank 2"
    # Rank 1 was killed and said nothing: of those that waited for it, the one that spoke first.
    assert command._first_error(request, 4, 1) == "rank 3"


def test_measuring_without_torch_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, _, err = profile(capsys, "--model", "gpt3-125m", "--directory", tmp_path)
    assert code == 2 and err == (
        "galvatron profile: torch is not installed; valid: pip install 'galvatron_megatron[train]' to measure\n"
    )
