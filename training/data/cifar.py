"""CIFAR-10-LT and CIFAR-100-LT: the original files or class folders, cut into an exponential long tail."""

import hashlib
import io
import pickle
from collections.abc import Callable, Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.authors_subsets import authors_long_tail, authors_meta
from training.data.datasets import LongTailed, Split, content_key, read_pictures
from training.data.tables import list_class_folders
from training.errors import DataError


def long_tail_counts(largest: int, num_classes: int, imbalance: float) -> list[int]:
    """n_c = largest * imbalance^(-c / (C - 1)), rounded down: the exponential profile of Cui et al. 2019.

    largest     pictures of class 0        imbalance   n_0 / n_(C-1), at least 1
    """
    if not imbalance >= 1:
        raise DataError(f"--imbalance {imbalance:g}: must be at least 1 (largest class / smallest class).")
    counts = [int(largest * imbalance ** (-c / (num_classes - 1))) for c in range(num_classes)]
    if counts[-1] < 1:
        raise DataError(f"--imbalance {imbalance:g} leaves the smallest class of {largest} without a picture; "
                        f"{largest} is the most that works here.")
    return counts


def cut(
    keys: Sequence[Hashable], labels: np.ndarray, banned: AbstractSet[Hashable], num_classes: int, meta_per_class: int,
    imbalance: float, seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the meta set, then the long tail from what remains.

    keys     one per picture, equal if the content is equal; a second copy is not used
    labels   int64 (N,)          banned   keys of the test set, which are not used
    Returns the indices of the training and of the meta pictures, by class, in a random order fixed by `seed`.
    """
    rng = np.random.default_rng(seed)
    taken = set(banned)
    pools: list[list[int]] = []
    for c in range(num_classes):
        pool = []
        for i in rng.permutation(np.flatnonzero(labels == c)):
            if keys[i] not in taken:
                taken.add(keys[i])
                pool.append(int(i))
        pools.append(pool)
    smallest = min(len(pool) for pool in pools)
    if smallest <= meta_per_class:
        raise DataError(f"A class has only {smallest} pictures: not enough for --meta-per-class {meta_per_class} "
                        "and one to train on.")
    meta = [i for pool in pools for i in pool[:meta_per_class]]
    # The published sizes (4990, 490) count from the whole class, so a copy dropped above costs the tail nothing.
    largest = int(np.bincount(labels, minlength=num_classes).max()) - meta_per_class
    train = [
        i
        for pool, n in zip(pools, long_tail_counts(largest, num_classes, imbalance), strict=True)
        for i in pool[meta_per_class : meta_per_class + n]
    ]
    return np.array(train), np.array(meta)


def cut_as_the_authors(
    labels: np.ndarray, num_classes: int, meta_per_class: int, imbalance: float
) -> tuple[np.ndarray, np.ndarray]:
    """The authors' own training and meta pictures; see training.data.authors_subsets."""
    sizes = np.bincount(labels, minlength=num_classes)
    if sizes.min() <= meta_per_class:
        raise DataError(f"A class has only {sizes.min()} pictures: not enough for --meta-per-class {meta_per_class} "
                        "and one to train on.")
    meta, rest = authors_meta(labels, num_classes, meta_per_class)
    counts = long_tail_counts(int(sizes.max()) - meta_per_class, num_classes, imbalance)
    return rest[authors_long_tail(labels[rest], counts)], meta


@dataclass(frozen=True)
class _Cifar:
    title: str
    folder: str  # of the original files
    train_files: tuple[tuple[str, str], ...]  # name, md5 as published by its authors
    test_files: tuple[tuple[str, str], ...]
    names_file: str
    names_key: str
    labels_key: str
    num_classes: int
    class_size: int


CIFAR = {
    "cifar10-lt": _Cifar(
        "CIFAR-10", "cifar-10-batches-py",
        (("data_batch_1", "c99cafc152244af753f735de768cd75f"), ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
         ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"), ("data_batch_4", "634d18415352ddfa80567beed471001a"),
         ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb")),
        (("test_batch", "40351d587109b95175f43aff81a1287e"),),
        "batches.meta", "label_names", "labels", 10, 5000),
    "cifar100-lt": _Cifar(
        "CIFAR-100", "cifar-100-python", (("train", "16019d7e3df5f24257cddd939b257f8d"),),
        (("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),), "meta", "fine_label_names", "fine_labels", 100, 500),
}

# Mean and standard deviation of the training pictures, from the authors' code.
CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


def load_cifar(
    dataset: str, root: Path | None, imbalance: float, meta_per_class: int, subset_seed: int,
    download: bool = False, subset: str = "seeded",
) -> LongTailed:
    """CIFAR-10-LT or CIFAR-100-LT from `root`: the original files, or class folders train/CLASS and test/CLASS.

    dataset    "cifar10-lt" or "cifar100-lt"
    root       cifar-10-batches-py or the folder that holds it, or a folder with train/ and test/
    download   fetch the original files into `root` first, with torchvision
    subset     "seeded": by `subset_seed`, without copies; "authors": exactly the pictures of the paper's code, if the
               files are the original ones or class folders whose names keep the original order
    Raises DataError if pictures are missing or damaged.
    """
    return cut_pool(find_pool(dataset, root, download), imbalance, meta_per_class, subset_seed, subset)


@dataclass(frozen=True)
class Pool:
    """All pictures that may be trained on, and the test set.

    labels   int64 (N,)                    pick     places -> pictures
    keys     one per picture, equal if the content is equal
    banned   keys of the test pictures
    """

    labels: np.ndarray
    keys: Sequence[Hashable]
    banned: AbstractSet[Hashable]
    pick: Callable[[np.ndarray], Split]
    test: Split
    label_names: tuple[str, ...]
    source: str


def find_pool(dataset: str, root: Path | None, download: bool = False) -> Pool:
    """The whole data set in `root`; see `load_cifar`."""
    about = CIFAR[dataset]
    root = Path("data") if root is None else root.expanduser()
    if download:
        import torchvision

        kind = {"cifar10-lt": torchvision.datasets.CIFAR10, "cifar100-lt": torchvision.datasets.CIFAR100}[dataset]
        try:
            kind(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{about.title} could not be downloaded into {root}: {error}") from error
    batches = root if root.name == about.folder else root / about.folder
    if batches.is_dir():
        return _from_batches(about, batches)
    if (root / "train").is_dir() and (root / "test").is_dir():
        return _from_class_folders(about, root)
    raise DataError(_cifar_missing(about, dataset, root))


def places_of(
    pool: Pool, imbalance: float, meta_per_class: int, subset_seed: int, subset: str
) -> tuple[np.ndarray, np.ndarray]:
    """Places in the pool of the training and of the meta pictures."""
    classes = len(pool.label_names)
    if subset == "authors":
        return cut_as_the_authors(pool.labels, classes, meta_per_class, imbalance)
    return cut(pool.keys, pool.labels, pool.banned, classes, meta_per_class, imbalance, subset_seed)


def cut_pool(pool: Pool, imbalance: float, meta_per_class: int, subset_seed: int, subset: str) -> LongTailed:
    """The long tail and the meta set cut from the pool; see `load_cifar`."""
    train_at, meta_at = places_of(pool, imbalance, meta_per_class, subset_seed, subset)
    notes: tuple[str, ...] = ()
    if subset == "authors":
        copies = sum(pool.keys[i] in pool.banned for i in (*train_at, *meta_at))
        notes = ("The authors' subset: exactly their pictures if the files keep the original order. "
                 f"Copies of test pictures stay in, as in their code: {copies:,}.",)
    return LongTailed(pool.pick(train_at), pool.pick(meta_at), pool.test, pool.label_names, pool.source, CIFAR_MEAN,
                      CIFAR_STD, notes=notes)


def _from_batches(about: _Cifar, folder: Path) -> Pool:
    train, test, names, source = _read_cifar_batches(about, folder)
    keys, banned = ([content_key(picture.tobytes()) for picture in split.pictures] for split in (train, test))
    return Pool(train.labels, keys, set(banned), train.at, test, names, source)


def _from_class_folders(about: _Cifar, root: Path) -> Pool:
    paths, labels, names = list_class_folders(root / "train")
    test_paths, test_labels, test_names = list_class_folders(root / "test")
    if names != test_names:
        raise DataError(f"{root}: train/ and test/ have different classes: "
                        f"{', '.join(sorted(set(names) ^ set(test_names))[:10])}.")
    if len(names) != about.num_classes:
        raise DataError(f"{root / 'train'} has {len(names)} class folders; {about.title} has {about.num_classes}.")
    keys, banned = ([content_key(_bytes_of(path)) for path in each] for each in (paths, test_paths))
    test = Split(read_pictures(test_paths, (32, 32)), test_labels)
    kinds = {path.suffix.lower().lstrip(".").replace("jpg", "jpeg").upper() for path in test_paths}
    return Pool(labels, keys, set(banned),
                 lambda at: Split(read_pictures([paths[i] for i in at], (32, 32)), labels[at]), test, names,
                 f"{about.title} ({', '.join(sorted(kinds))})")


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _cifar_missing(about: _Cifar, dataset: str, root: Path) -> str:
    found = "does not exist" if not root.exists() else "holds neither"
    return (
        f"{about.title} not found: {root} {found}. Name its folder with --data DIR, where DIR holds either\n"
        f"  {about.folder}/          the original files, or\n"
        f"  train/CLASS/*.jpg and test/CLASS/*.jpg   ({about.num_classes} class folders each)\n"
        f"or fetch the original (170 MB, from its authors' site): "
        f"metasaug train {dataset} --data {root} --download"
    )


class _ArraysOnly(pickle.Unpickler):
    """Read the original CIFAR files, which are pickles: only numpy arrays and plain containers may come out."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
        ("numpy", "dtype"), ("_codecs", "encode"),
    })

    def find_class(self, module: str, name: str):
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")


def _read_cifar_batches(about: _Cifar, folder: Path) -> tuple[Split, Split, tuple[str, ...], str]:
    as_published = True

    def load(name: str, md5: str | None) -> dict:
        nonlocal as_published
        path = folder / name
        try:
            content = path.read_bytes()
            loaded = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
        except FileNotFoundError:
            raise DataError(f"{path} is missing: unpack the whole archive of {about.title} again.") from None
        except Exception as error:  # an unpickler can raise any exception on broken bytes
            raise DataError(f"{path} cannot be read ({error}): download {about.title} again.") from error
        as_published &= md5 is None or hashlib.md5(content, usedforsecurity=False).hexdigest() == md5
        return loaded

    def split(files: Sequence[tuple[str, str]]) -> Split:
        pictures, labels = [], []
        for name, md5 in files:
            batch = load(name, md5)
            try:
                data, at = np.asarray(batch["data"], np.uint8), np.asarray(batch[about.labels_key], np.int64)
                pictures.append(data.reshape(len(at), 3, 32, 32).transpose(0, 2, 3, 1))
                labels.append(at)
                if len(at) and not (at.min() >= 0 and at.max() < about.num_classes):
                    raise ValueError("labels out of range")
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{folder / name} is not a file of {about.title}: {error!r}.") from error
        return Split(np.ascontiguousarray(np.concatenate(pictures)), np.concatenate(labels))

    train, test = split(about.train_files), split(about.test_files)
    names = tuple(str(name) for name in load(about.names_file, None).get(about.names_key, ()))
    if len(names) != about.num_classes:
        raise DataError(f"{folder / about.names_file} names {len(names)} classes, not {about.num_classes}.")
    source = about.title if as_published else f"{about.title} (files that differ from the published ones)"
    return train, test, names, source
