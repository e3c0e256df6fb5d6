"""Your own pictures: class folders or a table, with meta and test sets cut by file name where none are given."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from training import cuts
from training.datasets import (
    PICTURE_SUFFIXES,
    LongTailed,
    PictureFiles,
    find_classes,
    find_files,
    listed,
    printable,
)
from training.errors import DataError
from training.looking import look_at

# Pictures by their ending that zoo.images does not read: named like damaged ones, never passed over in silence.
UNSUPPORTED_SUFFIXES = {".heic", ".heif", ".svg", ".jxl", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"}

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test", "testing": "test", "meta": "meta"}


@dataclass(frozen=True)
class Listing:
    """Labelled pictures as somebody keeps them, before any cut.

    names    relative to root          labels   int64 (N,)
    splits   train, val, test, meta, or None where that is not said
    groups   what must not be parted (an animal, a track, a camera), or None
    """

    root: Path
    source: str
    names: Sequence[str]
    labels: np.ndarray
    label_names: tuple[str, ...]
    splits: Sequence[str | None]
    groups: Sequence[str | None] | None = None
    notes: tuple[str, ...] = ()

    def at(self, keep: np.ndarray) -> "Listing":
        def take(values: Sequence) -> list:
            return [values[i] for i in keep]

        return Listing(self.root, self.source, take(self.names), self.labels[keep], self.label_names,
                       take(self.splits), None if self.groups is None else take(self.groups), self.notes)

    def without_classes(self, gone: Iterable[int]) -> "tuple[Listing, np.ndarray]":
        """The rest with its classes numbered anew, and the places of its pictures."""
        gone = set(gone)
        kept = [c for c in range(len(self.label_names)) if c not in gone]
        place = {c: i for i, c in enumerate(kept)}
        keep = np.flatnonzero([int(c) in place for c in self.labels])
        rest = self.at(keep)
        return Listing(rest.root, rest.source, rest.names, np.array([place[int(c)] for c in rest.labels], np.int64),
                       tuple(self.label_names[c] for c in kept), rest.splits, rest.groups, rest.notes), keep


@dataclass(frozen=True)
class CutRule:
    """How to cut what is not given: see training.cuts."""

    meta_per_class: int = 10
    test_share: float = 0.2
    subset_seed: int = 0
    meta_in_training: bool = False
    skip_bad: bool = False

    def __post_init__(self):
        if not 0 < self.test_share < 1:
            raise DataError(f"--test-share {self.test_share:g}: the share of a class to test on, between 0 and 1.")


# ---- class folders ----


def load_folder(
    root: Path, *, test: Path | None = None, meta: Path | None = None, meta_per_class: int = 10,
    test_share: float = 0.2, subset_seed: int = 0, meta_in_training: bool = False, skip_bad: bool = False,
) -> LongTailed:
    """Class folders ROOT/CLASS/picture.jpg, or ROOT/train/CLASS with test/ (and val/ or meta/) beside it.

    test, meta   folders of the same classes, where they are kept elsewhere
    skip_bad     leave out pictures that cannot be decoded and classes too small to use, instead of stopping
    Every picture is decoded once. What is not given is cut by training.cuts. Raises DataError.
    """
    rule = CutRule(meta_per_class, test_share, subset_seed, meta_in_training, skip_bad)
    return assemble(list_folder(root.expanduser(), test, meta, skip_bad), rule)


def list_folder(root: Path, test: Path | None = None, meta: Path | None = None, skip_bad: bool = False) -> Listing:
    """The pictures of class folders, and of the split folders above them where there are such."""
    parts = _split_folders(root)
    if test is not None:
        parts["test"] = test.expanduser()
    if meta is not None:
        parts["meta"] = meta.expanduser()
    training_folder = parts["train"]
    title = (root if SPLIT_NAMES.get(root.name.casefold()) != "train" else root.resolve().parent).resolve().name
    if len(parts) == 1:
        root = training_folder  # names, and with them the cut, do not change where train/ is named itself
    class_names = find_classes(training_folder)
    place = {name: c for c, name in enumerate(class_names)}
    names: list[str] = []
    labels: list[int] = []
    splits: list[str | None] = []
    empty, others, notes = [], Counter[str](), []
    for split, folder in parts.items():
        for name in find_classes(folder):
            files = find_files(folder / name)
            found = [file for file in files if _suffix(file) in PICTURE_SUFFIXES | UNSUPPORTED_SUFFIXES]
            others.update(_suffix(file) or "without ending" for file in set(files) - set(found))
            if name not in place and found:
                raise DataError(f"{folder} has the class {name}, which {training_folder} has not: a model cannot be "
                                "tested on what it never sees. Rename or remove the folder.")
            if not found and split == "train":
                empty.append(name)
            names += [os.path.relpath(folder / name / file, root) for file in found]
            labels += [place[name]] * len(found) if found else []
            splits += [None if len(parts) == 1 else split] * len(found)
    if len(class_names) == 1:
        inside = find_classes_quietly(training_folder / class_names[0])
        hint = f" It holds folders itself ({', '.join(inside[:3])} …): did you mean that one?" if inside else ""
        raise DataError(f"{training_folder} has one class only, {class_names[0]}: nothing to tell apart.{hint}")
    loose = sum(_suffix(file) in PICTURE_SUFFIXES for file in os.listdir(training_folder))
    if loose:
        notes.append(f"{loose:,} pictures lie in {training_folder} itself, in no class: they are not used.")
    if others:
        notes.append("No pictures by their ending, and not used: "
                     + ", ".join(f"{n:,} {suffix}" for suffix, n in others.most_common(5)) + ".")
    listing = Listing(root, f"{title} (class folders)", names, np.array(labels, np.int64),
                      tuple(class_names), splits, notes=tuple(notes))
    if empty:
        _refuse(f"{len(empty)} class folder{'s hold' if len(empty) > 1 else ' holds'} no pictures", empty,
                "Fill or remove them", skip_bad)
        listing, _ = listing.without_classes(place[name] for name in empty)
        return Listing(**{**vars(listing), "notes": (*notes, "Left out, classes without pictures: "
                                                     + listed(empty, ", ") + ".")})
    return listing


def _split_folders(root: Path) -> dict[str, Path]:
    """{"train": root}, or the folders train, val, test, meta in it where it holds nothing else."""
    folders = find_classes(root)
    named = [SPLIT_NAMES.get(name.casefold()) for name in folders]
    if "train" not in named or None in named or not find_classes_quietly(root / folders[named.index("train")]):
        return {"train": root}
    parts: dict[str, Path] = {}
    for split, name in sorted(zip(named, folders, strict=True), key=lambda pair: pair[0] != "train"):
        if split in parts:
            raise DataError(f"{root} holds {parts[split].name}/ and {name}/, two folders of one meaning: join them.")
        parts[str(split)] = root / name
    return parts


def find_classes_quietly(folder: Path) -> list[str]:
    try:
        return find_classes(folder)
    except DataError:
        return []


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# ---- from a listing to a data set ----


@dataclass
class _Parts:
    """bool (N,) for each split, and what was said on the way."""

    train: np.ndarray
    meta: np.ndarray
    test: np.ndarray
    shared: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


def assemble(listing: Listing, rule: CutRule) -> LongTailed:
    """Decode every picture once, leave out what is bad (or stop), take the given splits, cut those not given."""
    looked = look_at([listing.root / name for name in listing.names], [printable(name) for name in listing.names])
    notes = list(listing.notes)
    if looked.errors:
        reasons = [looked.errors[i] for i in sorted(looked.errors)]
        _refuse(f"{len(reasons):,} of {len(listing.names):,} pictures cannot be used", reasons,
                "Mend or remove them", rule.skip_bad)
        notes.append(f"Left out, {len(reasons):,} of {len(listing.names):,} pictures, unreadable: "
                     + listed(reasons, " "))
    keep = np.array([i for i in range(len(listing.names)) if i not in looked.errors], np.int64)
    listing, keep = _without_small_classes(listing.at(keep), keep, rule, notes)
    keys = [looked.keys[i] for i in keep]
    parts = (_given_parts if any(s not in (None, "train") for s in listing.splits) else _cut_parts)(listing, keys, rule)
    if not parts.test.any():
        raise DataError("no class has pictures to test on: every class is a single group or full of copies. Give a "
                        "test set of its own.")
    train, meta, test = (np.flatnonzero(part) for part in
                         (parts.train | parts.meta if rule.meta_in_training else parts.train, parts.meta, parts.test))
    files = PictureFiles(listing.root, tuple(listing.names), listing.labels, looked.sizes[keep])
    moments = looked.moments[keep][train].mean(0)
    data = LongTailed(
        files.at(train), files.at(meta), files.at(test), listing.label_names, listing.source,
        *_mean_and_std(moments), shared_meta_classes=parts.shared,
        notes=(*notes, *parts.notes, *_contradictions(listing, keys)))
    _check_trainable(data)
    return data


def _without_small_classes(
    listing: Listing, keep: np.ndarray, rule: CutRule, notes: list[str]
) -> tuple[Listing, np.ndarray]:
    """Without the classes that nothing is left of and, where a test set is to be cut, those of one picture."""
    counts = np.bincount(listing.labels, minlength=len(listing.label_names))
    least = 1 if any(s in ("test", "val") for s in listing.splits) else 2
    small = np.flatnonzero(counts < least)
    if not len(small):
        return listing, keep
    names = [f"{listing.label_names[c]} ({counts[c]})" for c in small]
    _refuse(f"{len(names)} class{'es have' if len(names) > 1 else ' has'} fewer than {least} usable "
            f"picture{'s' if least > 1 else ''}" + (", one to train and one to test on" if least > 1 else ""), names,
            "Add pictures, join classes or remove them", rule.skip_bad)
    notes.append("Left out, classes with too few pictures: " + listed(names, ", ") + ".")
    rest, places = listing.without_classes(small.tolist())
    return rest, keep[places]


def _cut_parts(listing: Listing, keys: Sequence, rule: CutRule) -> _Parts:
    units = cuts.tie(listing.names, listing.groups, keys)
    classes = len(listing.label_names)
    test = cuts.cut_test(units, listing.labels, classes, rule.test_share, rule.subset_seed)
    meta, removed, shared = cuts.cut_meta(units, listing.names, listing.labels, ~test, classes, rule.meta_per_class,
                                          rule.subset_seed)
    parts = _Parts(~test & ~removed, meta, test, shared)
    parts.notes.append(f"Test set cut by file name: {test.sum():,} of {len(test):,} pictures, at least 2 a class and "
                       "at most a third.")
    parts.notes += _meta_notes(listing, shared, rule)
    untested = np.setdiff1d(np.arange(classes), listing.labels[test])
    if len(untested):
        parts.notes.append("Without test pictures, being a single group or copies of one picture: "
                           + listed([listing.label_names[c] for c in untested], ", ") + ".")
    return parts


def _given_parts(listing: Listing, keys: Sequence, rule: CutRule) -> _Parts:
    """The splits as given. Without test, val is the test set; without meta, it is cut from val, else from train."""
    splits = np.array([split or "train" for split in listing.splits])
    notes = []
    if "test" not in splits:
        if "val" not in splits:
            raise DataError("a meta set is given and no test set: name one with --test, or let both be cut.")
        splits[splits == "val"] = "test"
        notes.append("No test set is given: val is tested on.")
    _check_groups(listing, splits)
    splits = _without_copies(listing, keys, splits, notes)
    classes = len(listing.label_names)
    units = cuts.tie(listing.names, listing.groups, keys)
    train, test, meta = splits == "train", splits == "test", splits == "meta"
    shared: tuple[int, ...] = ()
    if "val" in splits and not meta.any():
        meta = _first_of_each(listing, splits == "val", rule)
        notes.append(f"Meta set: {meta.sum():,} pictures of val, {rule.meta_per_class} a class by file name; the other "
                     f"{(splits == 'val').sum() - meta.sum():,} are not used.")
    if not meta.any():
        meta, removed, shared = cuts.cut_meta(units, listing.names, listing.labels, train, classes,
                                              rule.meta_per_class, rule.subset_seed)
        train &= ~removed
        notes += _meta_notes(listing, shared, rule)
    lacking = np.setdiff1d(listing.labels[train], listing.labels[meta])
    if len(lacking):  # a meta set was given, and not for every class
        lent = _first_of_each(listing, train & np.isin(listing.labels, lacking), rule)
        meta |= lent
        shared = tuple(lacking.tolist())
        notes += _meta_notes(listing, shared, rule)
    return _Parts(train, meta, test, shared, notes)


def _first_of_each(listing: Listing, pool: np.ndarray, rule: CutRule) -> np.ndarray:
    """bool (N,): of each class, `meta_per_class` pictures of the pool, by the hash of their names."""
    chosen = np.zeros(len(pool), bool)
    for c in np.unique(listing.labels[pool]):
        places = np.flatnonzero(pool & (listing.labels == c)).tolist()
        drawn = sorted(places, key=lambda i: cuts.draw(listing.names[i], "meta", rule.subset_seed))
        chosen[drawn[: rule.meta_per_class]] = True
    return chosen


def _meta_notes(listing: Listing, shared: Sequence[int], rule: CutRule) -> list[str]:
    if not shared:
        return []
    return [f"{len(shared)} classes with fewer than {cuts.SMALL_CLASS} pictures left (or of one group) share their "
            "meta pictures with training: " + listed([listing.label_names[c] for c in shared], ", ") + "."]


def _check_groups(listing: Listing, splits: np.ndarray) -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(listing.groups or (), splits, strict=False):
        if group is not None:
            seen[group].add(str(split))
    torn = sorted(group for group, found in seen.items() if len(found) > 1)
    if torn:
        raise DataError(f"{len(torn):,} group ids stand in more than one split, and pictures of one group are too "
                        "alike to test on: " + listed([f"{g} ({', '.join(sorted(seen[g]))})" for g in torn], "; ")
                        + ". Give each group one split, or leave the split column out and let it be cut.")


def _without_copies(listing: Listing, keys: Sequence, splits: np.ndarray, notes: list[str]) -> np.ndarray:
    """A content that stands in two given splits stays in the one named first: test, val, meta, train."""
    splits = splits.copy()
    taken: dict[bytes, int] = {}
    dropped = []
    for split in ("test", "val", "meta", "train"):
        at = np.flatnonzero(splits == split)
        for i in at.tolist():
            if keys[i] in taken and splits[taken[keys[i]]] != split:
                dropped.append(f"{printable(listing.names[i])} = {printable(listing.names[taken[keys[i]]])}")
                splits[i] = "copy"
        for i in at.tolist():
            if splits[i] != "copy":
                taken.setdefault(keys[i], i)
    if dropped:
        notes.append(f"Left out, {len(dropped):,} pictures that are copies of one in another split: "
                     + listed(dropped, "; ") + ".")
    return splits


def _contradictions(listing: Listing, keys: Sequence) -> list[str]:
    """Pictures that stand in two classes with the same content: somebody was not sure."""
    first: dict[bytes, int] = {}
    pairs = [f"{printable(listing.names[first[key]])} = {printable(listing.names[i])}"
             for i, key in enumerate(keys)
             if listing.labels[first.setdefault(key, i)] != listing.labels[i]]
    if not pairs:
        return []
    return [f"{len(pairs):,} pictures stand in two classes with the same content, which no model can get right: "
            + listed(pairs, "; ") + "."]


def _mean_and_std(moments: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean, square = moments
    std = np.sqrt(np.maximum(square - mean**2, 1e-4))
    return tuple(np.round(mean, 4).tolist()), tuple(np.round(std, 4).tolist())  # type: ignore[return-value]


def _check_trainable(data: LongTailed) -> None:
    without = [data.label_names[c] for c, n in enumerate(data.class_counts) if n == 0]
    if without:
        raise DataError(f"{len(without)} classes have no training pictures: {listed(without, ', ')}. Add some, or "
                        "remove the classes.")
    if len(data.label_names) < 2:
        raise DataError(f"there is one class only, {data.label_names[0]}: nothing to tell apart.")


def _refuse(what: str, each: Sequence[str], remedy: str, skip_bad: bool) -> None:
    if not skip_bad:
        raise DataError(f"{what}:\n  {listed(each, chr(10) + '  ')}\n{remedy}, or leave them out with --skip-bad.")
