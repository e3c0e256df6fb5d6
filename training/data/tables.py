"""What somebody keeps, as a list of labelled pictures: class folders, or a table."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from training.data.datasets import PICTURE_SUFFIXES, check_class_names, find_classes, find_files, listed
from training.errors import DataError

# Pictures by their ending that zoo.images does not read: named like damaged ones, never passed over in silence.
UNSUPPORTED_SUFFIXES = {".heic", ".heif", ".svg", ".jxl", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"}

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
    """

    root: Path
    source: str
    names: Sequence[str]
    labels: np.ndarray
    label_names: tuple[str, ...]
    splits: Sequence[str | None]
    groups: Sequence[str | None] | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

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


def refuse(what: str, each: Sequence[str], remedy: str, skip_bad: bool) -> None:
    """One error that names the first few of what is bad; with `skip_bad` the caller leaves them out and says so."""
    if not skip_bad:
        raise DataError(f"{what}:\n  {listed(each, chr(10) + '  ')}\n{remedy}, or leave them out with --skip-bad.")


def left_out_in_words(left_out: Sequence[str]) -> list[str]:
    """A note on what `skip_bad` left out; nothing where that is nothing."""
    return [f"Left out, {len(left_out):,}: " + listed(left_out, " ")] if left_out else []


# ---- class folders ----


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
            from_root = os.path.relpath(folder / name, root).replace(os.sep, "/")
            names += [f"{from_root}/{file}" for file in found]
            labels += [place[name]] * len(found) if found else []
            splits += [None if len(parts) == 1 else split] * len(found)
    if len(class_names) == 1:
        inside = find_classes_quietly(training_folder / class_names[0])
        hint = f" It holds folders itself ({', '.join(inside[:3])} …): did you mean that one?" if inside else ""
        raise DataError(f"{training_folder} has one class only, {class_names[0]}: nothing to tell apart.{hint}")
    loose = sum(_suffix(file) in PICTURE_SUFFIXES for file in os.listdir(training_folder))
    if loose:
        notes.append(f"Pictures that lie in {training_folder} itself, in no class, and are not used: {loose:,}.")
    if others:
        notes.append("No pictures by their ending, and not used: "
                     + ", ".join(f"{n:,} {suffix}" for suffix, n in others.most_common(5)) + ".")
    listing = Listing(root, f"{title} (class folders)", names, np.array(labels, np.int64),
                      tuple(class_names), splits, notes=tuple(notes))
    if empty:
        refuse(f"{len(empty)} class folder{'s hold' if len(empty) > 1 else ' holds'} no pictures", empty,
               "Fill or remove them", skip_bad)
        listing, _ = listing.without_classes(place[name] for name in empty)
        return replace(listing, left_out=tuple(f"{name} holds no pictures." for name in empty))
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


# ---- a table ----


def list_table(
    table: Path, root: Path | None = None, skip_bad: bool = False, **columns: str | None,
) -> Listing:
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
    if bad:
        refuse(f"{table}: {len(bad):,} rows cannot be used", bad, "Mend them", skip_bad)
    if copies:
        notes.append(f"{copies:,} rows say again what another row says; each picture is used once.")
    label_names = sorted({str(rest[0]) for _, rest in first.values()}, key=_numbers_by_value)
    if not label_names:
        raise DataError(f"{table} has no row that names a picture.")
    check_class_names(label_names, str(table))
    place = {name: c for c, name in enumerate(label_names)}
    groups = None
    if at["group"] is not None:
        groups = [rest[2] for _, rest in first.values()]
        notes.append(f"Groups, by the column {header[at['group']]}: {len(set(groups) - {None}):,}; none is parted "
                     "between training and test.")
    return Listing(root, f"{table.stem} (table)", list(first),
                   np.array([place[str(rest[0])] for _, rest in first.values()], np.int64), tuple(label_names),
                   [rest[1] for _, rest in first.values()], groups, tuple(notes), tuple(f"{row}." for row in bad))


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
