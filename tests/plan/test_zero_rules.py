"""Sizes that sharded parameters take."""

from galvatron_megatron.plan.zero_rules import LEAST_BUCKET, bucket_elements, usual_bucket


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
