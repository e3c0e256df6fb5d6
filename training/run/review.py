"""Review of the training pictures with the features of a frozen network.

It finds doubtful labels, near copies in two classes, and the classes where ten more pictures would help most. Last
layers are cross-validated: each is fitted to two thirds of the pictures and judges the other third. Doubtful labels
are found by confident learning (Northcutt, Jiang and Chuang, JAIR 2021).

Shape suffixes: N pictures, C classes, A features.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.datasets import LongTailed, PictureFiles, Split
from training.report.pictures import REVIEW
from zoo.files import write_atomically

FOLDS, STEPS = 3, 25
DOUBTFUL, COPIES, CONFUSED, MORE = 30, 12, 10, 10
SHOWN = 4  # pictures of a confusion
ALIKE = 0.98  # least cosine of the features of near copies
ADDED = 10  # pictures
MOST_PICTURES = 40_000  # of more pictures, evenly spread ones are reviewed

Fit = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def review(features_NA: Tensor, data: LongTailed, fit: Fit) -> dict[str, Any]:
    """Findings for review.json.

    features_NA   of data.train          fit   (features, labels, steps) -> weight and bias
    """
    if not isinstance(data.train, PictureFiles):
        return {}
    every = -(-len(data.train) // MOST_PICTURES)
    pictures, features_NA = data.train.at(range(0, len(data.train), every)), features_NA[::every]
    labels_N = torch.from_numpy(pictures.labels)
    fold_N = folds(labels_N)
    whole_NC = out_of_fold(features_NA, labels_N, fold_N, fit, 1)
    half_NC = out_of_fold(features_NA, labels_N, fold_N, fit, 2)
    names, paths = data.label_names, pictures.paths
    return {
        "doubtful": [{"path": str(paths[i]), "label": names[labels_N[i]], "likely": names[likely]}
                     for i, likely in doubtful(whole_NC, labels_N)[:DOUBTFUL]],
        "copies": [{"paths": [str(paths[i]), str(paths[j])], "labels": [names[labels_N[i]], names[labels_N[j]]]}
                   for i, j in near_copies(features_NA, labels_N)[:COPIES]],
        "more": more_pictures(whole_NC, half_NC, labels_N, np.array(data.class_counts), names)[:MORE],
    }


def folds(labels_N: Tensor) -> Tensor:
    """(N,), the fold of each picture; each class is spread evenly over the folds."""
    fold_N = torch.empty_like(labels_N)
    for c in labels_N.unique():
        at = (labels_N == c).nonzero()[:, 0]
        fold_N[at] = torch.arange(len(at)) % FOLDS
    return fold_N


def out_of_fold(features_NA: Tensor, labels_N: Tensor, fold_N: Tensor, fit: Fit, part: int) -> Tensor:
    """Probabilities (N, C) by last layers that saw every `part`-th picture of each class in the other folds."""
    found = []
    for fold in range(FOLDS):
        rest = (fold_N != fold).nonzero()[:, 0]
        seen = torch.cat([at[::part] for c in labels_N[rest].unique() for at in [rest[labels_N[rest] == c]]])
        weight, bias = fit(features_NA[seen], labels_N[seen], STEPS)
        found.append(F.linear(features_NA[fold_N == fold], weight, bias).softmax(1))
    probabilities_NC = torch.empty(len(labels_N), found[0].shape[1])
    for fold in range(FOLDS):
        probabilities_NC[fold_N == fold] = found[fold]
    return probabilities_NC


def doubtful(probabilities_NC: Tensor, labels_N: Tensor) -> list[tuple[int, int]]:
    """Pictures whose label is probably wrong, with their likely class; the surest first.

    A class is likely for a picture that has at least the mean probability of that class's own pictures for it.
    """
    own_N = probabilities_NC[range(len(labels_N)), labels_N]
    count_C = torch.bincount(labels_N, minlength=probabilities_NC.shape[1])
    sure_C = torch.zeros(len(count_C)).index_add_(0, labels_N, own_N) / count_C
    sure_C[count_C == 0] = torch.inf
    likely_N = torch.where(probabilities_NC >= sure_C, probabilities_NC, -1.0).max(1)
    at = ((likely_N.values >= 0) & (likely_N.indices != labels_N)).nonzero()[:, 0]
    order = (own_N[at] - likely_N.values[at]).argsort(stable=True)
    return [(int(i), int(likely_N.indices[i])) for i in at[order]]


def near_copies(features_NA: Tensor, labels_N: Tensor, block: int = 1024) -> list[tuple[int, int]]:
    """Pairs of pictures in different classes that look alike to the network, each picture once; the closest first."""
    unit_NA = F.normalize(features_NA - features_NA.mean(0))
    closest: list[tuple[float, int, int]] = []
    for rows in torch.arange(len(unit_NA)).split(block):
        cosines = unit_NA[rows] @ unit_NA.T
        cosines[labels_N[rows, None] == labels_N] = -1
        values, places = cosines.max(1)
        closest += [(float(v), int(i), int(j)) for v, i, j in zip(values, rows, places, strict=True) if v >= ALIKE]
    pairs, used = [], set[int]()
    for _, i, j in sorted(closest, reverse=True):
        if not used & {i, j}:
            pairs.append((min(i, j), max(i, j)))
            used |= {i, j}
    return pairs


def more_pictures(whole_NC: Tensor, half_NC: Tensor, labels_N: Tensor, counts_C: np.ndarray,
                  names: Sequence[str]) -> list[dict[str, Any]]:
    """Classes by how much their error would fall with ADDED more pictures, the most first.

    A class with n pictures and error e is expected to have e * (n / (n + ADDED)) ** b. The data set has one b: how the
    mean error over classes falls from half of the pictures to all. A class's error is shrunk towards the mean, which
    counts as two pictures.
    """
    def errors_C(probabilities_NC: Tensor) -> np.ndarray:
        wrong_N = (probabilities_NC.argmax(1) != labels_N).double().numpy()
        return np.bincount(labels_N, wrong_N, len(names)) / np.maximum(np.bincount(labels_N, minlength=len(names)), 1)

    here_C = np.bincount(labels_N, minlength=len(names))
    error_C, there_are = errors_C(whole_NC), here_C > 0
    mean, mean_of_half = error_C[there_are].mean(), errors_C(half_NC)[there_are].mean()
    slope = float(np.clip(np.log2(max(mean_of_half, 1e-9) / max(mean, 1e-9)), 0, 1))
    error_C = (error_C * here_C + 2 * mean) / (here_C + 2)
    later_C = error_C * (counts_C / (counts_C + ADDED)) ** slope
    order = np.argsort(later_C - error_C, kind="stable")
    return [{"label": names[c], "pictures": int(counts_C[c]), "error": float(error_C[c]), "then": float(later_C[c])}
            for c in order if there_are[c] and later_C[c] < error_C[c]]


def confused(test: Split | PictureFiles, predicted_N: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent pairs of class and wrong answer on the test set, with some of their pictures."""
    if not isinstance(test, PictureFiles):
        return []
    wrong = np.flatnonzero(predicted_N != test.labels)
    pairs, counts = np.unique(np.stack([test.labels[wrong], predicted_N[wrong]]), axis=1, return_counts=True)
    found = []
    for at in np.argsort(-counts, kind="stable")[:CONFUSED]:
        label, answer = pairs[:, at]
        some = wrong[(test.labels[wrong] == label) & (predicted_N[wrong] == answer)]
        found.append({"label": names[label], "answer": names[answer], "count": int(counts[at]),
                      "of": int((test.labels == label).sum()), "paths": [str(test.paths[i]) for i in some[:SHOWN]]})
    return found


def write_review(run: Path, parts: Mapping[str, Any]) -> None:
    """Add the parts to RUN/review.json."""
    path = run / REVIEW
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_atomically(path, (json.dumps({**known, **parts}, indent=1) + "\n").encode(errors="surrogateescape"))
