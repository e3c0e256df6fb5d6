"""Read tables of pictures (CSV, COCO JSON, a benchmark's list of paths and numbers) and find the files they name."""

import codecs
import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import DataError, PictureError
from zoo.files import PICTURE_SUFFIXES, READ_SUFFIXES, printable, same_text, suffix
from zoo.images import NamedPicture

SUFFIXES = {".csv", ".tsv", ".tab", ".txt", ".json"}

# Usual names of each column; the first is ours.
COLUMN_NAMES = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img_path"),
    "label": ("label", "class", "class_name", "species", "category", "category_name"),
    "split": ("split", "set", "subset", "partition"),
    "group": ("group", "group_id", "animal", "animal_id", "individual", "track", "track_id", "camera", "sequence"),
}
NOTHING = {"", "NA", "N/A", "nan", "NaN", "NULL", "null"}  # how R, pandas and databases write a missing value


@dataclass(frozen=True)
class Columns:
    """How to read a table. The flags of `train table`, `evaluate` and `predict`."""

    path_column: str | None = None
    """Column of the picture's path. By default found by its usual names."""

    label_column: str | None = None
    """Column of the class. By default found by its usual names."""

    split_column: str | None = None
    """Column of the split. By default found by its usual names."""

    group_column: str | None = None
    """Column of the group. By default found by its usual names. In a COCO file: location (the default) or seq_id."""

    encoding: str | None = None
    """Encoding of the table, such as latin-1 or cp1250. By default UTF-8, or else UTF-16 or Windows-1252."""


USUAL = Columns()


@dataclass(frozen=True)
class Table:
    """A table. Each of `rows`: its place as messages name it ("line 3"), and its cells, one per column if complete."""

    path: Path
    header: list[str]
    rows: list[tuple[str, list[str]]]
    notes: list[str] = field(default_factory=list)

    def column(self, meaning: str, asked: str | None, needed: bool) -> int | None:
        """The index of the path, label, split or group column. Raises DataError: no such column, or several."""
        has = f"{self.path} has the columns {', '.join(self.header)}"
        if asked is not None:
            if asked not in self.header:
                raise DataError(f"{has}; there is no {asked!r} for --{meaning}-column.")
            return self.header.index(asked)
        plain = [name.casefold().replace(" ", "_").replace("-", "_") for name in self.header]
        found = [i for i, name in enumerate(plain) if name in COLUMN_NAMES[meaning]]
        if len(found) > 1 and plain.count(meaning) == 1:
            return plain.index(meaning)
        if len(found) > 1:
            raise DataError(f"{has}; {' and '.join(self.header[i] for i in found)} could each be the {meaning}: choose "
                            f"one with --{meaning}-column.")
        if not found and needed:
            raise DataError(f"{has}; the {meaning} column is missing: call it {meaning!r} or name it with "
                            f"--{meaning}-column.")
        return found[0] if found else None


def value(cell: str) -> str | None:
    """The cell's text; None if it stands for a missing value."""
    return None if (text := same_text(cell.strip())) in NOTHING else text


def read_table(path: Path, columns: Columns = USUAL) -> Table:
    """Read a table. Raises DataError if the file is not a table, or cannot be read."""
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"the table {path} cannot be read: {error.strerror or error}.") from error
    if content[:4] == b"PK\x03\x04":
        raise DataError(f"{path} is a spreadsheet or an archive: save the sheet as CSV.")
    text, notes = _text(path, content, columns.encoding)
    if text.lstrip()[:1] in ("{", "["):
        return _coco(path, text, notes, columns.group_column)
    lines = text.splitlines(keepends=True)
    start = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=start.count)
    if delimiter not in start and " " in start.strip():  # path and number, as benchmarks have them
        rows = [(i, line.rsplit(None, 1)) for i, line in enumerate(lines, 1) if line.strip()]
    else:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}. Is a quotation mark not closed?") from error
    first = [cell.strip() for cell in rows[0][1]] if rows else []
    if len(first) == 2 and (suffix(first[0]) in PICTURE_SUFFIXES or first[1].isdecimal()):
        notes.append(f"{path.name} has no header: it was read as path and label.")
        first, rows = ["path", "label"], [(0, first), *rows]
    if len(rows) < 2:
        raise DataError(f"{path} holds no rows: expected a header with path and label, and a row per picture.")
    return Table(path, first, [(f"line {line}", row) for line, row in rows[1:]], notes)


