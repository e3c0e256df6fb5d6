"""Labelled pictures, in memory or on disk, and class folders."""

import dataclasses
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import DataError
from zoo.errors import PictureError
from zoo.files import printable
from zoo.images import decode

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".ppm",
                    ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".mpo", ".tga", ".pcx"}

# What operating systems and archivers leave in folders, beside files whose name starts with a dot.
LEFT_BEHIND = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information"}


@dataclass(frozen=True)
class Split:
    """Pictures of one size, in memory.

    pictures   uint8 (N, H, W, 3)          labels   int64 (N,), the class of each
    """

    pictures: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: Iterable[int] | np.ndarray) -> "Split":
        """The pictures at these places, in this order."""
        at = np.fromiter(indices, np.int64)
        return Split(self.pictures[at], self.labels[at])


@dataclass(frozen=True)
class PictureFiles:
    """Pictures on disk, of any size.

    root     folder that the names start from
    names    of the files, relative to `root`, with "/": what messages show and cuts are fixed by
    labels   int64 (N,), the class of each
    sizes    int32 (N, 2), width and height, where every picture was decoded on the way; else None
    """

    root: Path
    names: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.root / name for name in self.names)

    def at(self, indices: Iterable[int] | np.ndarray) -> "PictureFiles":
        """The pictures at these places, in this order."""
        at = np.fromiter(indices, np.int64)
        return PictureFiles(self.root, tuple(self.names[i] for i in at), self.labels[at],
                            None if self.sizes is None else self.sizes[at])


@dataclass(frozen=True)
class LongTailed:
    """A data set ready to train on. `source` names the pictures, for every table: "CIFAR-10 (JPEG)".

    meta and training share no picture but those of `shared_meta_classes` (and all of meta where it is added to
    training by request). A class without test pictures may exist: `untested_classes`.

    mean, std             per channel, in [0, 1]: the benchmark's own, or measured on the training pictures
    shared_meta_classes   classes whose meta pictures are in training as well, being too small to spare them
    notes                 sentences about what was decided on the way: cuts, copies, how many pictures left out
    left_out              what --skip-bad left out, each with its reason
    """

    train: Split | PictureFiles
    meta: Split | PictureFiles
    test: Split | PictureFiles
    label_names: tuple[str, ...]
    source: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    shared_meta_classes: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def class_counts(self) -> tuple[int, ...]:
        return tuple(np.bincount(self.train.labels, minlength=len(self.label_names)).tolist())

    @property
    def untested_classes(self) -> tuple[int, ...]:
        tested = np.bincount(self.test.labels, minlength=len(self.label_names))
        return tuple(np.flatnonzero(tested == 0).tolist())

    @property
    def held_out(self) -> Split | PictureFiles:
        """The meta pictures that are not in training."""
        if not self.shared_meta_classes:
            return self.meta
        return self.meta.at(np.flatnonzero(~np.isin(self.meta.labels, self.shared_meta_classes)))

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run goes on: classes, counts, and which pictures train and guide, by name."""
        digest = hashlib.sha256()
        for pictures in (self.train, self.meta):
            digest.update(pictures.labels.astype("<i8").tobytes())
            if isinstance(pictures, PictureFiles):
                digest.update("\0".join(pictures.names).encode(errors="surrogateescape"))
        return {"label_names": list(self.label_names), "class_counts": list(self.class_counts),
                "pictures": digest.hexdigest()}

    def with_most_of_meta_in_training(self) -> "LongTailed":
        """The same, its training set joined by the meta pictures but for the last fifth of each class, one at least,
        which are then all of the meta set that is held out."""
        last = np.zeros(len(self.meta), bool)
        for c in np.setdiff1d(self.meta.labels, self.shared_meta_classes):
            at = np.flatnonzero(self.meta.labels == c)
            last[at[-max(1, len(at) // 5) :]] = True
        joined = dataclasses.replace(self, meta=self.meta.at(np.flatnonzero(~last))).with_meta_in_training()
        return dataclasses.replace(joined, meta=self.meta.at(np.flatnonzero(last)), shared_meta_classes=())

    def with_meta_in_training(self) -> "LongTailed":
        """The same, with those meta pictures that are not in the training set appended to it."""
        train, meta = self.train, self.meta
        if isinstance(train, Split) and isinstance(meta, Split):
            joined: Split | PictureFiles = Split(np.concatenate([train.pictures, meta.pictures]),
                                                 np.concatenate([train.labels, meta.labels]))
        else:
            assert isinstance(train, PictureFiles) and isinstance(meta, PictureFiles)
            known = set(train.names)
            added = meta.at([i for i, name in enumerate(meta.names) if name not in known])
            joined = PictureFiles(train.root, train.names + added.names, np.concatenate([train.labels, added.labels]))
        return dataclasses.replace(self, train=joined)


def content_key(content: bytes) -> bytes:
    """Equal where the content is equal: tells copies of a picture under other names."""
    return hashlib.blake2b(content, digest_size=16).digest()


def find_classes(root: Path) -> list[str]:
    """Names of the class folders in `root`, sorted. Raises DataError: no folder, none in it, names that clash."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder: name one that holds a folder of pictures for each class.")
    names = sorted(entry.name for entry in _scan(root) if _is_folder(entry))
    if not names:
        raise DataError(f"{root} holds no class folders: expected {root}/CLASS/picture.jpg.")
    check_class_names(names, str(root))
    return names


