"""Exactly the pictures that MetaSAug's authors train on, with their shuffles and seeds.

Both choices depend only on the order of the pictures in each class. They are the authors' pictures only if the order is
that of the original files. Copies of test pictures stay in, as in the authors' code.
"""

import random
from collections.abc import Sequence

import numpy as np


def authors_meta(labels: np.ndarray, num_classes: int, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the meta pictures and of the rest, each in ascending order (build_dataset, np.random.seed(6))."""
    rng = np.random.RandomState(6)
    chosen: list[int] = []
    for c in range(num_classes):
        places = np.flatnonzero(labels == c).tolist()
        rng.shuffle(places)
        chosen += places[:per_class]
    meta = np.array(sorted(chosen), np.int64)
    return meta, np.setdiff1d(np.arange(len(labels)), meta)


def authors_long_tail(labels: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Places of the training pictures among those that the meta set left (random.seed(42)), in ascending order."""
    rng = random.Random(42)
    kept: list[int] = []
    for c, count in enumerate(counts):
        places = np.flatnonzero(labels == c).tolist()
        rng.shuffle(places)
        kept += places[:count]
    return np.array(sorted(kept), np.int64)
