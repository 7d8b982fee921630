import json
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plans, uniform_plan

from galvatron_megatron.errors import PlanError
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.serialization import (
    plan_from_dict,
    plan_to_dict,
    plan_to_json,
    plan_to_yaml,
    read_plan,
    write_plan,
)
from galvatron_megatron.plan.strategy import SequenceParallel, Strategy

STRATEGY = Strategy(tp=2, dp=2, sequence_parallel=SequenceParallel.MEGATRON, zero=1)
PLAN = uniform_plan(STRATEGY, (12, 12))


@given(plan=plans())
def test_round_trip_is_exact(plan: Plan) -> None:
    assert plan_from_dict(plan_to_dict(plan)) == plan
    assert plan_from_dict(yaml.safe_load(plan_to_yaml(plan))) == plan
    assert plan_from_dict(json.loads(plan_to_json(plan))) == plan


def places(document: object, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a document."""
    inside = []
    if isinstance(document, dict):
        inside = list(document.items())
    elif isinstance(document, list):
        inside = list(enumerate(document))
    return [path] * bool(path) + [place for key, value in inside for place in places(value, (*path, key))]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), st.integers(), max_size=2),
    st.sampled_from(["full", "megatron", "moe", "ulysses", "block", 2, 4, 2.0, "2"]),
)


def without_defaults(strategy: dict) -> dict:
    """A strategy without what is written only where it says something; null says that it was left out."""
    shards = 1 if strategy["sequence_parallel"] == "ulysses" else strategy["tp"]
    silent = {"expert_parallel": (1,), "expert_tensor_parallel": (None, shards), "offload": ("none",)}
    return {key: value for key, value in strategy.items() if value not in silent.get(key, ())}


def with_defaults(document: dict) -> dict:
    """A document as ``plan_to_dict`` would write it: equal neighbours in one run, the usual fields in full."""
    strategy = {"tp": 1, "sequence_parallel": "none", "cp": 1, "dp": 1, "zero": 0, "recompute": "none"}
    stages = []
    for stage in document["stages"]:
        runs: list[dict] = []
        for entry in stage:
            run = {"count": 1, **without_defaults({**strategy, **entry})}
            if runs and {**runs[-1], "count": 0} == {**run, "count": 0}:
                runs[-1]["count"] += run["count"]
            else:
                runs.append(run)
        stages.append(runs)
    prints = {"model": "", "cluster": "", "profile": "", **document.get("fingerprints", {})}
    base = without_defaults(strategy | document["base"])
    return {"virtual_stages": 1, **document, "base": base, "stages": stages, "fingerprints": prints}


def test_null_and_what_goes_without_saying_are_as_left_out() -> None:
    document = plan_to_dict(PLAN)
    silent = {"expert_parallel": 1, "expert_tensor_parallel": 2, "offload": "none"}
    for spoken in (silent, {**silent, "expert_tensor_parallel": None}):
        again = {**document, "base": {**document["base"], **spoken}}
        assert plan_to_dict(plan_from_dict(again)) == with_defaults(again) == document


@settings(max_examples=300)
@given(plan=plans(), data=st.data())
def test_a_mutated_document_means_what_it_says_or_is_refused(plan: Plan, data: st.DataObject) -> None:
    document = deepcopy(plan_to_dict(plan))
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(document) or [("pp",)]))
        holder = document
        for key in way:
            holder = holder[key]
        match data.draw(st.sampled_from(["replace", "remove", "insert"])):
            case "replace":
                holder[last] = data.draw(JUNK)
            case "remove":
                del holder[last]
            case "insert" if isinstance(holder, dict):
                key = data.draw(st.one_of(st.text(max_size=4), st.sampled_from(["count", "cp"])))
                holder[key] = data.draw(JUNK)
            case "insert":
                holder.insert(last, data.draw(JUNK))
    before = deepcopy(document)
    try:
        accepted = plan_from_dict(document, "mutated.yaml")
    except PlanError as error:
        assert str(error).startswith("mutated.yaml")
        assert "\n" not in str(error)
    else:
        assert plan_to_dict(accepted) == with_defaults(before)
    assert str(document) == str(before)


@settings(max_examples=200)
@given(data=st.data(), is_json=st.booleans())
def test_a_damaged_file_is_a_plan_or_refused(
    data: st.DataObject, is_json: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = plan_to_json(PLAN) if is_json else plan_to_yaml(PLAN)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        text = text[:at] + data.draw(st.text("{}[]:,-&*!|>'\"#% \n\tab01.~", max_size=3)) + text[at + cut :]
    path = tmp_path_factory.getbasetemp() / ("damaged.json" if is_json else "damaged.yaml")
    path.write_text(text)
    try:
        plan = read_plan(path)
    except PlanError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert plan_from_dict(plan_to_dict(plan)) == plan


@pytest.mark.parametrize("name", ["plan.yaml", "plan.yml", "plan.json"])
def test_files(tmp_path: Path, name: str) -> None:
    write_plan(PLAN, tmp_path / name)
    assert read_plan(tmp_path / name) == PLAN
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_runs_of_equal_layers_are_one_line() -> None:
    assert len(plan_to_yaml(uniform_plan(STRATEGY, (500,))).splitlines()) < 12


def test_defaults_may_be_left_out() -> None:
    document = {
        "schema_version": 1,
        "pp": 1,
        "micro_batch_size": 1,
        "micro_batches": 2,
        "base": {"dp": 2},
        "stages": [[{"kind": "block", "dp": 2}, {"kind": "block", "dp": 2, "count": 3}]],
    }
    assert plan_from_dict(document) == uniform_plan(Strategy(dp=2), (4,), micro_batches=2)


def test_the_plan_in_a_search_result(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"plan": plan_to_dict(PLAN), "predicted": {}}))
    assert read_plan(tmp_path / "result.json") == PLAN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pp: 1\npp: 2\n", "key 'pp' is given twice"),
        ("pp: [1\n", "is not YAML"),
        ("[1, 2]\n", "holds a list"),
        ("", "is empty"),
        ("pp: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("schema_version: 2\nstrange: 1\n", "schema_version: 2 is not readable"),
        ("{1: 2}\n", "unknown key 1"),
        (f"? 0x{'f' * 6000}\n: 1\n", "unknown key an integer of 24000 bits"),
        (f"schema_version: 0x{'f' * 6000}\n", "schema_version: an integer of 24000 bits"),
        (plan_to_yaml(PLAN).replace("pp: 2", f"pp: 0x{'f' * 6000}"), "pp: an integer of 24000 bits; valid"),
        (plan_to_yaml(PLAN).replace("pp: 2", f"pp: {'9' * 400}"), "valid: an integer from 1 to 2147483647"),
        (plan_to_yaml(PLAN).replace("pp: 2", "pp: [" + "a, " * 999 + "a]"), "['a', 'a', 'a', 'a', ...]; valid"),
        (
            plan_to_yaml(PLAN).split("\nstages")[0] + "\nstages: &x [*x]\n",
            "stages[0][0]: [[[...]]]; valid: a mapping",
        ),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "valid: " in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        read_plan(tmp_path / "none.yaml")
    with pytest.raises(PlanError, match="unknown kind of file"):
        read_plan(tmp_path / "plan.txt")
    with pytest.raises(PlanError, match="unknown kind of file"):
        write_plan(PLAN, tmp_path / "plan.toml")
    with pytest.raises(PlanError, match="cannot be written"):
        write_plan(PLAN, tmp_path / "missing" / "plan.json")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="is not text"):
        read_plan(tmp_path / "binary.yaml")
    (tmp_path / "twice.json").write_text('{"pp": 1, "pp": 2}')
    with pytest.raises(PlanError, match="'pp' is given twice"):
        read_plan(tmp_path / "twice.json")


def test_errors_name_field_value_and_what_is_valid() -> None:
    document = plan_to_dict(PLAN)
    document["stages"][1][0]["recompute"] = "fall"
    with pytest.raises(PlanError) as caught:
        plan_from_dict(document, "p.yaml")
    assert str(caught.value) == (
        "p.yaml.stages[1][0].recompute: 'fall' is unknown; did you mean 'full'? valid: full, none, selective"
    )
