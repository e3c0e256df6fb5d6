"""Test results: what is counted, and what is not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.metrics import results_table, test_results, wilson_interval

measure = test_results  # under its own name pytest would take it for a test
del test_results


def one_hot(predicted, num_classes):
    return np.eye(num_classes)[np.asarray(predicted)]


def test_overall_macro_groups_and_classes_are_counted_by_hand():
    # Given ten test pictures of three classes, seven of them right,
    labels = [0] * 6 + [1] * 3 + [2]
    predicted = [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    # when measured,
    got = measure(one_hot(predicted, 3), np.array(labels), ["a", "b", "c"], [200, 50, 5], ["head", "medium", "tail"])
    # then every figure is the one counted by hand.
    assert got["images"] == 10
    assert got["error"] == pytest.approx(0.3)
    assert got["macro_error"] == pytest.approx(1 - (5 / 6 + 2 / 3 + 0) / 3)
    assert got["worst_class_error"] == 1
    assert {g: (f["classes"], f["images"], f["correct"]) for g, f in got["groups"].items()} == {
        "head": (1, 6, 5), "medium": (1, 3, 2), "tail": (1, 1, 0)}
    assert got["per_class"][1] == {"label": "b", "train_images": 50, "test_images": 3, "correct": 2}


def test_a_class_absent_from_the_test_set_counts_in_no_average():
    # Given a tail class without test pictures,
    got = measure(one_hot([0, 0], 2), np.array([0, 0]), ["a", "b"], [200, 5], ["head", "tail"])
    # then macro error is that of the class seen, and the group says that it has no pictures.
    assert got["macro_error"] == 0
    assert got["groups"]["tail"] == {"classes": 1, "images": 0, "correct": 0, "accuracy": None, "interval": [0.0, 1.0]}
    assert "no test pictures" in results_table(got)


def test_ties_in_the_top_five_count_against_the_model():
    """A constant model must not look right by the order of its classes."""
    got = measure(np.zeros((3, 8)), np.array([0, 3, 7]), list("abcdefgh"), None, ["unknown"] * 8)
    assert got["top5_error"] == 1
    assert got["groups"]["unknown"]["images"] == 3


def test_logits_and_labels_must_match():
    with pytest.raises(ValueError, match="2 rows"):
        measure(np.zeros((2, 3)), np.array([0]), list("abc"), None, ["unknown"] * 3)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_proportion_and_stays_inside_one(counts):
    correct, total = counts
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total + 1e-12
    assert correct / total - 1e-12 <= high <= 1


def test_the_interval_is_the_textbook_one():
    # Given 14 right of 33, then Wilson's interval is 27.2 % to 59.2 %.
    assert wilson_interval(14, 33) == pytest.approx((0.2724, 0.5919), abs=2e-4)
