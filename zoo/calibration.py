"""Calibration: probabilities that match the accuracy, prediction sets with a guaranteed coverage, and familiarity.

All three come from the logits of the calibration cut: pictures that the model was not trained on.

Shape suffixes: N pictures, C classes.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.errors import ZooError

# How many numbers are kept: misfits of one class, misfits of all classes together, quantiles of energies.
MOST_OF_A_CLASS, MOST_OF_ALL, LEVELS = 200, 40_000, 201
UNFAMILIAR = 0.05  # below this familiarity, a picture is called unlike anything in training


@dataclass(frozen=True, eq=False)
class Calibration:
    """A model's calibration, fitted on a calibration cut and stored in `config["metasaug"]["calibration"]`.

    temperature  logits are divided by it before softmax (Guo et al. 2017)
    misfits      for each class, ascending: 1 - p of the true class, for the cut's pictures of the class
    energies     ascending quantiles of log sum exp scores over the cut (Liu et al. 2020), with equal weight for each
                 class; scores are logits - log own prior
    groups       head, medium or tail, for each class
    """

    temperature: float
    misfits: tuple[tuple[float, ...], ...]
    energies: tuple[float, ...]
    groups: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Calibration | None":
        """The calibration in a model folder's config, or None."""
        found = config["metasaug"].get("calibration")
        return None if found is None else cls.fitted(found, config["metasaug"]["groups"])

    @classmethod
    def fitted(cls, found: Mapping[str, Any], groups: Sequence[str]) -> "Calibration":
        """The calibration that `fit_calibration` returned as `found`."""
        return cls(found["temperature"], tuple(map(tuple, found["misfits"])), tuple(found["energies"]), tuple(groups))

    @functools.lru_cache(maxsize=8)  # noqa: B019  (a model has one calibration, as long as it lives)
    def thresholds(self, coverage: float) -> np.ndarray:
        """(C,) the largest misfit with which a class is in a prediction set (label-conditional conformal prediction).

        With n pictures of a class, it is the ceil((n + 1) coverage)-th smallest misfit. The set then holds the true
        class with at least this probability, for each class, whatever the class frequencies. A class with too few
        pictures uses those of its whole group; the guarantee then holds on average over the group. If even these are
        too few, the threshold is infinite.
        """
        if not 0 < coverage < 1:
            raise ZooError(f"coverage {coverage}: a number between 0 and 1, such as 0.9.")

        def smallest(misfits: Sequence[float]) -> float | None:
            rank = math.ceil((len(misfits) + 1) * coverage)
            return misfits[rank - 1] if rank <= len(misfits) else None

        pooled = {group: smallest(sorted(m for g, misfits in zip(self.groups, self.misfits, strict=True)
                                         if g == group for m in misfits)) for group in set(self.groups)}
        found = []
        for group, misfits in zip(self.groups, self.misfits, strict=True):
            own = smallest(misfits)
            found.append(pooled[group] if own is None else own)
        return np.array([np.inf if each is None else each for each in found])

    def familiarity(self, scores_NC: np.ndarray) -> np.ndarray:
        """(N,) the share of the cut's pictures with lower energy: near 0 for pictures unlike anything in training."""
        return np.searchsorted(self.energies, log_sum_exp(scores_NC), "right") / len(self.energies)


