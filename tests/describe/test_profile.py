"""Profiles as values: fingerprints, curves, merging."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import curve, layer_point, provenance, small_model, small_profile

from galvatron_megatron.describe.profile import CollectiveCurve, PartPoint, Profile
from galvatron_megatron.describe.profile_key import layer_digest, shape_digest
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Recompute


def test_a_profile_serves_any_number_of_layers_but_no_other_shape():
    model = small_model(4)
    assert shape_digest(model) == shape_digest(small_model(48))
    assert shape_digest(model) == shape_digest(replace(model, name="other"))
    assert shape_digest(model) != shape_digest(replace(model, seq_length=128))
    wider = replace(model.layers[0], mlp=replace(model.layers[0].mlp, ffn_hidden_size=1024))
    assert shape_digest(model) != shape_digest(replace(model, layers=(wider,) * 4))
    assert layer_digest(wider) != layer_digest(model.layers[0])


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"device": "another"},
        {"nodes": 2},
        {"ranks_per_node": 8},
        {"processors_per_node": 8},
        {"backend": "nccl"},
        {"software": (("torch", "3"),)},
    ],
)
def test_what_was_measured_where_decides_the_fingerprint(change):
    place = provenance(small_model())
    assert replace(place, **change).fingerprint() != place.fingerprint()


def test_time_does_not_decide_the_fingerprint():
    place = provenance(small_model())
    later = replace(place, created="2027-01-01T00:00:00+00:00", updated="2027-01-01T00:00:00+00:00")
    assert later.fingerprint() == place.fingerprint()


@given(st.floats(min_value=0, max_value=1 << 30))
def test_a_straight_curve_is_read_back_between_and_beyond_its_points(size):
    found = curve("all_reduce", 2, 1).seconds(size)
    if size == 0:
        assert found == 0
    elif size < 1 << 10:
        assert found == pytest.approx(1e-4 + (1 << 10) * 1e-9)
    else:
        assert found == pytest.approx(1e-4 + size * 1e-9)


@given(st.lists(st.floats(min_value=1e-6, max_value=1e-1), min_size=2, max_size=5), st.data())
def test_a_curve_goes_through_its_points(times, data):
    points = tuple((1 << (10 + 3 * index), seconds) for index, seconds in enumerate(times))
    bent = CollectiveCurve(
        collective="send",
        ranks=2,
        stride=1,
        latency_seconds=0,
        seconds_per_byte=1e-9,
        residual=0,
        points=points,
    )
    size, seconds = data.draw(st.sampled_from(points))
    assert bent.seconds(size) == pytest.approx(seconds)


def test_a_curve_of_an_unknown_collective_or_out_of_order_is_refused():
    with pytest.raises(DescriptionError, match="all_reduc"):
        curve("all_reduc", 2, 1)
    with pytest.raises(DescriptionError, match="rising"):
        replace(curve("send", 2, 1), points=((8, 1.0), (4, 1.0)))
    for wrong in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(DescriptionError, match=r"profile send points: .*valid: seconds >= 0"):
            replace(curve("send", 2, 1), points=((4, 1.0), (8, wrong)))


def test_merging_adds_and_replaces_by_what_was_measured():
    model = small_model()
    old = Profile(
        provenance=provenance(model),
        parts=(layer_point(model, 1, 1, Recompute.NONE), layer_point(model, 1, 2, Recompute.NONE)),
        notes=("first",),
    )
    slower = layer_point(model, 1, 2, Recompute.NONE, forward_seconds=9.0)
    new = Profile(
        provenance=replace(provenance(model), updated="2027-01-01T00:00:00+00:00"),
        parts=(slower, layer_point(model, 2, 1, Recompute.NONE)),
        collectives=(curve("send", 2, 1),),
        notes=("first", "second"),
    )
    merged = old.merged(new)
    assert [(p.tp, p.micro_batch_size) for p in merged.parts] == [(1, 1), (1, 2), (2, 1)]
    assert merged.parts[1] == slower
    assert merged.collectives == new.collectives
    assert merged.notes == ("first", "second")
    assert merged.provenance.updated == "2027-01-01T00:00:00+00:00"
    assert merged.merged(merged) == merged


def test_profiles_of_different_models_do_not_mix():
    model = small_model()
    with pytest.raises(DescriptionError, match="cannot be merged"):
        small_profile(model).merged(small_profile(replace(model, hidden_size=256)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("tp", 0), ("micro_batch_size", "2"), ("forward_seconds", -1.0), ("activation_bytes", None)],
)
def test_a_point_names_the_field_that_is_wrong(field, value):
    with pytest.raises(DescriptionError, match=field):
        PartPoint(**({"part": "head", "tp": 1, "micro_batch_size": 1} | {field: value}))
