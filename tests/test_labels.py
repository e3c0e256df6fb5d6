"""Head, medium and tail: by count where it can be, by rank where it must, unknown where nothing is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.labels import GROUPS, assign_groups, group_of_count


@pytest.mark.parametrize(("count", "group"), [
    (0, "tail"), (19, "tail"), (20, "medium"), (100, "medium"), (101, "head"), (10**9, "head")])
def test_the_fields_borders_are_kept_to_the_picture(count, group):
    assert group_of_count(count) == group


def test_counts_that_fill_every_group_are_grouped_by_count():
    assert assign_groups([101, 100, 20, 19]) == (("head", "medium", "medium", "tail"), "count")


def test_cifar10_lt_has_no_tail_by_count_and_is_grouped_by_rank():
    # Given CIFAR-10-LT at imbalance 100, whose rarest class has 49 pictures,
    counts = [int(4990 * 100 ** (-c / 9)) for c in range(10)]
    assert min(counts) >= 20
    # then its groups are by rank, three, four and three classes.
    groups, by = assign_groups(counts)
    assert by == "rank"
    assert groups == ("head",) * 3 + ("medium",) * 4 + ("tail",) * 3


@pytest.mark.parametrize(("total", "sizes"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (1, 2, 1)),
                                              (5, (2, 2, 1)), (100, (30, 40, 30)), (1000, (300, 400, 300))])
def test_by_rank_means_thirty_forty_thirty_percent(total, sizes):
    groups, by = assign_groups(list(range(1000 + total, 1000, -1)))
    assert by == "rank"
    assert tuple(groups.count(g) for g in GROUPS) == sizes


def test_equal_counts_keep_the_order_of_the_classes():
    assert assign_groups([7, 7, 7, 7])[0] == ("head", "medium", "medium", "tail")


def test_unknown_counts_give_unknown_groups_and_no_guess():
    assert assign_groups(None, 3) == (("unknown",) * 3, "unknown")


@given(st.lists(st.integers(0, 5000), min_size=2, max_size=60))
def test_a_class_never_outranks_one_with_more_pictures(counts):
    groups, by = assign_groups(np.array(counts))
    assert len(groups) == len(counts) and set(groups) <= set(GROUPS) and by in ("count", "rank")
    assert {"head", "tail"} <= set(groups)
    rank = {"head": 2, "medium": 1, "tail": 0}
    for a, group_a in zip(counts, groups, strict=True):
        for b, group_b in zip(counts, groups, strict=True):
            assert a <= b or rank[group_a] >= rank[group_b]
