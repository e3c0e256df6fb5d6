"""Class folders or a table, read as a list of labelled pictures."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from training.data.datasets import check_class_names, listed
from training.errors import DataError
from zoo.files import folder_identity, left_behind, passed_over_in_words, same_text, walk
from zoo.tables import COLUMN_NAMES, USUAL, Columns, OnDisk, read_table, value

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test", "testing": "test", "meta": "meta"}

@dataclass(frozen=True)
class Listing:
    """Labelled pictures in folders or a table, before they are split.

    names    relative to root          labels   int64 (N,)
    splits   train, val, test, meta; None: not given
    groups   pictures of one group (an animal, a track, a camera) stay in one split; None: no group
    problems    what cannot be listed
    empty       class folders without pictures
    inner       folders of pictures in class folders that hold no picture themselves
    """

    root: Path
    source: str
    names: Sequence[str]
    labels: np.ndarray
    label_names: tuple[str, ...]
    splits: Sequence[str | None]
    groups: Sequence[str | None] | None = None
    notes: tuple[str, ...] = ()
    problems: tuple["Problem", ...] = ()
    empty: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()

    @property
    def empty_classes(self) -> "Problem":
        return Problem("class folder holds no pictures" if len(self.empty) == 1 else "class folders hold no pictures",
                       tuple(f"{name} holds no pictures." for name in self.empty), "Fill or remove them")

    def at(self, keep: np.ndarray) -> "Listing":
        def take(values: Sequence) -> list:
            return [values[i] for i in keep]

        return replace(self, names=take(self.names), labels=self.labels[keep], splits=take(self.splits),
                       groups=None if self.groups is None else take(self.groups))

    def without_classes(self, gone: Iterable[int]) -> "tuple[Listing, np.ndarray]":
        """The rest, with new class numbers, and the places of its pictures in this listing."""
        gone = set(gone)
        kept = [c for c in range(len(self.label_names)) if c not in gone]
        place = {c: i for i, c in enumerate(kept)}
        keep = np.flatnonzero([int(c) in place for c in self.labels])
        rest = self.at(keep)
        return replace(rest, labels=np.array([place[int(c)] for c in rest.labels], np.int64),
                       label_names=tuple(self.label_names[c] for c in kept)), keep


@dataclass(frozen=True)
class Problem:
    """Items that cannot be used, of one kind. `each` has a sentence per item."""

    what: str
    each: tuple[str, ...]
    remedy: str


def refuse(problems: Iterable[Problem], skip_bad: bool) -> list[str]:
    """Raise one DataError that counts each kind of problem and names the first few items.

    With `skip_bad`, return the sentences of all items, which the caller then leaves out.
    """
    problems = [problem for problem in problems if problem.each]
    if problems and not skip_bad:
        raise DataError("\n".join(f"{len(problem.each):,} {problem.what}:\n  " + listed(problem.each, "\n  ")
                                  + f"\n{problem.remedy}, or leave them out with --skip-bad." for problem in problems))
    return [reason for problem in problems for reason in problem.each]


def left_out_in_words(left_out: Sequence[str]) -> list[str]:
    """A note on what `skip_bad` left out; an empty list if nothing."""
    return [f"Left out, {len(left_out):,}: " + listed(left_out, " ")] if left_out else []


# ---- class folders ----


def list_folder(
    root: Path, test: Path | None = None, meta: Path | None = None, leaf_folders: bool = False
) -> Listing:
    """The pictures of class folders, with the split folders above them if there are any.

    leaf_folders  every folder that contains pictures is a class, at any depth; by default the outermost folders are
    Raises DataError: no folder, no class folder, names that clash.
    """
    parts = _split_folders(root)
    parts |= {split: folder.expanduser() for split, folder in (("test", test), ("meta", meta)) if folder is not None}
    first = next(iter(parts.values()))
    title = (root if SPLIT_NAMES.get(root.name.casefold()) != "train" else root.resolve().parent).resolve().name
    if len(parts) == 1:
        root = first  # the same names, and so the same split, whether --data is train/ or its parent
    splits, folders, names = [], [], []  # of each picture
    unread, passed_over, notes = [], Counter[str](), []
    for split, part in parts.items():
        check_class_names(class_folders(part), str(part))
        prefix = os.path.relpath(part, root).replace(os.sep, "/") + "/"
        loose = 0
        for name, reason in walk(part, passed_over):
            folder = name.rpartition("/")[0]
            if reason is not None:
                unread.append(reason)
            elif folder:
                splits.append(None if len(parts) == 1 else split)
                folders.append(same_text(folder))
                names.append(name if prefix == "./" else prefix + name)
            else:
                loose += 1
        if loose:
            notes.append(f"Not used, because they are in {part} itself and not in a class folder: {loose:,} pictures.")
    class_of = _leaves(set(folders)) if leaf_folders else {folder: folder.partition("/")[0] for folder in folders}
    label_names = tuple(sorted(set(class_of.values())))
    check_class_names(label_names, str(root))
    place = {name: c for c, name in enumerate(label_names)}
    inner = [] if leaf_folders else _only_folders(set(folders))
    if inner:
        notes.append(f"Class folders that hold only folders ({listed(inner, ', ', 3)}) count as one class each: "
                     "--leaf-folders makes every folder of pictures a class.")
    if passed_over:
        notes.append(passed_over_in_words(passed_over))
    return Listing(
        root, f"{title} (class folders)", names, np.array([place[class_of[f]] for f in folders], np.int64), label_names,
        splits, notes=tuple(notes), inner=tuple(inner),
        problems=(Problem("folders or links cannot be read", tuple(unread), "Repair or remove them"),),
        empty=() if leaf_folders else tuple(n for n in map(same_text, class_folders(first)) if n not in place))


def _leaves(folders: set[str]) -> dict[str, str]:
    """Each folder's class: its own name, or its whole path if another folder has the same name."""
    count = Counter(folder.rpartition("/")[2] for folder in folders)
    return {folder: last if count[last := folder.rpartition("/")[2]] == 1 else folder for folder in folders}


