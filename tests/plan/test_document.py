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


@pytest.mark.parametrize("name", ["file/plan.yaml", "n" * 250 + ".yaml"])
def test_a_place_that_cannot_hold_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"cannot be written"):
        write_document("text", tmp_path / name)


def test_text_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_document("\ud800", tmp_path / "plan.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    for name in ("a.json", "a.yaml"):
        (tmp_path / name).write_text('{"a": 1}', encoding="utf-8-sig")
        assert read_document(tmp_path / name) == {"a": 1}


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(PlanError, match="valid: a readable file"):
        read_document("a\0b.yaml")


def test_merges_of_merges_do_not_grow_without_bound(tmp_path: Path) -> None:
    lines = ["m0: &m0 {key: 1}"]
    lines += [f"m{i + 1}: &m{i + 1} {{<<: [{', '.join([f'*m{i}'] * 10)}]}}" for i in range(12)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(PlanError, match=r"a mapping of \d+ keys; valid"):
        read_document(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("\n".join(lines[:2]))
    assert read_document(tmp_path / "a.yaml") == {"m0": {"key": 1}, "m1": {"key": 1}}


def test_keys() -> None:
    assert check_keys({"a": 1}, "here", required=["a"], optional=["b"]) == {"a": 1}
    with pytest.raises(PlanError, match=r"here: unknown key 'alpha'; did you mean 'alphas'\? valid: alphas"):
        check_keys({"alpha": 1}, "here", optional=["alphas"])
    with pytest.raises(DescriptionError, match=r"here.a: missing; valid: a all given"):
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
    assert "; valid: " in str(caught.value)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    for name in ("deep.json", "deep.yaml"):
        (tmp_path / name).write_text("[" * 100_000)
        with pytest.raises(PlanError, match=r"is not (JSON|YAML)"):
            read_document(tmp_path / name)
