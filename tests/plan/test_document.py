import stat
from pathlib import Path

import pytest

from galvatron_megatron.errors import DescriptionError, PlanError
from galvatron_megatron.plan.document import check_keys, read_document, write_document


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    write_document("old", path)

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(DescriptionError, match=r"No space left on device"):
        write_document("new", path, DescriptionError)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    write_document("text", tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("text")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_keys() -> None:
    assert check_keys({"a": 1}, "here", required=["a"], optional=["b"]) == {"a": 1}
    with pytest.raises(PlanError, match=r"here: unknown key 'alpha'; did you mean 'alphas'\? valid: alphas"):
        check_keys({"alpha": 1}, "here", optional=["alphas"])
    with pytest.raises(DescriptionError, match=r"here.a: missing; required: a"):
        check_keys({}, "here", required=["a"], error=DescriptionError)
    with pytest.raises(PlanError, match=r"here: 3; valid: a mapping with a"):
        check_keys(3, "here", required=["a"])


TAGGED = ["a: !!timestamp x", "a: !!bool x", "a: !!int ''", "a: !!float x", "a: !!set [1]", "a: !!binary ü"]


@pytest.mark.parametrize("text", ["a: {b: 1, b: 2}", "? [1]\n: 2\n? {x: 1}\n: 3", "a: 2001-99-99", *TAGGED])
def test_odd_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match="is not YAML") as caught:
        read_document(path)
    assert "\n" not in str(caught.value)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    for name in ("deep.json", "deep.yaml"):
        (tmp_path / name).write_text("[" * 100_000)
        with pytest.raises(PlanError, match=r"is not (JSON|YAML)"):
            read_document(tmp_path / name)
