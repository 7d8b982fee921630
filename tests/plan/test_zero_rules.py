"""Sizes that sharded parameters take."""

from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.plan.zero_rules import LEAST_BUCKET, bucket_elements, usual_bucket, vectors_stay_whole


def test_a_bucket_holds_the_largest_parameter_and_never_more_than_there_are():
    assert usual_bucket(8) == LEAST_BUCKET < usual_bucket(64) == 64_000_000
    assert bucket_elements(1000, 400, 8) == 1000
    assert bucket_elements(10**9, 400, 8) == LEAST_BUCKET
    assert bucket_elements(10**9, 400, 64) == 64_000_000
    assert bucket_elements(10**10, 400, 8, wanted=500) == 500
    assert bucket_elements(10**10, 700, 8, wanted=500) == 700
    assert bucket_elements(10**9, 536_870_912, 8) == 536_870_912


def test_a_bucket_of_next_to_nothing_can_still_be_gathered_with():
    assert bucket_elements(1, 1, 4) == 2
    assert bucket_elements(0, 0, 4) == 0


def test_vectors_stay_whole_where_they_are_next_to_nothing():
    assert vectors_stay_whole(2 * 4096, 12 * 4096**2, 8)
    assert vectors_stay_whole(10, 1000, 2)
    assert not vectors_stay_whole(11, 1000, 2)
    assert not vectors_stay_whole(0, 1000, 2)
    assert not vectors_stay_whole(10, 1000, 1), "nothing is gathered"
    assert not vectors_stay_whole(10, 1000, 2, Offload.PARAMETERS), "the weights are on the host"
