"""Test results: what is counted, and what is not; each figure held to a naive twin, one picture at a time."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import DivergenceError
from training.report.metrics import (
    BINS,
    TESTED_SHARE,
    ZERO_RECALL,
    Tally,
    geometric_mean,
    results_table,
    weighted_accuracy,
    wilson_interval,
)


def measure(logits, labels, names, counts, groups, prior=None, batch=10**9) -> dict:
    tally = Tally(names, counts, groups, prior)
    for at in range(0, len(labels), batch):
        tally.add(np.asarray(logits)[at : at + batch], np.asarray(labels)[at : at + batch])
    return tally.results()


def one_hot(predicted, num_classes):
    return np.eye(num_classes)[np.asarray(predicted)]


# ---- counts, by hand ----


def test_overall_macro_groups_and_classes_are_counted_by_hand():
    # Given ten test pictures of three classes, seven of them right,
    labels = [0] * 6 + [1] * 3 + [2]
    predicted = [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    # when measured,
    got = measure(one_hot(predicted, 3), labels, ["a", "b", "c"], [200, 50, 5], ["head", "medium", "tail"])
    # then every figure is the one counted by hand.
    assert got["images"] == 10
    assert got["error"] == pytest.approx(0.3)
    assert got["macro_error"] == pytest.approx(1 - (5 / 6 + 2 / 3 + 0) / 3)
    assert got["worst_class_error"] == 1 and got["classes_never_right"] == 1
    assert got["geometric_mean"] == 0
    assert got["geometric_mean_corrected"] == pytest.approx((5 / 6 * 2 / 3 * ZERO_RECALL) ** (1 / 3))
    assert {g: (f["classes"], f["images"], f["correct"]) for g, f in got["groups"].items()} == {
        "head": (1, 6, 5), "medium": (1, 3, 2), "tail": (1, 1, 0)}
    assert got["per_class"][1] == {"label": "b", "train_images": 50, "test_images": 3, "correct": 2,
                                   "top5_correct": 3, "answered": 3}
    assert got["confusion"]["groups"] == {"head": {"head": 5, "medium": 1, "tail": 0},
                                          "medium": {"head": 1, "medium": 2, "tail": 0},
                                          "tail": {"head": 1, "medium": 0, "tail": 0}}
    assert got["confusion"]["by_size"] == {"classes": [1, 1, 1], "images": [[5, 1, 0], [1, 2, 0], [1, 0, 0]]}
    # The pairs come by what is sure of them: one of one says more than one of three, and that more than one of six.
    assert [(p["true"], p["predicted"], p["images"]) for p in got["confusion"]["pairs"]] == [
        (2, 0, 1), (1, 0, 1), (0, 1, 1)]


def test_a_class_absent_from_the_test_set_counts_in_no_average():
    # Given a tail class without test pictures,
    got = measure(one_hot([0, 0], 2), [0, 0], ["a", "b"], [200, 5], ["head", "tail"], prior="train")
    # then every average is that of the class seen, and the group says that it has no pictures.
    assert got["macro_error"] == 0 and got["geometric_mean"] == 1 and got["classes_tested"] == 1
    assert {row["accuracy"] for row in got["shifted_priors"]} == {1.0}
    tail = got["groups"]["tail"]
    assert (tail["classes"], tail["images"], tail["accuracy"], tail["ece"]) == (1, 0, None, None)
    assert tail["interval"] == [0.0, 1.0]
    assert "no test pictures" in results_table(got)


def test_ties_in_the_top_five_count_against_the_model():
    """A constant model must not look right by the order of its classes."""
    got = measure(np.zeros((3, 8)), [0, 3, 7], list("abcdefgh"), None, ["unknown"] * 8)
    assert got["top5_error"] == 1
    assert got["groups"]["unknown"]["images"] == 3


def test_the_fifth_answer_counts_among_five_and_the_sixth_does_not():
    logits = [[7.0, 6, 5, 4, 3, 2, 1]] * 2
    got = measure(logits, [4, 5], list("abcdefg"), None, ["unknown"] * 7)
    assert got["top5_error"] == 0.5 and got["groups"]["unknown"]["top5_accuracy"] == 0.5
    assert [row["top5_correct"] for row in got["per_class"]] == [0, 0, 0, 0, 1, 0, 0]


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) logits for 1 labels"):
        measure(np.zeros((2, 3)), [0], list("abc"), None, ["unknown"] * 3)
    for bad in (np.nan, np.inf):
        with pytest.raises(DivergenceError, match="NaN or infinity"):
            measure([[0.0, bad]], [0], list("ab"), None, ["unknown"] * 2)
    with pytest.raises(ValueError, match="no test pictures"):
        Tally(["a", "b"], None, ["unknown"] * 2).results()


# ---- intervals ----


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_proportion_and_stays_inside_one(counts):
    correct, total = counts
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total + 1e-12
    assert correct / total - 1e-12 <= high <= 1


def test_the_interval_is_the_textbook_one():
    # Given 14 right of 33, then Wilson's interval is 27.2 % to 59.2 %.
    assert wilson_interval(14, 33) == pytest.approx((0.2724, 0.5919), abs=2e-4)


def test_weighted_pictures_are_worth_fewer():
    # Given two classes of 100 pictures, equal weights leave 200; all the weight on one leaves its 100.
    correct, images = np.array([80, 40]), np.array([100, 100])
    accuracy, interval = weighted_accuracy(np.array([0.5, 0.5]), correct, images)
    assert accuracy == pytest.approx(0.6) and interval == pytest.approx(wilson_interval(120, 200))
    accuracy, interval = weighted_accuracy(np.array([1.0, 0.0]), correct, images)
    assert accuracy == pytest.approx(0.8) and interval == pytest.approx(wilson_interval(80, 100))


# ---- naive twins ----


def softmax(z):
    e = [math.exp(x - max(z)) for x in z]
    return [x / sum(e) for x in e]


def naive_ece(logits, labels):
    """Guo et al. 2017, eq. 3, bins ((b - 1)/15, b/15], a picture at a time."""
    members = [[] for _ in range(BINS)]
    for z, y in zip(logits, labels, strict=True):
        p = softmax(z)
        sure = max(p)
        b = next(b for b in range(1, BINS + 1) if sure <= b / BINS or b == BINS)
        members[b - 1].append((sure, p.index(sure) == y))
    n = len(labels)
    return sum(len(m) / n * abs(sum(right for _, right in m) / len(m) - sum(sure for sure, _ in m) / len(m))
               for m in members if m)


def naive_shifted(logits, labels, prior_C, log_shift_C):
    """Every picture weighs p(its class) / pictures of its class."""
    weight = total = 0.0
    for z, y in zip(logits, labels, strict=True):
        w = prior_C[y] / labels.count(y)
        scores = [a + b for a, b in zip(z, log_shift_C, strict=True)]
        weight += w * (scores.index(max(scores)) == y)
        total += w
    return weight / total


def naive_exponential(counts, ratio, inverted):
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    if inverted:
        order = order[::-1]
    n = [0.0] * len(counts)
    for rank, c in enumerate(order):
        n[c] = ratio ** (-rank / (len(counts) - 1))
    return [x / sum(n) for x in n]


@st.composite
def a_test(draw):
    """Logits and labels of up to 60 pictures of 2 to 9 classes, with training counts, groups and a prior."""
    C = draw(st.integers(2, 9))
    N = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    labels = rng.integers(0, C, N)
    logits = rng.normal(0, draw(st.sampled_from([0.2, 2, 20])), (N, C)).astype(np.float32)
    logits[np.arange(N), labels] += draw(st.sampled_from([0, 2]))
    counts = rng.integers(1, 500, C).tolist()
    groups = [draw(st.sampled_from(["head", "medium", "tail"])) for _ in range(C)]
    prior = draw(st.sampled_from(["train", "uniform", None]))
    return logits, labels, [f"c{c}" for c in range(C)], counts, groups, prior


@settings(deadline=None, max_examples=60)
@given(a_test())
def test_calibration_and_shifted_priors_equal_their_twins(case):
    logits, labels, _, counts, groups, prior = case
    got = measure(*case)
    rows, ys = logits.astype(float).tolist(), labels.tolist()
    assert got["ece"] == pytest.approx(naive_ece(rows, ys), abs=1e-12)
    for group, figures in got["groups"].items():
        inside = [i for i, y in enumerate(ys) if groups[y] == group]
        if inside:
            twin = naive_ece([rows[i] for i in inside], [ys[i] for i in inside])
            assert figures["ece"] == pytest.approx(twin, abs=1e-12)
    own = {"train": [math.log(n / sum(counts)) for n in counts], "uniform": [0.0] * len(counts)}.get(prior or "")
    for row in got["shifted_priors"]:
        kind, _, ratio = row["prior"].partition("-")
        p = naive_exponential(counts, float(ratio or 1), kind == "backward")
        assert row["accuracy"] == pytest.approx(naive_shifted(rows, ys, p, [0.0] * len(p)))
        if own is None or sum(p[y] for y in set(ys)) <= TESTED_SHARE:  # it would be told of classes that are not here
            assert row["adjusted_accuracy"] is None
        else:
            shift = [math.log(a) - b for a, b in zip(p, own, strict=True)]
            assert row["adjusted_accuracy"] == pytest.approx(naive_shifted(rows, ys, p, shift))


@settings(deadline=None, max_examples=40)
@given(a_test(), st.integers(1, 20))
def test_the_size_of_the_batches_changes_nothing(case, batch):
    whole, parts = measure(*case), measure(*case, batch=batch)
    for key in whole:
        if key in ("ece", "calibration", "groups"):  # sums of floats, in another order
            assert json.dumps(rounded(whole[key])) == json.dumps(rounded(parts[key])), key
        else:
            assert whole[key] == parts[key], key


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 9) + 0.0 if isinstance(value, float) else value


@settings(deadline=None, max_examples=40)
@given(a_test(), st.randoms(use_true_random=False))
def test_the_order_of_the_classes_changes_nothing(case, random):
    """Classes numbered another way: the same figures, but for equal training counts, whose rank is by number."""
    logits, labels, names, _, groups, prior = case
    counts = [7 + 3 * c * c for c in range(len(names))]
    order = list(range(len(names)))
    random.shuffle(order)
    place = np.argsort(order)
    before = measure(logits, labels, names, counts, groups, prior)
    after = measure(logits[:, order], place[labels], [names[c] for c in order], [counts[c] for c in order],
                    [groups[c] for c in order], prior)
    for key in ("error", "top5_error", "macro_error", "worst_class_error", "geometric_mean", "ece", "shifted_priors"):
        assert rounded(before[key]) == rounded(after[key]), key
    assert rounded(before["groups"]) == rounded(after["groups"])
    assert before["confusion"]["by_size"] == after["confusion"]["by_size"]
    assert sorted(before["per_class"], key=str) == sorted(after["per_class"], key=str)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=50))
def test_the_geometric_mean_is_the_root_of_the_product(recalls):
    assert geometric_mean(recalls) == pytest.approx(math.prod(recalls) ** (1 / len(recalls)))
    assert geometric_mean([*recalls, 0]) == 0


def test_a_sure_and_right_model_is_calibrated_and_a_sure_and_wrong_one_is_not():
    sure = one_hot([0, 1, 2, 0], 3) * 1000
    assert measure(sure, [0, 1, 2, 0], list("abc"), None, ["unknown"] * 3)["ece"] == pytest.approx(0)
    assert measure(sure, [1, 2, 0, 1], list("abc"), None, ["unknown"] * 3)["ece"] == pytest.approx(1)


def test_to_be_told_the_frequencies_helps_a_model_that_only_knows_them():
    """Logits that are nothing but noise: told that one class is 50 times as frequent, it answers that one."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 2000)
    got = measure(rng.normal(size=(4000, 2)), labels, list("ab"), [900, 10], ["head", "tail"], "uniform")
    row = next(r for r in got["shifted_priors"] if r["prior"] == "backward-50")
    assert row["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert row["adjusted_accuracy"] > 0.95


# ---- size ----


def test_eight_thousand_classes_stay_light():
    # Given iNaturalist 2018's 8142 classes and 2048 pictures,
    C = 8142
    rng = np.random.default_rng(0)
    tally = Tally([str(c) for c in range(C)], [1000 // (c + 1) + 2 for c in range(C)], ["head"] * C, "train")
    for at in range(0, 2048, 1024):
        labels = np.arange(at, at + 1024)
        logits = rng.normal(size=(len(labels), C)).astype(np.float32)
        logits[np.arange(len(labels)), labels] += 4
        tally.add(logits, labels)
    # when it is stored, then no confusion of 66 million cells is in it: a short line a class, and little else.
    results = tally.results()
    per_class = len(json.dumps(results.pop("per_class")))
    assert per_class < 130 * C
    assert len(json.dumps(results)) < 10_000
