"""What somebody keeps, as a list of labelled pictures: class folders, or a table."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from training.data.datasets import check_class_names, listed
from training.errors import DataError
from zoo.files import folder_identity, left_behind, passed_over_in_words, same_text, walk

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test", "testing": "test", "meta": "meta"}

# What a column is called in the tables that people have; the first of each is ours.
COLUMN_NAMES = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img_path"),
    "label": ("label", "class", "class_name", "species", "category", "category_name"),
    "split": ("split", "set", "subset", "partition"),
    "group": ("group", "group_id", "animal", "animal_id", "individual", "track", "track_id", "camera", "sequence"),
}


@dataclass(frozen=True)
class Listing:
    """Labelled pictures as somebody keeps them, before any cut.

    names    relative to root          labels   int64 (N,)
    splits   train, val, test, meta, or None where that is not said
    groups   what must not be parted (an animal, a track, a camera), or None
    problems    what was found and cannot be listed
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
        """The rest with its classes numbered anew, and the places of its pictures."""
        gone = set(gone)
        kept = [c for c in range(len(self.label_names)) if c not in gone]
        place = {c: i for i, c in enumerate(kept)}
        keep = np.flatnonzero([int(c) in place for c in self.labels])
        rest = self.at(keep)
        return replace(rest, labels=np.array([place[int(c)] for c in rest.labels], np.int64),
                       label_names=tuple(self.label_names[c] for c in kept)), keep


@dataclass(frozen=True)
class Problem:
    """What cannot be used: `each` a sentence of its own."""

    what: str
    each: tuple[str, ...]
    remedy: str


def refuse(problems: Iterable[Problem], skip_bad: bool) -> list[str]:
    """One error that counts every kind of problem and names the first few of each. With `skip_bad` all the sentences,
    of what the caller then leaves out."""
    problems = [problem for problem in problems if problem.each]
    if problems and not skip_bad:
        raise DataError("\n".join(f"{len(problem.each):,} {problem.what}:\n  " + listed(problem.each, "\n  ")
                                  + f"\n{problem.remedy}, or leave them out with --skip-bad." for problem in problems))
    return [reason for problem in problems for reason in problem.each]


def left_out_in_words(left_out: Sequence[str]) -> list[str]:
    """A note on what `skip_bad` left out; nothing where that is nothing."""
    return [f"Left out, {len(left_out):,}: " + listed(left_out, " ")] if left_out else []


# ---- class folders ----


def list_folder(
    root: Path, test: Path | None = None, meta: Path | None = None, leaf_folders: bool = False
) -> Listing:
    """The pictures of class folders, and of the split folders above them where there are such.

    leaf_folders  each folder that pictures lie in is a class, at any depth; by default the outermost ones are
    Raises DataError: no folder, none in it, names that clash.
    """
    parts = _split_folders(root)
    parts |= {split: folder.expanduser() for split, folder in (("test", test), ("meta", meta)) if folder is not None}
    first = next(iter(parts.values()))
    title = (root if SPLIT_NAMES.get(root.name.casefold()) != "train" else root.resolve().parent).resolve().name
    if len(parts) == 1:
        root = first  # names, and with them the cut, do not change where train/ is named itself
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
            notes.append(f"Pictures that lie in {part} itself, in no class, and are not used: {loose:,}.")
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
        problems=(Problem("folders or links cannot be read", tuple(unread), "Mend or remove them"),),
        empty=() if leaf_folders else tuple(n for n in map(same_text, class_folders(first)) if n not in place))


def _leaves(folders: set[str]) -> dict[str, str]:
    """Each folder's class: its own name, or its whole path where another has that name."""
    count = Counter(folder.rpartition("/")[2] for folder in folders)
    return {folder: last if count[last := folder.rpartition("/")[2]] == 1 else folder for folder in folders}


