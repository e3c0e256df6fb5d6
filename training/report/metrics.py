"""Test measures of a model: overall, per group and per class. numpy only; docs/metrics.md has each formula.

Shape suffixes: N samples, C classes, G groups, B bins of confidence, S shifted test sets.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.errors import DivergenceError
from zoo.labels import GROUPS, UNKNOWN

BINS = 15  # of confidence, equally wide: Guo et al. 2017
SHIFTS = (50, 25, 10, 5, 2)  # largest / smallest class of a shifted test set: LADE, Hong et al. 2021
ZERO_RECALL = 0.001  # stands for a class without a correct answer, in the corrected geometric mean
TESTED_SHARE = 0.95  # a shifted prior with less of its weight on tested classes is not given to the model
CONFUSION_SIDE = 12  # most rows in the confusion by class size
PAIRS = 20  # most confused pairs that are kept
# Parts of the results with a row per class or bin: kept in a model folder, too long for a line of the log.
DETAILS = ("per_class", "calibration", "confusion", "shifted_priors")


def wilson_interval(correct: float, total: float, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), which stays inside [0, 1] for small totals.

    correct, total   counts; total 0 gives (0, 1): nothing is known
    """
    if total == 0:
        return 0.0, 1.0
    p = correct / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


class Tally:
    """Test results of any number of pictures, batch by batch; logits are not kept.

    label_names   C names                    class_counts  training pictures per class; None: not known
    groups        head, medium, tail or unknown, one per class
    prior         class frequencies that the logits assume: C numbers, "train" (as in training), "uniform"; None:
                  not known

    Memory: 8 bytes per picture, some hundred per class, and a few times the batch.
    """

    def __init__(
        self, label_names: Sequence[str], class_counts: Sequence[int] | None, groups: Sequence[str],
        prior: str | Sequence[float] | None = None,
    ):
        C = len(label_names)
        self.label_names, self.class_counts, self.groups = label_names, class_counts, groups
        self.present = [group for group in (*GROUPS, UNKNOWN) if group in groups]
        self.group_C = np.array([self.present.index(group) for group in groups])
        self.pairs: list[np.ndarray] = []  # label * C + prediction, one per picture
        self.top5_C = np.zeros(C, np.int64)
        # By group of the true class and bin: pictures, correct ones, sum of confidences.
        self.bins_3GB = np.zeros((3, len(self.present), BINS))
        self.shifts = _shifted_priors(class_counts, C)
        self.log_shift_SC = _log_shifts(self.shifts, class_counts, prior)
        self.shifted_SC = None if self.log_shift_SC is None else np.zeros(self.log_shift_SC.shape, np.int64)

    def add(self, logits_NC: np.ndarray, labels_N: np.ndarray) -> None:
        """Count a batch. labels_N int in [0, C). Raises DivergenceError for logits that are not numbers."""
        labels_N = np.asarray(labels_N, np.int64)
        if logits_NC.shape != (len(labels_N), len(self.label_names)):
            raise ValueError(f"{logits_NC.shape} logits for {len(labels_N)} labels of {len(self.label_names)} classes")
        rows = max(1, 250_000 // logits_NC.shape[1])  # 2 MB in float64: larger pieces do not stay in the cache
        for at in range(0, len(labels_N), rows):
            self._add(logits_NC[at : at + rows].astype(np.float64), labels_N[at : at + rows])

    def _add(self, logits_NC: np.ndarray, labels_N: np.ndarray) -> None:
        N, C = logits_NC.shape
        if not np.isfinite(logits_NC).all():
            raise DivergenceError("The network answers a test picture with NaN or infinity: its weights are damaged, "
                                  "or its training diverged.")
        predicted_N = logits_NC.argmax(1)
        right_N = predicted_N == labels_N
        self.pairs.append(labels_N * C + predicted_N)
        # Rank of the true class, ties counted against it; its own comparison is the 1.
        rank_N = (logits_NC >= logits_NC[np.arange(N), labels_N][:, None]).sum(1)
        self.top5_C += np.bincount(labels_N[rank_N <= 5], minlength=C)
        confidence_N = 1 / np.exp(logits_NC - logits_NC.max(1, keepdims=True)).sum(1)
        bin_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
        cell_N = self.group_C[labels_N] * BINS + bin_N
        for total, weights in zip(self.bins_3GB, (None, right_N, confidence_N), strict=True):
            total += np.bincount(cell_N, weights, minlength=total.size).reshape(total.shape)
        if self.shifted_SC is not None and self.log_shift_SC is not None:
            for correct_C, log_shift_C in zip(self.shifted_SC, self.log_shift_SC, strict=True):
                correct_C += np.bincount(labels_N[(logits_NC + log_shift_C).argmax(1) == labels_N], minlength=C)

    def results(self) -> dict:
        """Fractions and counts, ready for JSON. A class without test pictures counts in no average."""
        if not self.pairs:
            raise ValueError("no test pictures were added")
        C = len(self.label_names)
        pairs_N = np.concatenate(self.pairs)
        true_N, predicted_N = np.divmod(pairs_N, C)
        images_C, answered_C = np.bincount(true_N, minlength=C), np.bincount(predicted_N, minlength=C)
        correct_C = np.bincount(true_N[true_N == predicted_N], minlength=C)
        seen_C = images_C > 0
        recall_C = correct_C[seen_C] / images_C[seen_C]
        uniform_C = np.ones(C)
        return {
            "images": len(pairs_N),
            "error": float(1 - correct_C.sum() / len(pairs_N)),
            "accuracy_interval": list(wilson_interval(int(correct_C.sum()), len(pairs_N))),
            "top5_error": float(1 - self.top5_C.sum() / len(pairs_N)) if C > 5 else None,
            "macro_error": float(1 - recall_C.mean()),
            "macro_accuracy_interval": weighted_accuracy(uniform_C, correct_C, images_C)[1],
            "worst_class_error": float(1 - recall_C.min()),
            "geometric_mean": geometric_mean(recall_C),
            "geometric_mean_corrected": geometric_mean(np.where(recall_C == 0, ZERO_RECALL, recall_C)),
            "classes_tested": int(seen_C.sum()),
            "classes_never_right": int((recall_C == 0).sum()),
            "ece": expected_calibration_error(*self.bins_3GB.sum(1)),
            "groups": {group: self._group(g, correct_C, images_C) for g, group in enumerate(self.present)},
            "calibration": self._calibration(),
            "shifted_priors": self._shifted(correct_C, images_C),
            "confusion": self._confusion(true_N, predicted_N, images_C),
            "per_class": [
                {"label": name, "train_images": None if self.class_counts is None else int(self.class_counts[c]),
                 "test_images": int(images_C[c]), "correct": int(correct_C[c]), "top5_correct": int(self.top5_C[c]),
                 "answered": int(answered_C[c])}
                for c, name in enumerate(self.label_names)
            ],
        }

    def _group(self, g: int, correct_C: np.ndarray, images_C: np.ndarray) -> dict:
        members = self.group_C == g
        correct, images = int(correct_C[members].sum()), int(images_C[members].sum())
        bins_3B = self.bins_3GB[:, g]
        return {
            "classes": int(members.sum()), "images": images, "correct": correct,
            "accuracy": correct / images if images else None, "interval": list(wilson_interval(correct, images)),
            "top5_accuracy": float(self.top5_C[members].sum() / images) if images and len(members) > 5 else None,
            "confidence": float(bins_3B[2].sum() / images) if images else None,
            "ece": expected_calibration_error(*bins_3B) if images else None,
        }

    def _calibration(self) -> dict:
        """For each bin: pictures, their accuracy and their mean confidence; None if it is empty."""
        images_B, right_B, confidence_B = self.bins_3GB.sum(1)

        def means(sums_B):
            return [float(x / n) if n else None for x, n in zip(sums_B, images_B, strict=True)]

        return {"images": images_B.astype(int).tolist(), "accuracy": means(right_B), "confidence": means(confidence_B)}

    def _shifted(self, correct_C: np.ndarray, images_C: np.ndarray) -> list[dict]:
        rows = []
        for s, (name, prior_C) in enumerate(self.shifts.items()):
            accuracy, interval = weighted_accuracy(prior_C, correct_C, images_C)
            adjusted = None
            if self.shifted_SC is not None and prior_C[images_C > 0].sum() > TESTED_SHARE:
                adjusted, _ = weighted_accuracy(prior_C, self.shifted_SC[s], images_C)
            rows.append({"prior": name, "accuracy": accuracy, "interval": interval, "adjusted_accuracy": adjusted})
        return rows

    def _confusion(self, true_N: np.ndarray, predicted_N: np.ndarray, images_C: np.ndarray) -> dict:
        """Which classes are confused, in a form that stays small for any number of classes."""
        G, C = len(self.present), len(images_C)
        groups = np.bincount(self.group_C[true_N] * G + self.group_C[predicted_N], minlength=G * G).reshape(G, G)
        # Classes by size, largest first, in at most CONFUSION_SIDE parts of (nearly) equally many classes.
        order = by_size(self.class_counts, C)
        sizes = [len(part) for part in np.array_split(order, min(C, CONFUSION_SIDE))]
        part_C = np.empty(C, int)
        part_C[order] = np.repeat(np.arange(len(sizes)), sizes)
        side = len(sizes)
        parts = np.bincount(part_C[true_N] * side + part_C[predicted_N], minlength=side * side).reshape(side, side)
        wrong = true_N != predicted_N
        pair, count = np.unique(true_N[wrong] * C + predicted_N[wrong], return_counts=True)
        # Ranked by the lower bound of their share: neither 1 of 1 picture nor the largest classes come first.
        low = np.array([wilson_interval(n, images_C[p // C])[0] for p, n in zip(pair, count, strict=True)])
        return {
            "groups": {true: dict(zip(self.present, row, strict=True))
                       for true, row in zip(self.present, groups.tolist(), strict=True)},
            "by_size": {"classes": sizes, "images": parts.tolist()},
            "pairs": [{"true": int(pair[i] // C), "predicted": int(pair[i] % C), "images": int(count[i])}
                      for i in np.lexsort((pair, -low))[:PAIRS]],
        }


def geometric_mean(recall_C: np.ndarray) -> float:
    """(prod_c recall_c)^(1/C), Kubat and Matwin 1997: one class without a correct answer makes it 0."""
    recall_C = np.asarray(recall_C, np.float64)
    return float(np.exp(np.log(recall_C).mean())) if (recall_C > 0).all() else 0.0


def expected_calibration_error(images_B: np.ndarray, right_B: np.ndarray, confidence_B: np.ndarray) -> float:
    """sum_b |right_b - confidence_b| / sum_b images_b (Guo et al. 2017, eq. 3), the arguments sums over each bin."""
    return float(np.abs(right_B - confidence_B).sum() / images_B.sum())


def by_size(class_counts: Sequence[int] | None, C: int) -> np.ndarray:
    """Classes, largest first; equal ones, and all if counts are not known, in their own order."""
    return np.argsort(-np.asarray(class_counts or [0] * C), kind="stable")


def _shifted_priors(class_counts: Sequence[int] | None, C: int) -> dict[str, np.ndarray]:
    """Class frequencies of shifted test sets: long-tailed like training, balanced, inverted (LADE, section 4.2).

    forward-M   p_c ~ M^(-r_c / (C - 1)), r_c the rank of c in training, 0 the largest class
    backward-M  the same with the smallest class first; only balanced if counts are not known
    """
    uniform = {"balanced": np.ones(C) / C}
    if class_counts is None:
        return uniform
    place_C = np.argsort(by_size(class_counts, C)) / (C - 1)

    def exponential(exponent_C: np.ndarray, ratio: float) -> np.ndarray:
        p_C = float(ratio) ** -exponent_C
        return p_C / p_C.sum()

    return {**{f"forward-{m}": exponential(place_C, m) for m in SHIFTS}, **uniform,
            **{f"backward-{m}": exponential(1 - place_C, m) for m in reversed(SHIFTS)}}


def _log_shifts(
    shifts: dict[str, np.ndarray], class_counts: Sequence[int] | None, prior: str | Sequence[float] | None
) -> np.ndarray | None:
    """log p_shifted - log p_own (S, C): what to add to logits for the shifted prior (Saerens et al. 2002).

    None if the model's own prior is not known, or has a class without training pictures.
    """
    targets_SC = np.log(np.stack(list(shifts.values())))
    if prior == "uniform":
        return targets_SC
    own: Any = class_counts if prior == "train" else prior
    return targets_SC - np.log(np.asarray(own) / sum(own)) if own is not None and min(own) > 0 else None


def weighted_accuracy(prior_C: np.ndarray, correct_C: np.ndarray, images_C: np.ndarray) -> tuple[float, list[float]]:
    """sum_c p_c recall_c over the tested classes, and its Wilson interval.

    The interval is for the effective number of pictures, 1 / sum_c (p_c^2 / n_c) (Kish 1965).
    """
    seen_C = images_C > 0
    p_C = prior_C[seen_C] / prior_C[seen_C].sum()
    accuracy = float((p_C * correct_C[seen_C] / images_C[seen_C]).sum())
    worth = float(1 / (p_C**2 / images_C[seen_C]).sum())
    return accuracy, list(wilson_interval(min(accuracy, 1.0) * worth, worth))


def results_table(results: dict) -> str:
    """The results for a terminal: overall, for each group, and by class frequencies. Missing figures are left out."""
    lines = [f"error {results['error']:.2%}   macro error {results['macro_error']:.2%}   "
             f"on {results['images']:,} test pictures"]
    more = [f"top-5 error {results['top5_error']:.2%}" if results.get("top5_error") is not None else "",
            f"worst class {results['worst_class_error']:.1%}"]
    if "ece" in results:
        never = results["classes_never_right"]
        more += [f"geometric mean {results['geometric_mean_corrected']:.1%}"
                 + (f" ({never} of {results['classes_tested']} classes without a correct answer)" if never else ""),
                 f"calibration error {results['ece']:.1%}"]
    lines.append("   ".join(filter(None, more)))
    for group, figures in results["groups"].items():
        if not figures["images"]:
            lines.append(f"  {group:<8}{figures['classes']:>5} classes   no test pictures")
            continue
        low, high = figures["interval"]
        ece = f"   calibration error {figures['ece']:.1%}" if figures.get("ece") is not None else ""
        lines.append(f"  {group:<8}{figures['classes']:>5} classes {figures['correct']:>6,} of "
                     f"{figures['images']:>6,} correct   {figures['accuracy']:.1%}  (95 %: {low:.1%} to "
                     f"{high:.1%}){ece}")
    shifted = {row["prior"]: row for row in results.get("shifted_priors") or ()}
    if len(shifted) > 1:
        told = ["" if row["adjusted_accuracy"] is None else f" ({row['adjusted_accuracy']:.1%} given them)"
                for row in shifted.values()]
        lines.append("accuracy by class frequencies:  " + "   ".join(
            f"{label}: {row['accuracy']:.1%}{then}" for (name, row), then in zip(shifted.items(), told, strict=True)
            for label in [{"forward-50": "long-tailed", "balanced": "equal", "backward-50": "inverted"}.get(name)]
            if label))
    return "\n".join(lines)
