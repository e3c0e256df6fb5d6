"""Packs of CIFAR pictures: the part of a data set that some cells need, small enough to copy to a borrowed machine.

A pack gives the same arrays as the class folders that it was made from: same places, same keys, same draws. Pictures
are in lossless WebP sheets of 16 x 16, a quarter smaller than PNGs. A pack has parts, NAME.pack.1of3 and so on.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.cifar import Pool, places_of
from training.data.datasets import Split
from training.errors import DataError
from training.recipes import Cifar10LT
from zoo.files import write_atomically

SIDE, PIXELS = 16, 32  # pictures along a sheet's side; pixels along a picture's
PART = re.compile(r"(.+)\.pack\.(\d+)of(\d+)")


def write_pack(folder: Path, name: str, pool: Pool, recipes: Iterable[Cifar10LT], part_bytes: int) -> list[Path]:
    """Pack the pool's test set, and the training and meta pictures that these recipes draw. Returns the parts."""
    kept = np.unique(np.concatenate([
        at for recipe in recipes
        for at in places_of(pool, recipe.imbalance, recipe.meta_per_class, recipe.subset_seed, recipe.subset)]))
    banned = list(pool.banned)
    numbers = {key: number for number, key in enumerate(dict.fromkeys([*banned, *pool.keys]))}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("about.json", json.dumps({"label_names": pool.label_names, "source": pool.source,
                                                "banned": len(banned)}))
        arrays = io.BytesIO()
        np.savez_compressed(arrays, labels=pool.labels, keys=np.array([numbers[key] for key in pool.keys], np.int32),
                            kept=kept, test_labels=pool.test.labels)
        file.writestr("arrays.npz", arrays.getvalue())
        pictures = np.concatenate([pool.pick(kept).pictures, pool.test.pictures])
        for number, start in enumerate(range(0, len(pictures), SIDE * SIDE)):
            file.writestr(f"{number:04d}.webp", _sheet(pictures[start : start + SIDE * SIDE]))
    content = buffer.getvalue()
    parts = [content[i : i + part_bytes] for i in range(0, len(content), part_bytes)]
    paths = [folder / f"{name}.pack.{number}of{len(parts)}" for number in range(1, len(parts) + 1)]
    for old in folder.glob(f"{name}.pack.*"):
        old.unlink()
    for path, part in zip(paths, parts, strict=True):
        write_atomically(path, part)
    return paths


def _sheet(pictures: np.ndarray) -> bytes:
    whole = np.zeros((SIDE * SIDE, PIXELS, PIXELS, 3), np.uint8)
    whole[: len(pictures)] = pictures
    sheet = whole.reshape(SIDE, SIDE, PIXELS, PIXELS, 3).swapaxes(1, 2).reshape(SIDE * PIXELS, SIDE * PIXELS, 3)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "WEBP", lossless=True, quality=50, method=6)
    return buffer.getvalue()


def find_packs(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Complete packs among these files, or in these folders: name -> parts in order."""
    found: dict[str, dict[int, Path]] = {}
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if match := PART.fullmatch(file.name):
                found.setdefault(f"{match[1]}/{match[3]}", {})[int(match[2])] = file
    whole = {name: parts for name, parts in found.items() if len(parts) == int(name.rpartition("/")[2])}
    return {name.rpartition("/")[0]: [parts[number] for number in sorted(parts)] for name, parts in whole.items()}


def read_pack(parts: Sequence[Path]) -> Pool:
    """The pool that was packed. Picking a picture that the pack does not hold raises DataError."""
    try:
        with zipfile.ZipFile(io.BytesIO(b"".join(path.read_bytes() for path in parts))) as file:
            about = json.loads(file.read("about.json"))
            arrays = dict(np.load(io.BytesIO(file.read("arrays.npz"))))
            sheets = [_pictures(file.read(name)) for name in sorted(file.namelist()) if name.endswith(".webp")]
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise DataError(f"{parts[0]} and its other parts cannot be read ({error}): copy them again.") from error
    kept, test_labels = arrays["kept"], arrays["test_labels"]
    pictures = np.concatenate(sheets)[: len(kept) + len(test_labels)]

    def pick(at: np.ndarray) -> Split:
        places = np.minimum(np.searchsorted(kept, at), len(kept) - 1)
        if not np.array_equal(kept[places], at):
            raise DataError(f"{parts[0]} does not hold every picture of this cell: make a pack for it, or use the "
                            "whole data set.")
        return Split(pictures[places], arrays["labels"][at])

    return Pool(arrays["labels"], arrays["keys"].tolist(), set(range(about["banned"])), pick,
                Split(pictures[len(kept) :], test_labels), tuple(about["label_names"]), about["source"])


def _pictures(sheet: bytes) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))
    return np.ascontiguousarray(pixels.reshape(SIDE, PIXELS, SIDE, PIXELS, 3).swapaxes(1, 2)).reshape(
        SIDE * SIDE, PIXELS, PIXELS, 3)
