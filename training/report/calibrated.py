"""How far a model's probabilities can be trusted, measured on test pictures.

Shape suffixes: N pictures, C classes.
"""

from typing import Any

import numpy as np

from training.report.metrics import Tally
from zoo.calibration import prior_shift, probabilities
from zoo.labels import GROUPS
from zoo.predictor import Classes

COVERAGE = 0.9  # of the prediction sets whose size the card shows
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the test pictures, the surest first: the error is measured on each share


def measured(classes: Classes, logits_NC: np.ndarray, labels_N: np.ndarray) -> dict[str, Any]:
    """Quality of a calibration on test pictures, with their class frequencies given as the prior.

    classes   with the calibration to measure
    Returns the calibration error before and after, coverage and size of prediction sets, and the error on the surest
    pictures.
    """
    assert classes.calibration is not None
    warmth = classes.calibration.temperature
    shift_C = prior_shift(np.bincount(labels_N, minlength=len(classes.labels)), classes.prior_C)
    shift_C = np.maximum(shift_C, -50)  # a class without test pictures
    ece = {}
    for when, temperature in (("before", 1.0), ("after", warmth)):
        tally = Tally(classes.labels, classes.counts, classes.groups, None)
        tally.add(logits_NC / temperature + shift_C, labels_N)
        results = tally.results()
        reliability = results["calibration"]
        ece[when] = {"all": results["ece"], **{group: each["ece"] for group, each in results["groups"].items()}}
    inside_NC = classes.inside(logits_NC, COVERAGE)
    held_N, size_N = inside_NC[np.arange(len(labels_N)), labels_N], inside_NC.sum(1)
    group_N = np.array(classes.groups)[labels_N]
    p_NC = probabilities(logits_NC / warmth + shift_C)
    wrong_N = (p_NC.argmax(1) != labels_N)[np.argsort(-p_NC.max(1), kind="stable")]
    return {"images": len(labels_N), "ece": ece, "reliability": reliability, "coverage": {
        "asked": COVERAGE, **{group: {"coverage": float(held_N[of].mean()), "size": float(size_N[of].mean())}
                              for group in (*GROUPS, "all") if (of := (group_N == group) | (group == "all")).any()}},
            "risk": [[share, float(wrong_N[: max(1, round(share * len(wrong_N)))].mean())] for share in SHARES]}