def _only_folders(folders: set[str]) -> list[str]:
    """The folders of pictures in outermost folders that hold several of them, and no picture themselves."""
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
    """{"train": root}, or the folders train, val, test, meta in it where it holds nothing else."""
    folders = class_folders(root)
    named = [SPLIT_NAMES.get(name.casefold()) for name in folders]
    if "train" not in named or None in named or not _has_folders(root / folders[named.index("train")]):
        return {"train": root}
    parts: dict[str, Path] = {}
    for split, name in sorted(zip(named, folders, strict=True), key=lambda pair: pair[0] != "train"):
        if split in parts:
            raise DataError(f"{root} holds {parts[split].name}/ and {name}/, two folders of one meaning: join them.")
        parts[str(split)] = root / name
    return parts


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted. Raises DataError where there is none."""
    try:
        names = sorted(path.name for path in root.iterdir() if not left_behind(path.name) and folder_identity(path))
    except NotADirectoryError:
        raise DataError(f"{root} is no folder: name one that holds a folder of pictures for each class.") from None
    except OSError as error:
        raise DataError(f"{root} is no folder that can be listed ({error.strerror}): name one that holds a folder of "
                        "pictures for each class.") from error
    if not names:
        raise DataError(f"{root} holds no class folders: expected {root}/CLASS/picture.jpg.")
    return names


def _has_folders(folder: Path) -> bool:
    try:
        return bool(class_folders(folder))
    except DataError:
        return False


# ---- a table ----


def list_table(table: Path, root: Path | None = None, **columns: str | None) -> Listing:
    """The rows of a CSV table (comma, semicolon or tab) as a listing; what each picture holds is not looked at yet.

    root      folder that the paths start from; without it the table's own
    columns   path, label, split, group: the column's name, where it is none of COLUMN_NAMES
    Raises DataError: no table, no such column, rows that lack a field or contradict each other.
    """
    header, rows, notes = _read_table(table)
    at = {meaning: _find_column(meaning, columns.get(meaning), header, table) for meaning in COLUMN_NAMES}
    bad: list[str] = []
    first: dict[str, tuple[int, list[str | None]]] = {}
    root = table.parent if root is None else root.expanduser()
    copies = 0
    for line, row in rows:
        if len(row) != len(header):
            bad.append(f"line {line}: {len(row)} fields, the header has {len(header)}")
            continue
        path, *rest = (row[i].strip() or None if i is not None else None for i in at.values())
        if path is None or rest[0] is None:
            bad.append(f"line {line}: no {'path' if path is None else 'label'}")
            continue
        if rest[1] is not None and (split := SPLIT_NAMES.get(rest[1].casefold())) is None:
            raise DataError(f"{table}, line {line}: the split {rest[1]!r} is none of train, val, test, meta.")
        rest[1] = split if rest[1] is not None else None
        name = _native(root, path)
        before, known = first.setdefault(name, (line, rest))
        if known != rest:
            raise DataError(f"{table}: {path} stands in line {before} as {_in_words(known)} and in line {line} as "
                            f"{_in_words(rest)}: keep one of them.")
        copies += before != line
    if copies:
        notes.append(f"{copies:,} rows say again what another row says; each picture is used once.")
    label_names = sorted({str(rest[0]) for _, rest in first.values()}, key=_numbers_by_value)
    check_class_names(label_names, str(table))
    place = {name: c for c, name in enumerate(label_names)}
    groups = None
    if at["group"] is not None:
        groups = [rest[2] for _, rest in first.values()]
        notes.append(f"Groups, by the column {header[at['group']]}: {len(set(groups) - {None}):,}; none is parted "
                     "between training and test.")
    return Listing(root, f"{table.stem} (table)", list(first),
                   np.array([place[str(rest[0])] for _, rest in first.values()], np.int64), tuple(label_names),
                   [rest[1] for _, rest in first.values()], groups, tuple(notes),
                   (Problem(f"rows of {table} cannot be used", tuple(f"{row}." for row in bad), "Mend them"),))


def _read_table(table: Path) -> tuple[list[str], list[tuple[int, list[str]]], list[str]]:
    """The header, the rows with their line numbers, blank ones left out, and notes."""
    notes = []
    try:
        content = table.expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"the table {table} cannot be read: {error.strerror or error}.") from error
    if content[:4] == b"PK\x03\x04":
        raise DataError(f"{table} is a spreadsheet or an archive: save the sheet as CSV.")
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        notes.append(f"{table.name} is not UTF-8; it was read as Windows-1252.")
    if "\0" in text:
        raise DataError(f"{table} is no text: expected a CSV table with the columns path and label.")
    lines = text.splitlines(keepends=True)
    start = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=start.count)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: {error}. Is a quotation mark not closed?") from error
    if len(rows) < 2:
        raise DataError(f"{table} holds no rows: expected a header with path and label, and a row a picture.")
    return [cell.strip() for cell in rows[0][1]], rows[1:], notes


def _find_column(meaning: str, asked: str | None, header: list[str], table: Path) -> int | None:
    has = f"{table} has the columns {', '.join(header)}"
    if asked is not None:
        if asked not in header:
            raise DataError(f"{has}; there is no {asked!r} for --{meaning}-column.")
        return header.index(asked)
    plain = [name.casefold().replace(" ", "_").replace("-", "_") for name in header]
    found = [i for i, name in enumerate(plain) if name in COLUMN_NAMES[meaning]]
    if len(found) > 1 and plain.count(meaning) == 1:
        return plain.index(meaning)
    if len(found) > 1:
        raise DataError(f"{has}; {' and '.join(header[i] for i in found)} could each be the {meaning}: choose one with "
                        f"--{meaning}-column.")
    if not found and meaning in ("path", "label"):
        raise DataError(f"{has}; the {meaning} column is missing: call it {meaning!r} or name it with "
                        f"--{meaning}-column.")
    return found[0] if found else None


def _native(root: Path, path: str) -> str:
    """The path as this system writes it, one spelling a file: tables made on Windows hold backslashes."""
    if "\\" in path and not os.path.lexists(root / path):
        path = path.replace("\\", "/")
    return os.path.normpath(path)


def _in_words(row: list[str | None]) -> str:
    label, split, group = row
    return f"{label}" + (f", {split}" if split else "") + (f", group {group}" if group else "")


def _numbers_by_value(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isascii() and name.isdecimal() else (1, 0, name)
