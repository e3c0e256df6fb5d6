"""Your own pictures: class folders or a table. Meta and test sets that you do not give are cut by file name."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from training.data import splits as cuts
from training.data.datasets import LongTailed, PictureFiles, listed
from training.data.scan import Looked, glance_at, look_at
from training.data.tables import Listing, Problem, left_out_in_words, list_folder, list_table, refuse
from training.errors import DataError
from zoo.files import printable
from zoo.pixels import TO_TRAIN_ON, Reading
from zoo.tables import USUAL, Columns


@dataclass(frozen=True)
class CutRule:
    """How to cut splits that are not given: see training.data.splits."""

    meta_per_class: int = 0
    test_share: float = 0.2
    subset_seed: int = 0
    skip_bad: bool = False
    look: bool = True
    reading: Reading = TO_TRAIN_ON
    small_class: int = cuts.SMALL_CLASS

    def __post_init__(self):
        if not 0 < self.test_share < 1:
            raise DataError(f"--test-share {self.test_share:g}: must be between 0 and 1.")

    def meta_pictures(self, num_classes: int) -> int:
        return self.meta_per_class or cuts.meta_per_class(num_classes)


def load_folder(
    root: Path, *, test: Path | None = None, meta: Path | None = None, meta_per_class: int = 0,
    test_share: float = 0.2, subset_seed: int = 0, skip_bad: bool = False, look: bool = True,
    leaf_folders: bool = False, reading: Reading = TO_TRAIN_ON, small_class: int = cuts.SMALL_CLASS,
) -> LongTailed:
    """Class folders ROOT/CLASS/picture.jpg, or ROOT/train/CLASS with test/ (and val/ or meta/) beside it.

    test, meta   folders of the same classes, if they are elsewhere
    leaf_folders   every folder that contains pictures is a class, at any depth
    skip_bad     leave out pictures that cannot be decoded and classes too small to use, instead of stopping
    look         decode every picture once; without it damaged ones, copies and sizes remain unknown
    reading      how to read files that leave something open; the range of 16-bit grey is by default that of all
                 pictures
    small_class  classes with fewer training pictures keep their meta pictures in training too
    training.data.splits cuts the splits that are not given, and chooses meta_per_class if it is 0. Raises DataError.
    """
    rule = CutRule(meta_per_class, test_share, subset_seed, skip_bad, look, reading, small_class)
    return assemble(list_folder(root.expanduser(), test, meta, leaf_folders), rule)


def load_table(
    table: Path, root: Path | None = None, *, meta_per_class: int = 0, test_share: float = 0.2, subset_seed: int = 0,
    skip_bad: bool = False, look: bool = True, columns: Columns = USUAL, reading: Reading = TO_TRAIN_ON,
    small_class: int = cuts.SMALL_CLASS,
) -> LongTailed:
    """A table (zoo.tables) with a row per picture: path, label and, if it has these columns, split and group.

    root      folder that the paths start from; None: the table's own
    columns   their names, if they are not the usual ones
    A group (an animal, a track, a camera) is never divided between training and test. Otherwise as load_folder.
    """
    rule = CutRule(meta_per_class, test_share, subset_seed, skip_bad, look, reading, small_class)
    return assemble(list_table(table, root, columns), rule)


# ---- from a listing to a data set ----


ORDER = ("test", "val", "meta", "train")  # the first of them keeps a picture that is in several given splits


@dataclass
class _Parts:
    """bool (N,) for each split, and notes."""

    train: np.ndarray
    meta: np.ndarray
    test: np.ndarray
    shared: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


def assemble(listing: Listing, rule: CutRule) -> LongTailed:
    """Decode every picture once, leave out bad ones (or stop), take the given splits, cut the others."""
    left_out = refuse([*listing.problems, listing.empty_classes], rule.skip_bad)
    _check_left(listing, left_out)
    looked, reading, notes = _looked_at(listing, rule)
    reasons = tuple(looked.errors[i] for i in sorted(looked.errors))
    left_out += refuse([Problem(f"of {len(listing.names):,} pictures cannot be used", reasons,
                                "Repair or remove them")], rule.skip_bad)
    keep = np.array([i for i in range(len(listing.names)) if i not in looked.errors], np.int64)
    listing, keep = _without_small_classes(listing.at(keep), keep, rule, left_out)
    _check_left(listing, left_out)
    keys = [looked.keys[i] for i in keep]
    parts = (_given_parts if any(s not in (None, "train") for s in listing.splits) else _cut_parts)(
        listing, keys, rule, left_out)
    if not parts.test.any():
        raise DataError(" ".join(["No class has pictures to test on: every class is a single group or consists of "
                                  "copies. Give a separate test set.", *notes]))
    train, meta, test = (np.flatnonzero(part) for part in (parts.train, parts.meta, parts.test))
    files = PictureFiles(listing.root, tuple(listing.names), listing.labels,
                         looked.sizes[keep] if rule.look else None)
    moments = looked.moments[keep][train].mean(0)
    data = LongTailed(
        files.at(train), files.at(meta), files.at(test), listing.label_names, listing.source,
        *_mean_and_std(moments), shared_meta_classes=parts.shared,
        notes=(*listing.notes, *notes, *left_out_in_words(left_out), *parts.notes, *_contradictions(listing, keys)),
        left_out=tuple(left_out), reading=reading)
    _check_trainable(data)
    return data


def _looked_at(listing: Listing, rule: CutRule) -> tuple[Looked, Reading, list[str]]:
    """Scan all pictures; returns the findings, how to read them from now on, and notes."""
    look, reading = look_at if rule.look else glance_at, rule.reading
    given = [listing.root / name for name in listing.names], [printable(name) for name in listing.names]
    looked, notes = look(*given, reading), list[str]()
    if reading.white is None and (white := looked.remarks.white) not in (None, 65535):
        notes.append(f"White is {white:,} in 16-bit grey: the largest value of all pictures is "
                     f"{looked.remarks.deepest:,} (--white).")
        reading = replace(reading, white=white)
        looked = look(*given, reading)
    return looked, reading, notes + looked.remarks.in_words(reading)


def _without_small_classes(
    listing: Listing, keep: np.ndarray, rule: CutRule, left_out: list[str]
) -> tuple[Listing, np.ndarray]:
    """Without the classes that have no training picture left. A class of one picture is trained on and not tested."""
    classes = len(listing.label_names)
    trained = np.array([split in (None, "train") for split in listing.splits], bool)
    counts, others = (np.bincount(listing.labels[of], minlength=classes) for of in (trained, ~trained))
    small = np.flatnonzero(counts == 0)
    if not len(small):
        return listing, keep
    left_out += refuse([Problem(
        f"class{'es have' if len(small) > 1 else ' has'} no pictures to train on",
        tuple(f"the class {listing.label_names[c]} has no usable pictures"
              + (f" to train on, and {others[c]:,} to test on." if others[c] else ".") for c in small),
        "Add pictures, merge classes or remove them")], rule.skip_bad)
    rest, places = listing.without_classes(small.tolist())
    return rest, keep[places]


def _cut_parts(listing: Listing, keys: Sequence, rule: CutRule, _left_out: list[str]) -> _Parts:
    units = cuts.tie(listing.names, listing.groups, keys)
    classes = len(listing.label_names)
    test = cuts.cut_test(units, listing.labels, classes, rule.test_share, rule.subset_seed)
    meta, removed, shared = cuts.cut_meta(units, listing.names, listing.labels, ~test, classes,
                                          rule.meta_pictures(classes), rule.subset_seed, rule.small_class)
    parts = _Parts(~test & ~removed, meta, test, shared)
    parts.notes.append(f"Test set cut by file name: {test.sum():,} of {len(test):,} pictures, {rule.test_share:.0%} of "
                       "each class, at least 2 (1 in a class of 2 or 3).")
    parts.notes += _meta_notes(listing, shared, rule)
    untested = np.setdiff1d(np.arange(classes), listing.labels[test])
    if len(untested):
        parts.notes.append("Trained on but not tested, because they have only one picture, one group or copies of one "
                           "picture: " + listed([listing.label_names[c] for c in untested], ", ") + ".")
    return parts


def _given_parts(listing: Listing, keys: Sequence, rule: CutRule, left_out: list[str]) -> _Parts:
    """The splits as given. A missing test set is val, else cut from train; a missing meta set is cut from val, else
    from train."""
    splits = np.array([split or "train" for split in listing.splits])
    notes = []
    if "test" not in splits and "val" in splits:
        splits[splits == "val"] = "test"
        notes.append("No test set is given: val is the test set.")
    splits = _without_torn_groups(listing, splits, rule, left_out)
    splits = _without_copies(listing, keys, splits, notes)
    classes = len(listing.label_names)
    units = cuts.tie(listing.names, listing.groups, keys)
    if "test" not in splits:
        at = np.flatnonzero(splits == "train")
        some = listing.at(at)
        among = cuts.tie(some.names, some.groups, [keys[i] for i in at.tolist()])
        splits[at[cuts.cut_test(among, some.labels, classes, rule.test_share, rule.subset_seed)]] = "test"
        notes.append(f"Test set cut by file name: {(splits == 'test').sum():,} pictures.")
    train, test, meta = splits == "train", splits == "test", splits == "meta"
    shared: tuple[int, ...] = ()
    per_class = rule.meta_pictures(classes)

    def some_of_each(pool: np.ndarray) -> np.ndarray:
        return cuts.first_of_each(listing.names, listing.labels, pool, per_class, rule.subset_seed)

    if "val" in splits and not meta.any():
        meta = some_of_each(splits == "val")
        notes.append(f"Meta set: {meta.sum():,} pictures of val, {per_class} per class by file name; the other "
                     f"{(splits == 'val').sum() - meta.sum():,} are not used.")
    if not meta.any():
        meta, removed, shared = cuts.cut_meta(units, listing.names, listing.labels, train, classes,
                                              per_class, rule.subset_seed, rule.small_class)
        train &= ~removed
        notes += _meta_notes(listing, shared, rule)
    lacking = np.setdiff1d(listing.labels[train], listing.labels[meta])
    if len(lacking):  # a meta set was given, but not for every class
        lent = some_of_each(train & np.isin(listing.labels, lacking))
        meta |= lent
        shared = tuple(lacking.tolist())
        notes += _meta_notes(listing, shared, rule)
    return _Parts(train, meta, test, shared, notes)


def _meta_notes(listing: Listing, shared: Sequence[int], rule: CutRule) -> list[str]:
    if not shared:
        return []
    return ["Classes that share their meta pictures with training, because they have fewer than "
            f"{rule.small_class} left or can spare none: {len(shared)}. "
            + listed([listing.label_names[c] for c in shared], ", ") + "."]


def _without_torn_groups(
    listing: Listing, splits: np.ndarray, rule: CutRule, left_out: list[str]
) -> np.ndarray:
    """Keep a group that is in several given splits only in the first of test, val, meta, train."""
    seen: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(listing.groups or (), splits, strict=False):
        if group is not None:
            seen[group].add(str(split))
    torn = {group: min(found, key=ORDER.index) for group, found in seen.items() if len(found) > 1}
    left_out += refuse([Problem(
        "group ids are in more than one split, and pictures of one group are too alike to test on",
        tuple(f"{group} ({', '.join(sorted(seen[group]))})." for group in sorted(torn)),
        "Give each group one split, remove the split column (each group then gets one)")], rule.skip_bad)
    return np.array([split if group is None or torn.get(group, split) == split else "left out"
                     for group, split in zip(listing.groups or [None] * len(splits), splits.tolist(), strict=True)])


def _without_copies(listing: Listing, keys: Sequence, splits: np.ndarray, notes: list[str]) -> np.ndarray:
    """Keep copies that are in several given splits only in the first of test, val, meta, train."""
    splits = splits.copy()
    taken: dict[bytes, int] = {}
    dropped = []
    for split in ORDER:
        at = np.flatnonzero(splits == split)
        for i in at.tolist():
            if keys[i] is not None and keys[i] in taken and splits[taken[keys[i]]] != split:
                dropped.append(f"{printable(listing.names[i])} = {printable(listing.names[taken[keys[i]]])}")
                splits[i] = "copy"
        for i in at.tolist():
            if splits[i] != "copy":
                taken.setdefault(keys[i], i)
    if dropped:
        notes.append(f"Left out, {len(dropped):,} pictures that are copies of a picture in another split: "
                     + listed(dropped, "; ") + ".")
    return splits


def _contradictions(listing: Listing, keys: Sequence) -> list[str]:
    """A note on pictures with the same content in two classes: their labels contradict each other."""
    first: dict[bytes, int] = {}
    pairs = [f"{printable(listing.names[first[key]])} = {printable(listing.names[i])}"
             for i, key in enumerate(keys)
             if key is not None and listing.labels[first.setdefault(key, i)] != listing.labels[i]]
    if not pairs:
        return []
    return [f"Pictures with the same content in two classes, which no model can get both right: {len(pairs):,}. "
            + listed(pairs, "; ") + "."]


def _mean_and_std(moments: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean, square = moments
    std = np.sqrt(np.maximum(square - mean**2, 1e-4))
    return tuple(np.round(mean, 4).tolist()), tuple(np.round(std, 4).tolist())  # type: ignore[return-value]


def _check_left(listing: Listing, left_out: Sequence[str]) -> None:
    """Raise DataError if fewer than two classes are left."""
    names = listing.label_names
    if len(names) > 1:
        return
    what = f"there is one class only, {names[0]}: nothing to tell apart" if names else "no picture is left to use"
    inner = (f" Its pictures are in separate folders ({listed(listing.inner, ', ', 3)}): with --leaf-folders each "
             "of them is a class." if listing.inner else "")
    raise DataError(f"{listing.source}: {what}.{inner}"
                    + (f" Not usable, {len(left_out):,}: {listed(left_out, ' ', 3)}" if left_out else ""))


def _check_trainable(data: LongTailed) -> None:
    without = [data.label_names[c] for c, n in enumerate(data.class_counts) if n == 0]
    if without:
        raise DataError(f"{len(without)} classes have no training pictures: {listed(without, ', ')}. Add some, or "
                        "remove the classes.")
