"""The pictures that a path stands for: one, those under a folder, in a zip, or in a table."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from zoo.archives import is_zip, open_zip
from zoo.errors import PictureError
from zoo.files import passed_over_in_words, suffix, walk
from zoo.images import NamedPicture
from zoo.tables import SUFFIXES, USUAL, Columns, pictures_in_table


def pictures_of(
    paths: Iterable[str | os.PathLike], passed_over: Counter[str] | None = None, columns: Columns = USUAL
) -> Iterator[str | os.PathLike | NamedPicture]:
    """Path by path, lazily; a folder without pictures or a refused zip comes as its PictureError.

    passed_over  counts what is no picture by its name
    columns      how tables (zoo.tables.SUFFIXES) are read
    """
    for path in paths:
        try:
            if os.path.isdir(path):
                yield from pictures_under(path, passed_over)
            elif suffix(os.fspath(path)) in SUFFIXES:
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
    """As zoo.files.walk finds them. Raises PictureError where there is none."""
    root, passed_over = Path(folder), Counter() if passed_over is None else passed_over
    if not root.is_dir():
        raise PictureError(f"{root} is no folder" + (": use predict for a single picture." if root.exists() else
                                                     ": it does not exist."))
    each = walk(root, passed_over)
    first = next(each, None)
    if first is None:
        raise PictureError(f"{root} holds no pictures. {passed_over_in_words(passed_over)}".strip())
    return (root / name if reason is None else NamedPicture(str(root / name), PictureError(reason))
            for name, reason in itertools.chain([first], each))


def pictures_inside(archive: str | os.PathLike, passed_over: Counter[str] | None = None) -> Iterator[NamedPicture]:
    """Of a zip, under its path and the name inside. Raises PictureError as zoo.archives.open_zip does."""
    pictures = open_zip(archive, passed_over=passed_over)[1]
    return (NamedPicture(f"{os.fspath(archive)}/{name}", picture) for name, picture in pictures)
