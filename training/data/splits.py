"""Cut test and meta sets from your own pictures by file name: the same names always give the same split.

Test: of each class, the pictures whose hash (of name and seed) is in the lowest `share`; at least 2 and at most a
third, of fewer than 6 pictures half. Meta: of what is left, `meta_per_class` pictures by another hash, at most a
quarter. In a class with few left (under 20; under 8 if training ends with the meta set) the meta pictures also stay in
training.

Pictures that belong together (one animal, one track, one camera; copies of one file) are one unit, and a unit is never
divided. Its hash is that of its group id or, without one, of its first name. Adding pictures never moves existing ones
between splits, except in classes small enough to hit the minimum or maximum.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from zoo.files import same_text

# Classes with fewer training pictures keep their meta pictures in training. The first is the tail of zoo.labels; the
# second is for training that ends with the meta set, so a class misses its pictures only for a while.
SMALL_CLASS, SMALL_FOR_A_WHILE = 20, 8
META_PER_CLASS, META_IN_ALL = 10, 100


@dataclass(frozen=True)
class Units:
    """Pictures that must stay in one split. of: int64 (N,), the unit of each picture; names: one per unit, to hash."""

    of: np.ndarray
    names: tuple[str, ...]

    def members(self) -> list[np.ndarray]:
        order = np.argsort(self.of, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.of, minlength=len(self.names)))[:-1])


def tie(names: Sequence[str], group_ids: Sequence[str | None] | None = None,
        contents: Sequence[Hashable] | None = None) -> Units:
    """Join pictures with the same group id or the same content into units; one picture may link two units."""
    parent = list(range(len(names)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for keys in (group_ids, contents):
        first: dict[Hashable, int] = {}
        for i, key in enumerate(keys or ()):
            if key is not None:
                parent[root(i)] = root(first.setdefault(key, i))
    roots = np.array([root(i) for i in range(len(names))], np.int64)
    _, of = np.unique(roots, return_inverse=True)
    ids: dict[int, str] = {}
    for i, unit in enumerate(of.tolist()):
        group = group_ids[i] if group_ids is not None else None
        # A group id sorts before every name, so a group is hashed by its id.
        own = f"0 {group}" if group is not None else f"1 {same_text(names[i])}"
        ids[unit] = min(ids.get(unit, own), own)
    return Units(of, tuple(ids[unit] for unit in range(len(ids))))


def draw(name: str, purpose: str, seed: int) -> float:
    """A number in [0, 1) that depends only on its arguments."""
    text = f"{seed}\0{purpose}\0{same_text(name)}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


def cut_test(units: Units, labels: np.ndarray, num_classes: int, share: float, seed: int) -> np.ndarray:
    """bool (N,): the test pictures, by the rule above.

    A class has none if a cut would divide a unit or leave no training pictures.
    """
    total = np.bincount(labels, minlength=num_classes)
    least = np.minimum(2, total // 2)
    most = np.maximum(least, total // 3)
    usual = np.minimum(np.maximum(most, np.ceil(share * total).astype(int)), total - 1).tolist()
    at_most_half = np.maximum(most, total // 2).tolist()
    members = units.members()
    classes = [Counter(labels[m].tolist()) for m in members]
    drawn = [draw(name, "test", seed) for name in units.names]
    in_order = sorted(range(len(members)), key=drawn.__getitem__)
    chosen = np.zeros(len(labels), bool)
    taken = [0] * num_classes

    def take_if(unit: int, limit: list[int]) -> None:
        if not chosen[members[unit][0]] and all(taken[c] + n <= limit[c] for c, n in classes[unit].items()):
            chosen[members[unit]] = True
            for c, n in classes[unit].items():
                taken[c] += n

    for unit in in_order:
        if drawn[unit] < share:
            take_if(unit, usual)
    lacking: dict[int, list[int]] = {c: [] for c in range(num_classes) if taken[c] < least[c]}
    for unit in in_order:
        for c in classes[unit].keys() & lacking.keys():
            lacking[c].append(unit)
    for c, candidates in lacking.items():
        for unit in candidates:
            if taken[c] < least[c]:
                take_if(unit, at_most_half)
    return chosen


def meta_per_class(num_classes: int) -> int:
    """Default number of meta pictures per class: more for few classes, because the meta set decides between models."""
    return max(META_PER_CLASS, -(-META_IN_ALL // num_classes))


def cut_meta(
    units: Units, names: Sequence[str], labels: np.ndarray, available: np.ndarray, num_classes: int, per_class: int,
    seed: int, small: int = SMALL_CLASS,
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Cut the meta set from the pictures that are `available` (bool (N,)).

    Returns bool (N,), the meta pictures; bool (N,), the meta pictures that leave training; and the classes whose meta
    pictures stay in training: they have fewer than `small` pictures, or no unit small enough to leave.
    """
    left = np.bincount(labels[available], minlength=num_classes)
    most = np.where(left < small, 0, left // 4).tolist()
    wanted = [min(per_class, n) for n in most]
    members = [left_of for m in units.members() if len(left_of := m[available[m]])]
    drawn = [draw(units.names[units.of[m[0]]], "meta", seed) for m in members]
    removed = np.zeros(len(labels), bool)
    taken = [0] * num_classes
    for i in sorted(range(len(members)), key=drawn.__getitem__):
        classes = Counter(labels[members[i]].tolist())
        if any(taken[c] < wanted[c] for c in classes) and all(taken[c] + n <= most[c] for c, n in classes.items()):
            removed[members[i]] = True
            for c, n in classes.items():
                taken[c] += n
    shared = [c for c in range(num_classes) if not taken[c] and left[c]]
    return removed | first_of_each(names, labels, available & np.isin(labels, shared), per_class, seed), removed, tuple(
        shared)


def first_of_each(names: Sequence[str], labels: np.ndarray, pool: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """bool (N,): `per_class` pictures of each class, from the pool (bool (N,)), by the hash of their names."""
    chosen = np.zeros(len(labels), bool)
    count: Counter[int] = Counter()
    for i in sorted(np.flatnonzero(pool).tolist(), key=lambda i: draw(names[i], "meta", seed)):
        if count[int(labels[i])] < per_class:
            count[int(labels[i])] += 1
            chosen[i] = True
    return chosen


def rank_in_class(labels_N: np.ndarray) -> np.ndarray:
    """How many earlier ones have the same label, (N,)."""
    by_class = np.argsort(labels_N, kind="stable")
    sorted_N = labels_N[by_class]
    rank_N = np.empty_like(by_class)
    rank_N[by_class] = np.arange(len(labels_N)) - np.searchsorted(sorted_N, sorted_N)
    return rank_N