def check_class_names(names: Iterable[str], where: str) -> None:
    """Two names that differ only by case or in how accents are stored would be one folder on other machines."""
    seen: dict[str, str] = {}
    for name in names:
        if any("\udc80" <= letter <= "\udcff" for letter in name):
            raise DataError(f"{where}: the class name {printable(name)} is not UTF-8: rename it.")
        twin = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name:
            raise DataError(f"{where} has two classes of one name but for case or accents, {twin} and {name}: rename "
                            "or join them.")


def listed(items: Sequence[str], between: str, most: int = 10) -> str:
    """The first few, and how many more there are."""
    return between.join([*items[:most], *([f"… and {len(items) - most:,} more"] if len(items) > most else [])])


def find_files(folder: Path) -> list[str]:
    """Files at any depth, relative to `folder`, with "/", sorted.

    Passed over: hidden files and folders, and what operating systems leave behind. Linked folders are followed, but
    for a link that leads back to a folder above itself.
    """
    found: list[str] = []

    def walk(here: Path, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        for entry in _scan(here):
            if _is_folder(entry):
                status = entry.stat()
                if (identity := (status.st_dev, status.st_ino)) not in above:
                    walk(here / entry.name, f"{prefix}{entry.name}/", above | {identity})
            elif entry.is_symlink() or entry.is_file():  # a link to nothing is a picture that is missing
                found.append(prefix + entry.name)

    status = folder.stat()
    walk(folder, "", frozenset({(status.st_dev, status.st_ino)}))
    return sorted(found)


def _scan(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return [e for e in entries if not e.name.startswith(".") and e.name.casefold() not in LEFT_BEHIND]
    except OSError as error:
        raise DataError(f"{printable(str(folder))} cannot be read: {error.strerror or error}.") from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def list_class_folders(root: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Pictures under root/CLASS/, classes and files in the order of their names.

    Returns paths, labels int64 (N,), class names. Raises DataError: no folder, no class, a class without
    pictures, two classes that differ only by case.
    """
    paths: list[Path] = []
    labels: list[int] = []
    names = find_classes(root)
    for c, name in enumerate(names):
        found = [root / name / file for file in find_files(root / name)
                 if os.path.splitext(file)[1].lower() in PICTURE_SUFFIXES]
        if not found:
            raise DataError(f"{root / name} holds no pictures: remove the folder or fill it.")
        paths += found
        labels += [c] * len(found)
    return paths, np.array(labels, np.int64), tuple(names)


def read_pictures(paths: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    """uint8 (N, H, W, 3), decoded by zoo.images; every unreadable picture is named in one DataError."""
    pictures = np.empty((len(paths), *size, 3), np.uint8)
    bad = []
    for i, path in enumerate(paths):
        try:
            picture = decode(path)
            if picture.size != size[::-1]:
                raise PictureError(f"{path} is {picture.width} x {picture.height}, not {size[1]} x {size[0]}.")
            pictures[i] = np.asarray(picture)
        except PictureError as error:
            bad.append(str(error))
    if bad:
        raise DataError(f"{len(bad)} of {len(paths)} pictures cannot be used:\n  " + listed(bad, "\n  "))
    return pictures
