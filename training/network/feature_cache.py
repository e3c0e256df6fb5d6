"""Features of a frozen backbone: computed once, kept on disk, and trained on instead of pictures.

Each set of pictures has three files in the cache's folder. KEY is a hash of everything that the features depend on:
pictures, backbone, view, seed and number of views.

    train-KEY.float16    features (views, pictures, A), row after row, mapped into memory
    train-KEY.done       a byte for each part of it: 1 once the part is on the disk
    train-KEY.json       what KEY is the hash of, for people

A process locks a block of parts before it computes them, so any number of processes and runs can share the work. A
lock ends with its process; a part without its byte is computed again. K views of every picture are drawn once; an epoch
then picks one of them at random.

Shape suffixes: K views, N pictures, A features.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.data.batches import Batches, View, at_once, batch_sizes, moved, on_device, own, shown, slices
from training.data.datasets import PictureFiles, Split, size_in_words
from training.errors import DataError, TrainingError
from training.network.derivatives import Compute, features_of
from training.network.distributed import ALONE, Processes
from zoo.architectures import classifier_name
from zoo.files import write_atomically

Kind = Literal["train", "meta", "test"]
VIEWS = 3  # a stream of randomness, besides those of training.data.batches

PART = 256  # about this many pictures: what a killed run loses
PARTS_A_BLOCK = 16  # claimed at once: worker processes are started again for each block
LARGEST_FLOAT16 = 65504.0


class Head(nn.Module):
    """A last layer as a whole network whose pictures are features, for the steps of training.method.metasaug."""

    def __init__(self, last: nn.Linear):
        super().__init__()
        self.last = last

    def forward_features(self, features_NA: Tensor) -> Tensor:
        return features_NA

    def forward_head(self, features_NA: Tensor, pre_logits: bool = False) -> Tensor:
        return features_NA if pre_logits else self.last(features_NA)

    def get_classifier(self) -> nn.Linear:
        return self.last

    def forward(self, features_NA: Tensor) -> Tensor:
        return self.last(features_NA)


class CachedBatches(Batches):
    """Batches of features (N, A) instead of pictures: the same order, with a cached view instead of a new crop.

    pictures, features_KNA   the input and output of `FeatureCache.of`; dtype: that of the last layer
    """

    def __init__(self, pictures: Split | PictureFiles, features_KNA: np.ndarray, view: View, seed: int,
                 batch_size: int, device: torch.device, dtype: torch.dtype = torch.float32,
                 processes: Processes = ALONE, each_C: Sequence[int] | np.ndarray | None = None):
        super().__init__(pictures, view, seed, batch_size, device, processes=processes, each_C=each_C)
        self.features_KNA, self.dtype = features_KNA, dtype

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.integers(0, len(self.features_KNA), n)

    def _shown(self, at: np.ndarray, drawn: np.ndarray, parts: list[slice]) -> Iterator[Tensor]:
        rows = drawn * self.features_KNA.shape[1] + at
        return (rows_NA.to(self.dtype) for rows_NA in _rows(self.features_KNA, rows, parts, self.device))


def features_in_order(
    features_1NA: np.ndarray, view: View, device: torch.device, processes: Processes = ALONE
) -> Iterator[tuple[Tensor, int]]:
    """The features of the pictures of training.data.batches.in_order, in the same batches."""
    sizes = batch_sizes(features_1NA.shape[1], at_once(view))
    parts = own(slices(sizes), processes)
    return zip(_rows(features_1NA, np.arange(features_1NA.shape[1]), parts, device), sizes, strict=True)


def _rows(features_KNA: np.ndarray, rows: np.ndarray, parts: list[slice], device: torch.device) -> Iterator[Tensor]:
    """Rows of all K * N, on the device; the features stay there if they fit."""
    whole, index, width = on_device(features_KNA, device), moved(rows, device), features_KNA.shape[2]
    for part in parts:
        if whole is None:
            yield moved(features_KNA.reshape(-1, width)[rows[part]], device)
        else:
            yield whole.view(-1, width).index_select(0, index[part])


@dataclass(frozen=True)
class FeatureCache:
    """Where features are kept, and how pictures become them.

    folder        of the cache; several runs may share it
    views, seed   K views of each training and meta picture, and the seed that draws them
    compute       the precision of the backbone, for training and meta features
    dtype         of training and meta features; test features are float32, so that results equal those of the pictures
    """

    folder: Path
    views: int
    view: View
    seed: int
    device: torch.device
    workers: int = 0
    compute: Compute = field(default_factory=Compute)
    dtype: type = np.float16
    say: Callable[[str], object] = tqdm.write
    _keys: dict[int, tuple[Any, str]] = field(default_factory=dict)
    _mapped: dict[Path, np.ndarray] = field(default_factory=dict)  # one for both stages: they share its copy on a GPU

    def check_disk(self, sets: Sequence[tuple[Kind, Split | PictureFiles]], module: nn.Module, trained: bool) -> None:
        """Say how much disk space the features of these sets take; TrainingError if there is not enough.

        trained   the backbone has its final weights, so features on the disk can be used
        """
        sizes = [self._bytes(kind, pictures, module) for kind, pictures in sets]
        there = sum(_bytes_at(self._file(kind, pictures, module)[0]) for kind, pictures in sets) if trained else 0
        if there < sum(sizes):
            self.say(f"--cache-features {self.views}: {size_in_words(sum(sizes))} of features in {self.folder}"
                     + (f", of which {size_in_words(there)} are there" if there else ""))
            self._check_free(sum(sizes) - there, sum(sizes))

    def _shape(self, kind: Kind, pictures: Split | PictureFiles, module: nn.Module) -> tuple[int, int, int]:
        width: int = module.get_classifier().in_features  # type: ignore[operator, union-attr, assignment]
        return 1 if kind == "test" else self.views, len(pictures), width

    def _dtype(self, kind: Kind) -> np.dtype:
        return np.dtype(np.float32 if kind == "test" else self.dtype)

    def _bytes(self, kind: Kind, pictures: Split | PictureFiles, module: nn.Module) -> int:
        return math.prod(self._shape(kind, pictures, module)) * self._dtype(kind).itemsize

    def _file(self, kind: Kind, pictures: Split | PictureFiles, module: nn.Module) -> tuple[Path, str]:
        """The file for the features of a set, and everything that they depend on."""
        view = self.view.pretrained_cfg if kind == "test" else {
            **dataclasses.asdict(self.view), "views": self.views, "seed": self.seed}
        view.pop("reading", None)
        if kept := self.view.reading.to_dict():
            view["reading"] = kept
        if self.view.crops == "shift":  # `reduced` changes no pixel there
            view.pop("reduced", None)
        identity = json.dumps({
            "features": self._shape(kind, pictures, module), "dtype": self._dtype(kind).name,
            "pictures": self._key_of(pictures), "backbone": _backbone_key(module), "view": view,
            **({"precision": self.compute.precision} if kind != "test" else {})}, indent=1)
        name = f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.{self._dtype(kind).name}"
        return self.folder / name, identity

    def _key_of(self, pictures: Split | PictureFiles) -> str:
        if id(pictures) not in self._keys:
            self._keys[id(pictures)] = pictures, _pictures_key(pictures)
        return self._keys[id(pictures)][1]

    def _check_free(self, lacking: int, needed: int) -> None:
        above = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(above).free
        if lacking > free:
            raise TrainingError(f"--cache-features {self.views}: the features take {size_in_words(needed)} in "
                                f"{self.folder}, where {size_in_words(free)} are free. Make room, take fewer views, or "
                                "give another folder with --features.")

    def of(self, kind: Kind, pictures: Split | PictureFiles, module: nn.Module,
           before_each: Callable[[], None] = lambda: None) -> np.ndarray:
        """The features of these pictures, (K, N, A), mapped from the disk; missing ones are computed.

        kind          train and meta: K views as in training; test: one view, as in predictions
        before_each   called before each part; it may raise to stop, and finished parts stay
        Raises TrainingError: no room, a folder that cannot be written, features too large for float16.
        """
        file, identity = self._file(kind, pictures, module)
        with _told(self.folder):
            if not file.exists():
                write_atomically(file.with_suffix(".json"), identity.encode())
            with _Store(file, self._shape(kind, pictures, module), at_once(self.view)) as store:
                if not store.whole():
                    self._build(store, kind, pictures, module, before_each)
            if file not in self._mapped:
                self._mapped[file] = store.mapped()
            return self._mapped[file]

    def _build(self, store: "_Store", kind: Kind, pictures: Split | PictureFiles, module: nn.Module,
               before_each: Callable[[], None]) -> None:
        size = self._bytes(kind, pictures, module)
        self._check_free(size - _bytes_at(store.data), size)
        drawn = None
        if kind != "test":
            drawn = [self.view.draw(np.random.default_rng([self.seed, k, VIEWS, kind == "meta"]), len(pictures))
                     for k in range(self.views)]
        was_training = module.training
        module.eval()
        try:
            with tqdm(total=store.parts, initial=int(store.done().sum()), unit="part", desc=f"{kind} features",
                      dynamic_ncols=True) as bar:
                while not store.whole():
                    before_each()
                    with store.claim() as parts:
                        if not parts:  # others have what is left
                            time.sleep(0.2)
                            continue
                        for part, rows_NA in zip(parts, self._compute(store, parts, pictures, drawn, module),
                                                 strict=True):
                            store.write(part, _fitting(rows_NA, store.dtype, pictures, kind))
                            before_each()
                    bar.n = int(store.done().sum())
                    bar.refresh()
        finally:
            module.train(was_training)

    @torch.no_grad()
    def _compute(self, store: "_Store", parts: Sequence[int], pictures: Split | PictureFiles,
                 drawn: list[np.ndarray] | None, module: nn.Module) -> Iterator[np.ndarray]:
        """The rows of each part, in the batches of `evaluate`."""
        of_part = [store.batches(part) for part in parts]
        at = [indices for _, batches in of_part for indices in batches]
        rows = None if drawn is None else np.concatenate(
            [drawn[k][indices] for k, batches in of_part for indices in batches])
        looks = shown(pictures, self.view, np.concatenate(at), rows, slices(map(len, at)), self.device, self.workers)
        dtype = next(module.parameters()).dtype
        for _, batches in of_part:
            with self.compute.autocast(self.device) if drawn is not None else contextlib.nullcontext():
                features = [features_of(module, next(looks).to(dtype)) for _ in batches]
            yield torch.cat(features).to(dtype).cpu().numpy()


def _fitting(rows_NA: np.ndarray, dtype: np.dtype, pictures: Split | PictureFiles, kind: str) -> np.ndarray:
    largest = np.abs(rows_NA).max(initial=0)
    if not np.isfinite(largest):
        raise TrainingError(f"--cache-features: the backbone gives NaN or infinite features of {kind} pictures. Check "
                            "that its weights are not damaged, and that --mean and --std are those of its training.")
    if dtype == np.float16 and largest > LARGEST_FLOAT16:
        raise TrainingError(f"--cache-features: features of up to {largest:.3g} do not fit into float16, which ends at "
                            f"{LARGEST_FLOAT16:.0f}. Train this backbone without --cache-features.")
    return rows_NA.astype(dtype)


class _Store:
    """The files of one set of features; see the top of this file.

    batch   pictures per forward pass; a part is a few batches of one view
    """

    def __init__(self, data: Path, shape: tuple[int, int, int], batch: int):
        self.data, self.shape, self.batch = data, shape, batch
        self.dtype = np.dtype(data.suffix.removeprefix("."))
        self.part = max(1, round(PART / batch)) * batch
        self.parts_a_view = -(-shape[1] // self.part)
        self.parts = shape[0] * self.parts_a_view

    def __enter__(self) -> "_Store":
        # One descriptor for each file: closing a second one would release this process's locks.
        self.progress = os.open(self.data.with_suffix(".done"), os.O_RDWR | os.O_CREAT, 0o666)
        self.file = os.open(self.data, os.O_RDWR | os.O_CREAT, 0o666)
        size, whole = os.fstat(self.file).st_size, math.prod(self.shape) * self.dtype.itemsize
        if size == 0 and not self.done().any():
            os.ftruncate(self.file, whole)
        elif size != whole:
            self.__exit__()
            raise TrainingError(f"{self.data} has {size:,} bytes, not {whole:,}: it was cut off or changed. Remove it "
                                f"and {self.data.with_suffix('.done').name}; it is then computed again.")
        return self

    def __exit__(self, *_) -> None:
        os.close(self.progress)
        os.close(self.file)

    def done(self) -> np.ndarray:
        """bool (parts,)."""
        read = os.pread(self.progress, self.parts, 0)
        return np.frombuffer(read.ljust(self.parts, b"\0"), np.uint8) == 1

    def whole(self) -> bool:
        return bool(self.done().all())

    @contextlib.contextmanager
    def claim(self) -> Iterator[list[int]]:
        """Lock parts until the end of the block; an empty list if other processes hold all missing ones."""
        for first in range(0, self.parts, PARTS_A_BLOCK):
            length = min(PARTS_A_BLOCK, self.parts - first)
            if self.done()[first : first + length].all() or not self._lock(first, length):
                continue
            try:
                missing = np.flatnonzero(~self.done()[first : first + length])  # another may just have finished it
                if len(missing):
                    yield [first + int(i) for i in missing]
                    return
            finally:
                fcntl.lockf(self.progress, fcntl.LOCK_UN, length, first)
        yield []

    def _lock(self, first: int, length: int) -> bool:
        try:
            fcntl.lockf(self.progress, fcntl.LOCK_EX | fcntl.LOCK_NB, length, first)
            return True
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise

    def batches(self, part: int) -> tuple[int, list[np.ndarray]]:
        """The view of a part, and the indices of its pictures, batch by batch."""
        k, place = divmod(part, self.parts_a_view)
        last = min((place + 1) * self.part, self.shape[1])
        return k, [np.arange(i, min(i + self.batch, last)) for i in range(place * self.part, last, self.batch)]

    def write(self, part: int, rows_NA: np.ndarray) -> None:
        """Write the rows to the disk, and only then the byte that marks them as done."""
        k, batches = self.batches(part)
        place = (k * self.shape[1] + int(batches[0][0])) * self.shape[2] * self.dtype.itemsize
        left = memoryview(rows_NA.tobytes())
        while left:
            written = os.pwrite(self.file, left, place)
            left, place = left[written:], place + written
        os.fsync(self.file)
        os.pwrite(self.progress, b"\1", part)
        os.fsync(self.progress)

    def mapped(self) -> np.ndarray:
        with open(self.data, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), self.dtype).reshape(self.shape)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"The features could not be written into {folder}: {error.strerror or error}. Finished "
                            "parts stay. Make room or name another folder with --features, then continue with "
                            "--resume.") from error


def _bytes_at(path: Path) -> int:
    """Bytes of a file that are on the disk: it begins sparse."""
    return min(path.stat().st_blocks * 512, path.stat().st_size) if path.exists() else 0


def _pictures_key(pictures: Split | PictureFiles) -> str:
    """A hash of labels and pictures: names and sizes of files, or pixels of pictures in memory."""
    digest = hashlib.sha256(pictures.labels.astype("<i8").tobytes())
    if isinstance(pictures, Split):
        digest.update(str(pictures.pictures.shape).encode())
        digest.update(memoryview(np.ascontiguousarray(pictures.pictures)))  # type: ignore[arg-type]
        return digest.hexdigest()
    for name, path in zip(pictures.names, pictures.paths, strict=True):
        try:
            digest.update(f"{path.stat().st_size}\0{name}\0".encode(errors="surrogateescape"))
        except OSError as error:
            raise DataError(f"{name} could be read at the start but cannot be read now: {error.strerror or error}."
                            ) from error
    return digest.hexdigest()


def _backbone_key(module: nn.Module) -> str:
    """A hash of every tensor except the last layer's."""
    digest, last = hashlib.sha256(), f"{classifier_name(module)}."
    for name, tensor in module.state_dict().items():
        if not name.startswith(last):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
