import pytest

from galvatron_megatron.errors import DescriptionError, PlanError
from galvatron_megatron.plan.checks import GREATEST, require_count, shown


def laughing() -> list:
    value: list = ["ha"]
    for _ in range(40):
        value = [value] * 9
    return value


def own_member() -> dict:
    value: dict = {}
    value["me"] = value
    return value


ODD = [16**6000, [16**6000], {16**6000: 1}, laughing(), own_member(), "x" * 9000, "a\nb", b"x" * 9000, None]


@pytest.mark.parametrize("index", range(len(ODD)))
def test_anything_is_shown_in_one_short_line(index: int) -> None:
    # By index: pytest would make names of the values.
    text = shown(ODD[index])
    assert "\n" not in text
    assert 0 < len(text) <= 103


def test_what_is_short_is_shown_as_it_is() -> None:
    for value in (3, -1, True, None, 2.5, "tp", [1, 2], {"a": 1}):
        assert shown(value) == repr(value)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None, float("nan"), [1]])
def test_what_is_no_count_is_refused(value: object) -> None:
    with pytest.raises(PlanError, match=r"plan.pp: .*; valid: an integer >= 1"):
        require_count(value, "plan.pp")


def test_range_of_counts() -> None:
    assert require_count(GREATEST, "size") == GREATEST
    assert require_count(0, "size", least=0) == 0
    with pytest.raises(DescriptionError, match=f"size: {GREATEST + 1}; valid: an integer from 0 to {GREATEST}"):
        require_count(GREATEST + 1, "size", least=0, error=DescriptionError)
