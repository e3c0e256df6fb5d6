"""The semantic directions of a class: how its pictures vary in feature space, and which classes they then resemble.

Shape suffixes: C classes, A features, K directions.
"""

from dataclasses import dataclass

import numpy as np

from zoo.errors import ModelFolderError, ZooError
from zoo.model_folder import COVARIANCE, ModelFolder


@dataclass(frozen=True)
class Direction:
    """One direction d of variation of a class c.

    share     of the class's total variance            spread    standard deviation along d, in units of features
    vector_A  d, of length 1; it points towards the class whose w_j - w_c has the largest component along it
    lean_C    cosine between d and w_j - w_c: 1 if a step along d is a step towards class j; 0 for c itself
    shift_C   spread * (w_j - w_c) . d: how much one standard deviation raises the logit of j over that of c
    """

    share: float
    spread: float
    vector_A: np.ndarray
    lean_C: np.ndarray
    shift_C: np.ndarray


@dataclass(frozen=True)
class Variation:
    """How a class varies: its largest directions, and the effect of all of them together in the method.

    kind           full (directions are eigenvectors) or diagonal (they are single features)
    features       A
    learned_share  relative size of the learned correction: |learned| / |running + learned|
    pull_C         (w_j - w_c)' S_c (w_j - w_c), the variance of the logits' difference: how hard the augmentation
                   of this class trains against class j
    """

    kind: str
    features: int
    directions: tuple[Direction, ...]
    learned_share: float
    pull_C: np.ndarray


def last_layer(folder: ModelFolder) -> np.ndarray:
    """(C, A) weight of the last layer; rows of length 1 for a cosine classifier.

    Raises ModelFolderError if the folder has no weight under the name in its config.
    """
    name = folder.config["pretrained_cfg"].get("classifier", "fc") + ".weight"
    weight_CA = folder.weights().get(name)
    expected = (folder.config["num_classes"], folder.config["num_features"])
    if weight_CA is None or weight_CA.shape != expected:
        raise ModelFolderError(f"{folder.path} has no {name} of shape {expected}.")
    weight_CA = weight_CA.astype(np.float32)
    if folder.config["metasaug"].get("cosine_scale"):
        weight_CA /= np.linalg.norm(weight_CA, axis=1, keepdims=True).clip(1e-12)
    return weight_CA


def variation(folder: ModelFolder, index: int, count: int = 5) -> Variation:
    """The `count` largest directions of variation of class `index`, from S = running + learned covariance.

    Raises ZooError if the model has no covariances, ModelFolderError if they do not fit it.
    """
    if COVARIANCE not in folder:
        raise ZooError(f"{folder.config['metasaug']['name']} was trained without class covariances: it has no "
                       "directions to show.")
    weight_CA = last_layer(folder)
    tensors = folder.covariance()
    classes, features = weight_CA.shape
    for name in ("running", "learned"):
        if name not in tensors or tensors[name].shape not in ((classes, features), (classes, features, features)):
            raise ModelFolderError(f"{folder.path / COVARIANCE}: {name} must be ({classes}, {features}) or "
                                   f"({classes}, {features}, {features}).")
    learned, whole = (np.asarray(x, np.float64) for x in (
        tensors["learned"][index], tensors["running"][index] + tensors["learned"][index]))
    ahead_CA = (weight_CA - weight_CA[index]).astype(np.float64)
    if whole.ndim == 1:
        variances_A = whole.clip(0)
        chosen = np.argsort(-variances_A, kind="stable")[:count]
        vectors_KA = np.eye(features)[chosen]
        pull_C = (ahead_CA**2) @ variances_A
    else:
        values_A, columns_AA = np.linalg.eigh((whole + whole.T) / 2)
        variances_A = values_A.clip(0)
        chosen = np.argsort(-variances_A, kind="stable")[:count]
        vectors_KA = columns_AA.T[chosen]
        pull_C = np.einsum("ca,ab,cb->c", ahead_CA, whole, ahead_CA, optimize=True).clip(0)
    total, size = float(variances_A.sum()), float(np.linalg.norm(whole))
    return Variation(
        "full" if whole.ndim == 2 else "diagonal", features,
        tuple(_direction(vector_A, float(variances_A[a]), total, ahead_CA)
              for vector_A, a in zip(vectors_KA, chosen, strict=True) if variances_A[a] > 0),
        float(np.linalg.norm(learned)) / size if size else 0.0, pull_C)


def _direction(vector_A: np.ndarray, variance: float, total: float, ahead_CA: np.ndarray) -> Direction:
    along_C = ahead_CA @ vector_A
    if abs(along_C.min()) > along_C.max():
        vector_A, along_C = -vector_A, -along_C
    spread = variance**0.5
    return Direction(variance / total, spread, vector_A, along_C / np.linalg.norm(ahead_CA, axis=1).clip(1e-12),
                     spread * along_C)
