"""Notices when a name of Megatron that is replaced moves or changes its parameters."""

import argparse
import inspect
import types

import pytest

from galvatron_megatron.integration import arguments, measurement
from galvatron_megatron.integration.cpu_megatron import megatron_patches


@pytest.fixture
def module():
    """A fresh copy of the hooked module's names, so that the real one stays untouched."""
    from megatron.training import arguments as real

    copy = types.ModuleType(real.__name__)
    for name in arguments.HOOKED:
        setattr(copy, name, getattr(real, name))
    return copy


def test_the_argument_parser_has_the_hooked_names():
    from megatron.training import arguments as real

    assert list(inspect.signature(real.add_megatron_arguments).parameters) == ["parser"]
    assert list(inspect.signature(real.validate_args).parameters) == ["args", "defaults"]
    source = inspect.getsource(real.parse_args)
    assert "add_megatron_arguments(parser)" in source and "parse_args()" in source


def test_validation_comes_after_parsing_through_the_hooked_names():
    from megatron.training import arguments as real
    from megatron.training import initialize

    both = inspect.getsource(real.parse_and_validate_args)
    assert "= parse_args(" in both and "validate_args(args, args_defaults)" in both
    assert "torch.distributed.init_process_group" in inspect.getsource(initialize._initialize_distributed)


def test_the_training_loop_calls_the_log_on_every_iteration():
    from megatron.training import training

    names = list(inspect.signature(getattr(training, measurement.SEAM)).parameters)
    assert measurement.LOSSES_PARAMETER in names and measurement.ITERATION_PARAMETER in names
    assert f"= {measurement.SEAM}(" in inspect.getsource(training.train)


def test_flags_stand_in_a_group_of_their_own_in_the_help(module):
    arguments.attach(module)
    arguments.attach(module)  # Again, as a second import would.
    parser = module.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    (group,) = [group for group in parser._action_groups if group.title == "galvatron"]
    flags = {flag for action in group._group_actions for flag in action.option_strings}
    assert {
        *("--galvatron-auto", "--galvatron-plan", "--galvatron-memory-gb", "--galvatron-profile-dir"),
        *("--galvatron-plan-only", "--galvatron-device"),
    } <= flags
    text = parser.format_help()
    assert "\ngalvatron:\n" in text and "--galvatron-auto" in text.split("\ngalvatron:\n")[1]
    assert parser.parse_args(["--num-layers", "4"]).galvatron_auto is False


def test_another_module_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        arguments.attach(types.ModuleType("megatron.training.arguments"))
    assert ended.value.code == 2
    assert "valid: megatron-core >= 0.17 and < 0.20" in capsys.readouterr().err


def test_everything_the_cpu_device_replaces_in_megatron_is_there():
    for owner, name, _ in megatron_patches():
        assert name in vars(owner), (owner, name)
