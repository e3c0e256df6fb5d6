"""What a test says about a model: overall, per group and per class. numpy only.

Shape suffixes: N samples, C classes.
"""

import math
from collections.abc import Sequence

import numpy as np

from zoo.labels import GROUPS


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
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


def test_results(
    logits_NC: np.ndarray,
    labels_N: np.ndarray,
    label_names: Sequence[str],
    class_counts: Sequence[int] | None,
    groups: Sequence[str],
) -> dict:
    """The `results` part of a model folder's config: errors as fractions, per group and per class.

    logits_NC     scores, any scale          labels_N   int in [0, C)
    class_counts  training pictures a class, or None where not known
    groups        head, medium, tail or unknown, one a class

    A class without test pictures counts in no average: macro error is the mean over the classes seen.
    """
    labels_N = np.asarray(labels_N)
    if len(logits_NC) != len(labels_N) or len(labels_N) == 0:
        raise ValueError(f"{len(logits_NC)} rows of logits for {len(labels_N)} labels")
    num_classes = logits_NC.shape[1]
    predicted_N = logits_NC.argmax(1)
    confusion_CC = np.bincount(labels_N * num_classes + predicted_N, minlength=num_classes**2)
    confusion_CC = confusion_CC.reshape(num_classes, num_classes)
    correct_C, images_C = confusion_CC.diagonal(), confusion_CC.sum(1)
    seen_C = images_C > 0
    true_logit_N1 = np.take_along_axis(logits_NC, labels_N[:, None], 1)
    # Rank of the true class, ties counted against it; its own comparison is the 1.
    rank_N = (logits_NC >= true_logit_N1).sum(1)

    def share(correct, total):
        low, high = wilson_interval(int(correct), int(total))
        return {"images": int(total), "correct": int(correct), "accuracy": float(correct / total) if total else None,
                "interval": [low, high]}

    by_group = {}
    for group in (*GROUPS, "unknown"):
        members = np.array([g == group for g in groups])
        if members.any():
            by_group[group] = {"classes": int(members.sum()),
                               **share(correct_C[members].sum(), images_C[members].sum())}
    accuracy_C = correct_C[seen_C] / images_C[seen_C]
    return {
        "images": len(labels_N),
        "error": float(1 - correct_C.sum() / len(labels_N)),
        "top5_error": float((rank_N > 5).mean()) if num_classes > 5 else None,
        "macro_error": float(1 - accuracy_C.mean()),
        "worst_class_error": float(1 - accuracy_C.min()),
        "groups": by_group,
        "per_class": [
            {"label": name, "train_images": None if class_counts is None else int(class_counts[c]),
             "test_images": int(images_C[c]), "correct": int(correct_C[c])}
            for c, name in enumerate(label_names)
        ],
    }


def results_table(results: dict) -> str:
    """The same for a terminal, a line a group."""
    lines = [f"error {results['error']:.2%}   macro error {results['macro_error']:.2%}   "
             f"on {results['images']:,} test pictures"]
    for group, figures in results["groups"].items():
        if not figures["images"]:
            lines.append(f"  {group:<8}{figures['classes']:>5} classes   no test pictures")
            continue
        low, high = figures["interval"]
        lines.append(f"  {group:<8}{figures['classes']:>5} classes   right {figures['correct']:>6,} of "
                     f"{figures['images']:>6,}   {figures['accuracy']:.1%}  (95 %: {low:.1%} to {high:.1%})")
    return "\n".join(lines)
