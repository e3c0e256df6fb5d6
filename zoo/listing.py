"""Find the pictures of a path: a single file, a folder, a zip, a table or a pattern."""

import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from zoo.archives import is_zip, open_zip
from zoo.errors import PictureError
from zoo.files import no_picture, passed_over_in_words, suffix, walk
from zoo.images import NamedPicture
from zoo.tables import SUFFIXES, USUAL, Columns, pictures_in_table


def pictures_of(
    paths: Iterable[str | os.PathLike], passed_over: Counter[str] | None = None, columns: Columns = USUAL
) -> Iterator[str | os.PathLike | NamedPicture]:
    """The pictures of all paths, lazily. A folder without pictures or a refused zip gives its PictureError.

    A path with *, ? or [ that does not exist is a pattern; ** matches nested folders.

    passed_over  counts the files that are not pictures by name
    columns      how tables (zoo.tables.SUFFIXES) are read
    """
    for path in expanded(paths, passed_over):
        try:
            if os.path.isdir(path):
                yield from pictures_under(path, passed_over)
            elif _is_table(path):
                yield from pictures_in_table(Path(path), None, columns)
            elif is_zip(path):
                yield from pictures_inside(path, passed_over)
            else:
                yield path
        except PictureError as error:
            yield NamedPicture(os.fspath(path), error)


def pictures_under(
    folder: str | os.PathLike, passed_over: Counter[str] | None = None
) -> Iterator[Path | NamedPicture]:
    """The pictures that zoo.files.walk finds. Raises PictureError if there are none."""
    root, passed_over = Path(folder), Counter() if passed_over is None else passed_over
    if not root.is_dir():
        raise PictureError(f"{root} is not a folder" + (": use predict for a single picture." if root.exists() else
                                                     ": it does not exist."))
    each = walk(root, passed_over)
    first = next(each, None)
    if first is None:
        raise PictureError(f"{root} holds no pictures. {passed_over_in_words(passed_over)}".strip())
    return (root / name if reason is None else NamedPicture(str(root / name), PictureError(reason))
            for name, reason in itertools.chain([first], each))


def pictures_inside(archive: str | os.PathLike, passed_over: Counter[str] | None = None) -> Iterator[NamedPicture]:
    """The pictures of a zip, named by its path and the name inside. Raises PictureError as zoo.archives.open_zip."""
    pictures = open_zip(archive, passed_over=passed_over)[1]
    return (NamedPicture(f"{os.fspath(archive)}/{name}", picture) for name, picture in pictures)


def number_of_pictures(paths: Iterable[str | os.PathLike], columns: Columns = USUAL) -> int:
    """Count the pictures that `pictures_of` gives, without reading any."""
    total = 0
    for path in expanded(paths):
        try:
            total += max(1, sum(1 for _ in walk(Path(path))) if os.path.isdir(path) else
                         sum(1 for _ in pictures_in_table(Path(path), None, columns)) if _is_table(path) else
                         len(open_zip(path)[0]) if is_zip(path) else 1)
        except PictureError:
            total += 1
    return total


def _is_table(path: str | os.PathLike) -> bool:
    return suffix(os.fspath(path)) in SUFFIXES


def expanded(
    paths: Iterable[str | os.PathLike], passed_over: Counter[str] | None = None
) -> Iterator[str | os.PathLike]:
    """The paths, each pattern replaced by the folders, zips and pictures that match it, sorted by name."""
    for path in paths:
        name = os.fspath(path)
        if os.path.lexists(name) or not glob.has_magic(name):
            yield path
            continue
        for found in sorted(glob.iglob(name, recursive=True)):
            if os.path.isdir(found):
                if "**" not in name:  # else their pictures match by themselves
                    yield found
            elif is_zip(found) or (kind := no_picture(os.path.basename(found))) is None:
                yield found
            elif passed_over is not None:
                passed_over[kind] += 1


def paths_in_list(lines: Iterable[bytes]) -> Iterator[str]:
    """The paths of a list, one per line, as `find` and `ls` print them; empty lines are skipped."""
    for i, line in enumerate(lines):
        line = line.removeprefix(b"\xef\xbb\xbf") if i == 0 else line
        if name := line.rstrip(b"\r\n"):
            yield os.fsdecode(name)
