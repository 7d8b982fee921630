import argparse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.options import Options, add_options, check_flag_names
from galvatron_megatron.plan.strategy import Offload


def read(*words: str) -> Options:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    return Options.from_arguments(parser.parse_args(words))


def test_without_flags_nothing_is_planned():
    assert read() == Options()
    assert not Options().plans


def test_flags_are_read(tmp_path):
    report = tmp_path / "r.json"
    options = read(
        *("--galvatron-auto", "--galvatron-memory-gb", "7.5", "--galvatron-device", "cpu"),
        *("--galvatron-profile-dir", "/p", "--galvatron-report", str(report), "--galvatron-uniform"),
    )
    assert options == Options(
        auto=True,
        memory_gb=7.5,
        device="cpu",
        profile_directory=Path("/p"),
        report=report,
        uniform=True,
    )
    assert options.plans


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--galvatron-auto", "--galvatron-device", "gpu"], r"--galvatron-device: 'gpu'.*valid: cpu, cuda"),
        (["--galvatron-auto", "--galvatron-memory-gb", "much"], r"--galvatron-memory-gb: 'much'.*> 0"),
        (["--galvatron-auto", "--galvatron-memory-gb=-1"], r"--galvatron-memory-gb: '-1'"),
        (["--galvatron-auto", "--galvatron-memory-gb", "nan"], r"--galvatron-memory-gb: 'nan'"),
        (["--galvatron-auto", "--galvatron-plan", "x"], r"--galvatron-plan and --galvatron-auto: both"),
        (["--galvatron-auto", "--galvatron-offload", "optimiser"], r"-offload: 'optimiser'.*'optimizer'"),
        (["--galvatron-plan", "p", "--galvatron-offload", "none"], r"--galvatron-offload: the plan is given"),
        (
            ["--galvatron-auto", "--galvatron-uniform", "--galvatron-offload", "parameters"],
            r"--galvatron-offload parameters: beside --galvatron-uniform.*; valid: one of them",
        ),
        (
            ["--galvatron-zero-backend", "deepspeed"],
            r"-zero-backend deepspeed: nothing is planned; valid: with",
        ),
        (
            ["--galvatron-auto", "--galvatron-uniform", "--galvatron-zero-backend", "deepspeed"],
            r"--galvatron-zero-backend deepspeed: beside --galvatron-uniform.*; valid: one of them",
        ),
        (["--galvatron-zero-backend", "megatron"], r"-zero-backend megatron: nothing is planned"),
        (["--galvatron-plan", "p", "--galvatron-zero-backend", "apex"], r"-zero-backend: 'apex' is unknown"),
        (
            ["--galvatron-auto", "--galvatron-offload", "optimizer", "--galvatron-zero-backend", "megatron"],
            r"-zero-backend megatron: beside --galvatron-offload optimizer.*; valid: one of them",
        ),
        (["--galvatron-plan-only"], r"--galvatron-plan-only: nothing is planned; valid: with --galvatron-auto"),
        (["--galvatron-profile-dir", "/p"], r"--galvatron-profile-dir: nothing is planned"),
        (["--galvatron-auto", "--galvatron-report", "/no/where/r.json"], r"directory /no/where does not exist"),
        (["--galvatron-auto", "--galvatron-report", "/"], r"--galvatron-report /: is a directory"),
        (
            ["--galvatron-auto", "--galvatron-save-plan", "plan.txt"],
            r"plan.txt: unknown kind .*\.yaml",
        ),
        (["--galvatron-plan", ""], r"--galvatron-plan: is empty; valid: a path"),
        (["--galvatron-auto", "--galvatron-plan", ""], r"--galvatron-plan: is empty"),
        (["--galvatron-auto", "--galvatron-report="], r"--galvatron-report: is empty"),
        (["--galvatron-plan", "p", "--galvatron-memory-gb", "8"], r"-memory-gb: the plan is given.*-auto"),
        (["--galvatron-plan", "p", "--galvatron-again"], r"--galvatron-again: the plan is given"),
        (["--galvatron-plan", "p", "--galvatron-uniform"], r"--galvatron-uniform: the plan is given"),
        (["--galvatron-load-universal", "d"], r"-load-universal: nothing is planned; .* or --galvatron-plan"),
        (["--galvatron-plan", "p", "--galvatron-load-universal", ""], r"-load-universal: is empty"),
        (["--galvatron-observe", "/dev/null"], r"--galvatron-observe: /dev/null is a file"),
        (["--galvatron-auto", "--galvatron-ignore-gpus"], r"ignore-gpus: .*beside --galvatron-device cpu"),
    ],
)
def test_bad_values_are_named_in_one_line(words, message):
    with pytest.raises(GalvatronError, match=message) as caught:
        read(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offload", Offload)
def test_what_may_lie_in_host_memory_is_read(offload):
    assert read("--galvatron-auto", "--galvatron-offload", offload.value).offload is offload


@pytest.mark.parametrize("other", ["pretrained_checkpoint", "finetune", "no_load_optim", "skip_train"])
def test_a_universal_checkpoint_is_refused_beside_what_contradicts_it(other):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    args = parser.parse_args(["--galvatron-plan", "p", "--galvatron-load-universal", "d"])
    assert Options.from_arguments(args).load_universal == Path("d")
    setattr(args, other, "x")
    flag = other.replace("_", "-")
    with pytest.raises(
        GalvatronError, match=f"--galvatron-load-universal: beside --{flag}, .*; valid: one of them"
    ):
        Options.from_arguments(args)


@given(st.floats(min_value=1e-3, max_value=1e6))
def test_any_positive_memory_is_taken(value):
    assert read("--galvatron-auto", "--galvatron-memory-gb", repr(value)).memory_gb == value


def test_a_misspelt_flag_is_named_with_the_nearest_one():
    check_flag_names(["--num-layers", "4", "--galvatron-auto", "--galvatron-plan=x", "--galvatronic"])
    with pytest.raises(
        GalvatronError, match=r"--galvatron-atuo: unknown flag; did you mean '--galvatron-auto'"
    ):
        check_flag_names(["--galvatron-atuo"])
