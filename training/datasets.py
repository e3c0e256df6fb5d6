"""Labelled pictures in memory, and class folders."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.errors import DataError
from zoo.errors import PictureError
from zoo.images import decode

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Split:
    """Pictures of one size, in memory.

    pictures   uint8 (N, H, W, 3)          labels   int64 (N,), the class of each
    """

    pictures: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LongTailed:
    """A data set ready to train on. `source` names the pictures, for every table: "CIFAR-10 (JPEG)"."""

    train: Split
    meta: Split
    test: Split
    label_names: tuple[str, ...]
    source: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def class_counts(self) -> tuple[int, ...]:
        return tuple(np.bincount(self.train.labels, minlength=len(self.label_names)).tolist())


def content_key(content: bytes) -> bytes:
    """Equal where the content is equal: tells copies of a picture under other names."""
    return hashlib.blake2b(content, digest_size=16).digest()


def list_class_folders(root: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Pictures under root/CLASS/, classes and files in the order of their names.

    Returns paths, labels int64 (N,), class names. Raises DataError: no folder, no class, a class without
    pictures, two classes that differ only by case.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder: name one that holds a folder of pictures for each class.")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{root} holds no class folders: expected {root}/CLASS/picture.jpg.")
    by_case: dict[str, str] = {}
    for name in names:
        twin = by_case.setdefault(name.casefold(), name)
        if twin != name:
            raise DataError(f"{root} has two classes of one name but for case, {twin} and {name}: rename or join them.")
    paths: list[Path] = []
    labels: list[int] = []
    for c, name in enumerate(names):
        found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
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
        more = f"\n  … and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DataError(f"{len(bad)} of {len(paths)} pictures cannot be used:\n  " + "\n  ".join(bad[:10]) + more)
    return pictures
