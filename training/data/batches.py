"""Batches as functions of (seed, epoch, step): from pictures in memory, or decoded by worker processes as they come.

Everything random is drawn here, in the main process, before a worker sees it: how many there are changes no bit.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset

from training.data.datasets import PictureFiles, Split
from training.errors import DataError
from training.network.distributed import ALONE, Processes
from training.recipes import CropMode, Crops, Flips
from zoo.errors import PictureError
from zoo.images import decode, fitted

# Streams of randomness; each draw is np.random.default_rng([seed, epoch, STREAM, ...]).
ORDER, CROPS, META = 0, 1, 2

# Pictures are held in memory, fitted and padded, where they take at most this and half of what the machine has: a
# million of 32 x 32, 20,000 of 224 x 224.
IN_MEMORY_BYTES = 8e9

@dataclass(frozen=True)
class View:
    """How a picture becomes the network's input, in training and in tests.

    size         height and width          mean, std   per channel, in [0, 1]
    crop_mode, crop_pct   how it is fitted into `size` in tests, and for `shift`: zoo.images.fitted
    crops        shift: fitted, reflect-padded by an eighth and cropped at random (the CIFAR papers); resized: a part of
                 8 to 100 % of the picture, 3:4 to 4:3, at random (torchvision's RandomResizedCrop)
    flips        none; mirror: left and right; all: also upside down and a quarter turn, for things without an up
    color_jitter brightness, contrast and saturation times 1 ± this, in random order; `resized` only
    interpolation   bilinear or bicubic: how pictures are resized
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_mode: CropMode = "center"
    crop_pct: float = 1.0
    crops: Crops = "shift"
    flips: Flips = "mirror"
    color_jitter: float = 0.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The same for those who predict: keys of a model folder."""
        return {"input_size": [3, *self.size], "mean": list(self.mean), "std": list(self.std),
                "interpolation": self.interpolation, "crop_pct": self.crop_pct, "crop_mode": self.crop_mode}

    @property
    def padding(self) -> int:
        return self.size[0] // 8

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """int64 (n, 5): what happens to each of n pictures. shift: top, left; resized: a seed, 0; then mirrored,
        upside down, turned."""
        none = np.zeros(n, np.int64)
        if self.crops == "shift":
            place = [rng.integers(0, 2 * self.padding + 1, n), rng.integers(0, 2 * self.padding + 1, n)]
        else:
            place = [rng.integers(0, 2**63, n), none]
        mirrored = none if self.flips == "none" else rng.integers(0, 2, n)
        others = [rng.integers(0, 2, n), rng.integers(0, 2, n)] if self.flips == "all" else [none, none]
        return np.stack([*place, mirrored, *others], axis=1)

    def fit(self, picture: Image.Image) -> np.ndarray:
        """uint8 (H, W, 3), nothing random."""
        return np.asarray(fitted(picture, self.pretrained_cfg))

    def padded(self, fitted_picture: np.ndarray) -> np.ndarray:
        """(..., H, W, 3) -> reflect-padded, for `shifted`."""
        edge = (self.padding, self.padding)
        return np.pad(fitted_picture, (*[(0, 0)] * (fitted_picture.ndim - 3), edge, edge, (0, 0)), mode="reflect")

    def shifted(self, padded: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        top, left, *flips = drawn
        return _flipped(padded[top : top + self.size[0], left : left + self.size[1]], flips)

    def augmented(self, picture: Image.Image, drawn: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3), as drawn."""
        if self.crops == "shift":
            return self.shifted(self.padded(self.fit(picture)), drawn)
        rng = np.random.default_rng(drawn[0])
        how = Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR
        part = picture.resize(self.size[::-1], how, box=_part(rng, *picture.size))
        return _flipped(np.asarray(_jittered(rng, part, self.color_jitter)), drawn[2:])


def _flipped(picture: np.ndarray, flips: Sequence[int] | np.ndarray) -> np.ndarray:
    """(H, W, 3); flips: mirrored, upside down, turned."""
    mirrored, upside_down, turned = flips
    if turned:
        picture = picture.swapaxes(0, 1)
    return picture[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def _part(rng: np.random.Generator, width: int, height: int) -> tuple[float, float, float, float]:
    """RandomResizedCrop's box: ten tries at 8 to 100 % of the area and 3:4 to 4:3, then the middle."""
    for _ in range(10):
        area = rng.uniform(0.08, 1) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _jittered(rng: np.random.Generator, picture: Image.Image, spread: float) -> Image.Image:
    if spread:
        for which in rng.permutation(3):
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
            picture = kind(picture).enhance(rng.uniform(1 - spread, 1 + spread))
    return picture


# ---- pictures on disk ----


class _Decoded(Dataset):
    """One picture by its index and, in training, what was drawn for it; a bad one comes as what is wrong with it."""

    def __init__(self, paths: Sequence[Path], view: View):
        self.paths, self.view = paths, view

    def __getitem__(self, row: tuple[int, np.ndarray | None]) -> np.ndarray | str:
        index, drawn = row
        try:
            picture = decode(self.paths[index])
        except PictureError as error:
            return str(error)
        return self.view.fit(picture) if drawn is None else self.view.augmented(picture, drawn)


def _decoded(
    files: PictureFiles, view: View, batches: Sequence[np.ndarray], drawn: Sequence[np.ndarray] | None, workers: int
) -> Iterator[np.ndarray]:
    """uint8 (N, H, W, 3) for each array of indices; `drawn` goes with them. DataError names what cannot be read."""
    rows = [[(int(i), None if drawn is None else drawn[b][k]) for k, i in enumerate(at)]
            for b, at in enumerate(batches)]
    # Forked, whatever Python's default is: started anew, each would import torch and be sent the files every epoch.
    loader = DataLoader(_Decoded(files.paths, view), batch_sampler=rows, num_workers=workers, collate_fn=list,
                        worker_init_fn=_in_a_worker,
                        multiprocessing_context="fork" if workers and sys.platform == "linux" else None)
    for pictures in loader:
        bad = [picture for picture in pictures if isinstance(picture, str)]
        if bad:
            raise DataError("Pictures that could be read at the start cannot be now:\n  " + "\n  ".join(bad[:10]))
        yield np.stack(pictures)


def _in_a_worker(_worker: int) -> None:
    """Ctrl-C, the end of a terminal and some schedulers' SIGTERM reach every process: the main one decides, and needs
    its workers until it has saved. Where it was killed itself, they leave: a worker that waits to hand over a batch
    would stay for ever, and hold the lock of the run folder.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_later(*_) -> None:
    timer = threading.Timer(30, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def hold(pictures: Split | PictureFiles, view: View, workers: int = 0) -> Split:
    """All of them fitted, in memory."""
    if isinstance(pictures, Split):
        if pictures.pictures.shape[1:3] == view.size:
            return pictures
        return Split(np.stack([view.fit(Image.fromarray(p)) for p in pictures.pictures]), pictures.labels)
    held = np.empty((len(pictures), *view.size, 3), np.uint8)
    parts = np.array_split(np.arange(len(pictures)), max(1, len(pictures) // 256))
    for at, part in zip(parts, _decoded(pictures, view, parts, None, workers), strict=True):
        held[at] = part
    return Split(held, pictures.labels)


def fits_in_memory(view: View, pictures: int) -> bool:
    padded = (view.size[0] + 2 * view.padding) * (view.size[1] + 2 * view.padding)
    needed = pictures * 3 * (view.size[0] * view.size[1] + padded)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return view.crops == "shift" and needed <= min(IN_MEMORY_BYTES, machine / 2)


# ---- batches ----


class Batches:
    """Augmented, normalised batches of a training or meta set: float32 (N, 3, H, W) and int64 (N,), on the device.

    pictures   in memory and of the view's size (`hold`), or on disk          workers   processes that decode
    processes  those that train together: each gets its part of the pictures, and the labels of all
    """

    def __init__(self, pictures: Split | PictureFiles, view: View, seed: int, batch_size: int, device: torch.device,
                 workers: int = 0, processes: Processes = ALONE):
        self.pictures, self.view, self.workers = pictures, view, workers
        self.labels = pictures.labels
        self.seed, self.device, self.processes = seed, device, processes
        self.batch_size = min(batch_size, len(pictures))
        if self.batch_size < 2 * processes.count:
            raise DataError(f"{self.batch_size} pictures a step are too few for {processes.count} processes: batch "
                            "norm needs 2 in each.")
        # A last batch of one picture (a process) has no batch statistics: it is left out.
        self.steps = len(pictures) // self.batch_size + (len(pictures) % self.batch_size >= 2 * processes.count)

    @cached_property
    def padded(self) -> np.ndarray | None:
        return self.view.padded(self.pictures.pictures) if isinstance(self.pictures, Split) else None

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """What happens to each of n pictures, (n, ...)."""
        return self.view.draw(rng, n)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each picture once, in an order of its own; `first_step` on."""
        n = len(self.labels)
        order = np.random.default_rng([self.seed, epoch, ORDER]).permutation(n)
        drawn = self.draw(np.random.default_rng([self.seed, epoch, CROPS]), n)
        batches = [order[step * self.batch_size : (step + 1) * self.batch_size]
                   for step in range(first_step, self.steps)]
        yield from self._batches(batches, [drawn[at] for at in batches])

    def meta(self, epoch: int, first_step: int, last_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A batch for each of these steps; whole ones only, the set gone through in a new order each time."""
        n = len(self.labels)
        turns = n // self.batch_size
        batches, drawn = [], []
        for step in range(first_step, last_step):
            turn, part = divmod(step, turns)
            rng = np.random.default_rng([self.seed, epoch, META, turn])
            # A copy: a view would keep every step's whole permutation.
            batches.append(rng.permutation(n)[part * self.batch_size : (part + 1) * self.batch_size].copy())
            drawn.append(self.draw(rng, n)[batches[-1]])
        yield from self._batches(batches, drawn)

    def _batches(self, batches: list[np.ndarray], drawn: list[np.ndarray]):
        own, own_drawn = ([rows[self.processes.part(len(rows))] for rows in each] for each in (batches, drawn))
        for at, pictures in zip(batches, self._augmented(own, own_drawn), strict=True):
            yield normalised(pictures, self.view, self.device), _moved(self.labels[at], self.device)

    def _augmented(self, batches: list[np.ndarray], drawn: list[np.ndarray]) -> Iterator[np.ndarray]:
        if isinstance(self.pictures, PictureFiles):
            yield from _decoded(self.pictures, self.view, batches, drawn, self.workers)
            return
        assert self.padded is not None
        for at, rows in zip(batches, drawn, strict=True):
            yield np.stack([self.view.shifted(self.padded[i], row) for i, row in zip(at, rows, strict=True)])


def in_order(
    pictures: Split | PictureFiles, view: View, device: torch.device, workers: int = 0, processes: Processes = ALONE
) -> Iterator[tuple[torch.Tensor, int]]:
    """The pictures in their order, as predicting sees them: this process's part of each batch, and the batch's size."""
    size = at_once(view)
    batches = [np.arange(i, min(i + size, len(pictures))) for i in range(0, len(pictures), size)]
    own = [at[processes.part(len(at))] for at in batches]
    arrays = read(pictures, view, [at for at in own if len(at)], None, workers)
    for at, whole in zip(own, batches, strict=True):
        array = next(arrays) if len(at) else np.empty((0, *view.size, 3), np.uint8)
        yield normalised(array, view, device), len(whole)


def at_once(view: View) -> int:
    """Pictures in a batch of `in_order`."""
    return max(16, min(500, 500 * 64 * 64 // (view.size[0] * view.size[1])))


def read(
    pictures: Split | PictureFiles, view: View, at: Sequence[np.ndarray], drawn: Sequence[np.ndarray] | None,
    workers: int = 0,
) -> Iterator[np.ndarray]:
    """uint8 (N, H, W, 3) for each array of indices: as drawn for them (`View.draw`), or as predicting sees them."""
    if isinstance(pictures, PictureFiles):
        yield from _decoded(pictures, view, at, drawn, workers)
        return
    for b, i in enumerate(at):
        held = hold(Split(pictures.pictures[i], pictures.labels[i]), view).pictures
        yield held if drawn is None else np.stack(
            [view.shifted(padded, row) for padded, row in zip(view.padded(held), drawn[b], strict=True)])


def normalised(pictures: np.ndarray, view: View, device: torch.device) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W), channels last in memory: 1.6 x faster on a CPU."""
    nchw = _moved(pictures, device).permute(0, 3, 1, 2)
    return ((nchw.float() / 255 - _per_channel(view.mean, device)) / _per_channel(view.std, device)).contiguous(
        memory_format=torch.channels_last)


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def _moved(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """To a GPU through pinned memory: nobody waits for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
