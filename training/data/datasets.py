"""Labelled pictures, in memory or on disk, and a data set of training, meta and test pictures."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import DataError
from zoo.errors import PictureError
from zoo.files import printable, same_text
from zoo.images import decode
from zoo.pixels import PUBLIC, Reading


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
    names    of the files, relative to `root`, with "/"; shown in messages, and the splits depend on them
    labels   int64 (N,), the class of each
    sizes    int32 (N, 2), width and height; None if the pictures were not decoded
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

    meta and training share only the pictures of `shared_meta_classes` (or all of meta, if it is added to training by
    request). Some classes may have no test pictures: `untested_classes`.

    mean, std             per channel, in [0, 1]: the benchmark's own, or measured on the training pictures
    shared_meta_classes   classes whose meta pictures are also in training, because they are too small to spare them
    notes                 sentences about splits, copies, pictures left out
    left_out              the reason for each picture or class that --skip-bad left out
    reading               how to read files that leave something open
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
    reading: Reading = PUBLIC

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
        """What must stay the same when a run resumes: classes, counts, training and meta pictures by name."""
        digest = hashlib.sha256()
        for pictures in (self.train, self.meta):
            digest.update(pictures.labels.astype("<i8").tobytes())
            if isinstance(pictures, PictureFiles):
                digest.update(same_text("\0".join(pictures.names)).encode(errors="surrogateescape"))
        if kept := self.reading.to_dict():
            digest.update(repr(kept).encode())
        return {"label_names": list(self.label_names), "class_counts": list(self.class_counts),
                "pictures": digest.hexdigest()}

    def with_most_of_meta_in_training(self) -> "LongTailed":
        """The same, with most meta pictures added to the training set.

        The last fifth of each class, at least one picture, stays out and is the new meta set.
        """
        last = np.zeros(len(self.meta), bool)
        for c in np.setdiff1d(self.meta.labels, self.shared_meta_classes):
            at = np.flatnonzero(self.meta.labels == c)
            last[at[-max(1, len(at) // 5) :]] = True
        joined = dataclasses.replace(self, meta=self.meta.at(np.flatnonzero(~last))).with_meta_in_training()
        return dataclasses.replace(joined, meta=self.meta.at(np.flatnonzero(last)), shared_meta_classes=())

    def with_meta_in_training(self) -> "LongTailed":
        """The same, with the meta pictures added to the training set if they are not in it."""
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
    """A hash that finds copies of a picture under other names."""
    return hashlib.blake2b(content, digest_size=16).digest()


def check_class_names(names: Iterable[str], where: str) -> None:
    """Refuse names that differ only in case or in how accents are stored: other machines see one folder."""
    seen: dict[str, str] = {}
    for name in names:
        if any("\udc80" <= letter <= "\udcff" for letter in name):
            raise DataError(f"{where}: the class name {printable(name)} is not UTF-8: rename it.")
        twin = seen.setdefault(same_text(name).casefold(), name)
        if twin != name:
            raise DataError(f"{where} has two classes whose names differ only in case or accents, {twin} and "
                            f"{name}: rename or merge them.")


def listed(items: Sequence[str], between: str, most: int = 10) -> str:
    """The first few, and how many more there are."""
    return between.join([*items[:most], *([f"… and {len(items) - most:,} more"] if len(items) > most else [])])


def size_in_words(n: float) -> str:
    """Bytes with a unit: 2.5 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n / 1e3:.0f} kB"


def read_pictures(paths: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    """uint8 (N, H, W, 3), decoded by zoo.images; one DataError names all unreadable pictures."""
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
