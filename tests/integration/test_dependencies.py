from argparse import Namespace

import pytest

from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration import dependencies


@pytest.fixture
def wrong_apex(tmp_path, monkeypatch):
    """The unrelated package: it fails when imported, which looking at it must not do."""
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return package


def test_no_apex(monkeypatch):
    monkeypatch.setattr(dependencies, "find_spec", lambda name: None)
    assert dependencies.apex_kind() == "none"
    assert dependencies.transformer_engine_version() is None
    assert dependencies.check_dependencies(Namespace(transformer_impl="local")) == ""


def test_the_unrelated_apex_is_an_error_where_megatron_would_use_it(wrong_apex):
    assert dependencies.apex_kind() == "other"
    with pytest.raises(GalvatronError, match=r"not NVIDIA Apex.*valid: pip uninstall apex"):
        dependencies.check_dependencies(Namespace(transformer_impl="local"))


def test_the_unrelated_apex_is_a_warning_elsewhere(wrong_apex, monkeypatch):
    monkeypatch.setattr(dependencies, "transformer_engine_version", lambda: "2.9")
    warning = dependencies.check_dependencies(Namespace(transformer_impl="transformer_engine"))
    assert warning == dependencies.WRONG_APEX and "\n" not in warning


def test_nvidias_apex_is_known_by_its_optimizer(wrong_apex):
    (wrong_apex / "optimizers").mkdir()
    (wrong_apex / "optimizers" / "fused_adam.py").write_text("")
    assert dependencies.apex_kind() == "nvidia"


def test_missing_transformer_engine_is_named(monkeypatch):
    monkeypatch.setattr(dependencies, "find_spec", lambda name: None)
    with pytest.raises(
        GalvatronError, match=r"Transformer Engine is not installed; valid: --transformer-impl local"
    ):
        dependencies.check_dependencies(Namespace(transformer_impl="transformer_engine"))
