"""A rank that is slower than its peers is named; ordinary differences are not."""

from galvatron_megatron.profiler.stragglers import slow_ranks, straggler_note


def test_a_slow_rank_is_named_with_its_node():
    note = straggler_note("all_reduce", [1.0, 1.0, 0.9, 3.0], ["one x", "one x", "two y", "two y"])
    assert note == "slow in all_reduce: rank 3 on two 3.0 times the median"


def test_the_slowest_comes_first_and_ordinary_ranks_are_silent():
    assert [rank for rank, _ in slow_ranks([1.0, 2.0, 1.0, 4.0, 1.0, 1.2])] == [3, 1]
    assert slow_ranks([1.0, 1.2, 0.8, 1.4]) == []


def test_two_ranks_say_nothing_about_which_of_them_is_slow():
    assert slow_ranks([1.0, 9.0]) == []
    assert slow_ranks([0.0, 0.0, 1.0, 9.0]) == []