def _only_folders(folders: set[str]) -> list[str]:
    """Folders of pictures, if their outermost folder holds several of them and no picture itself."""
    several = Counter(folder.partition("/")[0] for folder in folders)
    return sorted(f for f in folders if several[f.partition("/")[0]] > 1 and f.partition("/")[0] not in folders)


def list_class_folders(root: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Pictures under root/CLASS/, classes and files in the order of their names.

    Returns paths, labels int64 (N,), class names. Raises DataError: no folder, no class, a class without
    pictures, two classes that differ only by case.
    """
    listing = list_folder(root)
    refuse([*listing.problems, listing.empty_classes], skip_bad=False)
    return [listing.root / name for name in listing.names], listing.labels, listing.label_names


def _split_folders(root: Path) -> dict[str, Path]:
    """{"train": root}; or its folders train, val, test, meta if it holds no other folder."""
    folders = class_folders(root)
    named = [SPLIT_NAMES.get(name.casefold()) for name in folders]
    if "train" not in named or None in named or not _has_folders(root / folders[named.index("train")]):
        return {"train": root}
    parts: dict[str, Path] = {}
    for split, name in sorted(zip(named, folders, strict=True), key=lambda pair: pair[0] != "train"):
        if split in parts:
            raise DataError(f"{root} holds {parts[split].name}/ and {name}/, two folders with the same "
                            "meaning: merge them.")
        parts[str(split)] = root / name
    return parts


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted. Raises DataError if there is none."""
    try:
        names = sorted(path.name for path in root.iterdir() if not left_behind(path.name) and folder_identity(path))
    except NotADirectoryError:
        raise DataError(f"{root} is not a folder: name one that holds a folder of pictures for each class.") from None
    except OSError as error:
        raise DataError(f"{root} is not a folder that can be listed ({error.strerror}): name one that holds a "
                        "folder of pictures for each class.") from error
    if not names:
        raise DataError(f"{root} holds no class folders: expected {root}/CLASS/picture.jpg.")
    return names


def _has_folders(folder: Path) -> bool:
    try:
        return bool(class_folders(folder))
    except DataError:
        return False


# ---- a table ----


def list_table(table: Path, root: Path | None = None, columns: Columns = USUAL) -> Listing:
    """The rows of a table (zoo.tables) as a listing; pictures are not opened yet.

    root      folder that the paths start from; None: the table's own
    columns   their names, if they are not among zoo.tables.COLUMN_NAMES
    Raises DataError: no table, no such column. Rows that lack a field or contradict each other are problems.
    """
    read = read_table(table, columns)
    at = {meaning: read.column(meaning, getattr(columns, f"{meaning}_column"), meaning in ("path", "label"))
          for meaning in COLUMN_NAMES}
    disk = OnDisk(table.parent if root is None else root.expanduser())
    bad: list[str] = []
    torn: dict[str, str] = {}
    first: dict[str, tuple[str, tuple[str | None, ...]]] = {}
    copies = 0
    for where, row in read.rows:
        if len(row) != len(read.header):
            bad.append(f"{where}: {len(row)} fields, the header has {len(read.header)}.")
            continue
        path, label, split, group = (None if i is None else value(row[i]) for i in at.values())
        if path is None or label is None:
            lacking = "path" if path is None else "label"
            bad.append(f"{where}: no {lacking} ({row[at[lacking] or 0].strip() or 'empty'}).")
            continue
        if split is not None and split.casefold() not in SPLIT_NAMES:
            bad.append(f"{where}: the split {split!r} is none of train, val, test, meta.")
            continue
        said = label, SPLIT_NAMES[split.casefold()] if split else None, group
        name = disk.find(path)
        before, known = first.setdefault(name, (where, said))
        if known != said:
            torn[name] = (f"{path} stands in {before} as {_in_words(known)} and in {where} as {_in_words(said)}.")
        copies += before != where and known == said
    notes = read.notes
    if copies:
        notes.append(f"{copies:,} rows repeat another row; each picture is used once.")
    if disk.without_ending:
        notes.append(f"{disk.without_ending:,} paths lack their ending; the files were found on the disk.")
    rows = {name: said for name, (_, said) in first.items() if name not in torn}
    label_names = sorted({str(label) for label, _, _ in rows.values()}, key=_numbers_by_value)
    check_class_names(label_names, str(table))
    place = {name: c for c, name in enumerate(label_names)}
    groups = None
    if at["group"] is not None:
        groups = [group for _, _, group in rows.values()]
        notes.append(f"Groups, by the column {read.header[at['group']]}: {len(set(groups) - {None}):,}; none is in "
                     "both training and test.")
    return Listing(
        disk.root, f"{table.stem} (table)", list(rows),
        np.array([place[str(label)] for label, _, _ in rows.values()], np.int64), tuple(label_names),
        [split for _, split, _ in rows.values()], groups, tuple(notes),
        (Problem(f"rows of {table} cannot be used", tuple(bad), "Correct them"),
         Problem(f"pictures have rows in {table} that disagree", tuple(torn.values()), "Keep one row for each")))


def _in_words(row: tuple[str | None, ...]) -> str:
    label, split, group = row
    return f"{label}" + (f", {split}" if split else "") + (f", group {group}" if group else "")


def _numbers_by_value(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isascii() and name.isdecimal() else (1, 0, name)