def _text(path: Path, content: bytes, encoding: str | None) -> tuple[str, list[str]]:
    notes = []
    try:
        guessed = encoding or ("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        text = content.decode(codecs.lookup(guessed).name)
    except LookupError:
        raise DataError(f"--encoding {encoding}: Python knows no such encoding.") from None
    except UnicodeError as error:
        if encoding:
            raise DataError(f"{path} is not in --encoding {encoding}: {error}.") from error
        text = content.decode("cp1252", errors="replace")
        notes.append(f"{path.name} is not UTF-8; it was read as Windows-1252 (--encoding NAME for another).")
    if "\0" in text:
        raise DataError(f"{path} is not text: expected a CSV table with the columns path and label.")
    return text, notes


# ---- COCO, as camera-trap collections are shared ----


def _coco(path: Path, text: str, notes: list[str], group: str | None) -> Table:
    """A row for each annotated class of a picture; a picture without annotations gets one row without a label.

    group   the key of images that names groups, which splits keep together; by default location, else seq_id
    """
    try:
        parsed = json.loads(text)
        parts = {part: parsed[part] for part in ("images", "annotations", "categories")}
    except ValueError as error:
        raise DataError(f"{path} starts like JSON but cannot be read: {error}.") from error
    except (KeyError, TypeError, RecursionError):
        raise DataError(f"{path} is JSON, but not in the COCO form (images, annotations, categories): give a CSV table "
                        "with path and label.") from None
    try:
        names = {category["id"]: str(category["name"]) for category in parts["categories"]}
        labels: dict[Any, dict[str, None]] = {image["id"]: {} for image in parts["images"]}
        lost = 0
        for annotation in parts["annotations"]:
            of = labels.get(annotation["image_id"])
            name = names.get(annotation["category_id"])
            lost += of is None or name is None
            if of is not None and name is not None:
                of[name] = None
        usual = [group] if group else ["location", "seq_id"]
        keys = [key for key in usual if any(key in image for image in parts["images"])][:1]
        rows = [(f"image {image['id']}", [str(image["file_name"]), label, *(str(image.get(key, "")) for key in keys)])
                for image in parts["images"] for label in labels[image["id"]] or [""]]
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is in the COCO form, but an entry lacks what it should have ({error}).") from error
    if not rows:
        raise DataError(f"{path} holds no images.")
    if lost:
        notes.append(f"{path.name}: {lost:,} annotations refer to images or categories that it does not list.")
    if keys and group is None:
        notes.append(f"{path.name}: pictures are grouped by {keys[0]} (--group-column for another).")
    return Table(path, ["path", "label", *[group or "group"] * len(keys)], rows, notes)


# ---- the files that it names ----


class OnDisk:
    """Find files by their names in tables: with other accents, with backslashes, or without the ending."""

    def __init__(self, root: Path):
        self.root, self.without_ending = root, 0
        self._folders: dict[str, dict[str, str]] = {}

    def find(self, path: str) -> str:
        """The name relative to root, as the disk spells it; only normalised if there is no such file."""
        if "\\" in path and not os.path.lexists(self.root / path):
            path = path.replace("\\", "/")
        path = os.path.normpath(path)
        if os.path.lexists(self.root / path):
            return path
        folder, name = os.path.split(path)
        if folder and not os.path.isdir(self.root / folder) and folder != path:
            folder = self.find(folder)
        inside = self._inside(folder)
        whole = inside.get(same_text(name)) or inside.get(f"{same_text(name)}/")
        self.without_ending += bool(whole) and f"{same_text(name)}/" in inside
        return os.path.join(folder, whole) if whole else path

    def _inside(self, folder: str) -> dict[str, str]:
        """The folder's file names by normalised text; under "stem/", the only picture with that stem."""
        if folder not in self._folders:
            try:
                names = os.listdir(self.root / folder)
            except OSError:
                names = []
            stems: dict[str, list[str]] = {}
            for name in names:
                if suffix(name) in READ_SUFFIXES:
                    stems.setdefault(same_text(os.path.splitext(name)[0]) + "/", []).append(name)
            self._folders[folder] = {same_text(name): name for name in names} | {
                stem: found[0] for stem, found in stems.items() if len(found) == 1}
        return self._folders[folder]


def pictures_in_table(path: Path, root: Path | None = None, columns: Columns = USUAL) -> Iterator[Any]:
    """The paths in a table, each once; a row without a path gives a PictureError.

    root   folder that the paths start from; by default the table's own
    """
    table = read_table(path, columns)
    at = table.column("path", columns.path_column, needed=True)
    disk, seen = OnDisk(path.parent if root is None else root), set()
    for where, row in table.rows:
        named = value(row[at]) if at is not None and at < len(row) else None
        if named is None:
            yield NamedPicture(f"{path}, {where}", PictureError(f"{printable(str(path))}, {where}: no path."))
        elif (name := disk.find(named)) not in seen:
            seen.add(name)
            yield disk.root / name