def fit_calibration(
    logits_NC: np.ndarray, labels_N: np.ndarray, own_prior_C: np.ndarray | None, data: str
) -> dict[str, Any]:
    """Fit a calibration: the value of `config["metasaug"]["calibration"]`, ready for JSON.

    logits_NC    the network's output for the calibration cut            labels_N  int64 in [0, C)
    own_prior_C  the prior that the model assumes; None if not known     data      the cut, in words

    The temperature T minimises the mean cross entropy of softmax(logits / T + log cut's prior - log own prior).
    Raises ZooError for a cut of fewer than 2 classes.
    """
    num_classes = logits_NC.shape[1]
    counts_C = np.bincount(labels_N, minlength=num_classes)
    if (counts_C > 0).sum() < 2:
        raise ZooError(f"{data}: a calibration cut needs pictures of at least 2 classes.")
    temperature = fit_temperature(logits_NC, labels_N, prior_shift(counts_C, own_prior_C))
    own_C = 0.0 if own_prior_C is None else np.log(own_prior_C)
    p_NC = probabilities(logits_NC / temperature - own_C)
    most = max(10, min(MOST_OF_A_CLASS, MOST_OF_ALL // num_classes))
    rng = np.random.default_rng(0)
    misfits = []
    for c in range(num_classes):
        of_class = 1 - p_NC[labels_N == c, c]
        some = rng.choice(of_class, most, replace=False) if len(of_class) > most else of_class
        misfits.append([round(float(np.ceil(m * 1e5) / 1e5), 5) for m in np.sort(some)])
    weights_N = 1 / counts_C[labels_N]
    energies = _quantiles(log_sum_exp(logits_NC - own_C), weights_N)
    return {"temperature": round(temperature, 4), "images": len(labels_N), "data": data, "misfits": misfits,
            "energies": [round(float(e), 3) for e in energies]}


def fit_temperature(logits_NC: np.ndarray, labels_N: np.ndarray, shift_C: np.ndarray | float = 0.0) -> float:
    """The T in [0.05, 20] that minimises the mean cross entropy of softmax(logits / T + shift)."""
    rows_N = np.arange(len(labels_N))
    logits_NC = logits_NC.astype(np.float64)

    def slope(inverse: float) -> float:  # of the cross entropy, which is convex in 1 / T
        p_NC = probabilities(logits_NC * inverse + shift_C)
        return float(((p_NC * logits_NC).sum(1) - logits_NC[rows_N, labels_N]).mean())

    low, high = 1 / 20, 20.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def probabilities(scores_NC: np.ndarray) -> np.ndarray:
    """Softmax, in float64."""
    e_NC = np.exp(scores_NC.astype(np.float64) - scores_NC.max(1, keepdims=True))
    return e_NC / e_NC.sum(1, keepdims=True)


def prior_shift(counts_C: np.ndarray, own_prior_C: np.ndarray | None) -> np.ndarray | float:
    """The shift that moves logits from the prior that the model assumes to the class frequencies of a set."""
    if own_prior_C is None:
        return 0.0
    with np.errstate(divide="ignore"):
        return np.log(counts_C / counts_C.sum()) - np.log(own_prior_C / own_prior_C.sum())


def estimate_prior(p_NC: np.ndarray, prior_C: np.ndarray) -> np.ndarray:
    """(C,) class frequencies of unlabelled pictures, by expectation maximisation (Saerens et al. 2002):

        r_nc = p_nc q_c / prior_c, divided by its sum over c;   q_c = mean over n of r_nc

    p_NC      the model's probabilities, which assume prior_C      q begins as prior_C
    Correct if the probabilities are correct, and if a class looks the same there as in training.
    """
    q_C, ratio_NC = prior_C.astype(np.float64), p_NC / prior_C
    for _ in range(1000):
        r_NC = ratio_NC * q_C
        new_C = (r_NC / r_NC.sum(1, keepdims=True)).mean(0)
        moved, q_C = np.abs(new_C - q_C).max(), new_C
        if moved < 1e-6:
            break
    return np.maximum(q_C, 1e-9)  # 0 would rule a class out


def log_sum_exp(scores_NC: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(scores_NC.astype(np.float64), axis=1)


def _quantiles(values_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """LEVELS values with equal weight between neighbours."""
    order = np.argsort(values_N)
    reached = np.cumsum(weights_N[order]) / weights_N.sum()
    at = np.searchsorted(reached, (np.arange(LEVELS) + 0.5) / LEVELS)
    return values_N[order][np.minimum(at, len(order) - 1)]
