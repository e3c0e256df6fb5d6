"""Batches of pictures as functions of (seed, epoch, step): from memory, or decoded from disk by worker processes.

The main process draws everything random, for a whole epoch at once, so the number of workers does not change results.
Pictures in memory are moved to the device once. There a batch is a gather from all pictures, by pixel indices computed
from the drawn crops and flips.
"""

import math
import mmap
import os
import random
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.data.datasets import PictureFiles, Split
from training.data.splits import rank_in_class
from training.errors import DataError
from training.network.distributed import ALONE, Processes
from training.recipes import CropMode, Crops, Flips
from zoo.errors import PictureError
from zoo.images import Picture, decode, fitted
from zoo.machine import memory
from zoo.pixels import PUBLIC, Reading

# Streams of randomness; each draw is np.random.default_rng([seed, epoch, STREAM, ...]).
ORDER, CROPS, META = 0, 1, 2

# Pictures are kept in memory, resized, if they take at most this and half of the machine's memory: 2.6 million of
# 32 x 32, 53,000 of 224 x 224.
IN_MEMORY_BYTES = 8e9
ON_DEVICE_SHARE = 0.25  # of the device's free memory, for one set: the rest is the network's

@dataclass(frozen=True)
class View:
    """How a picture becomes the network's input, in training and in tests.

    size         height and width          mean, std   per channel, in [0, 1]
    crop_mode, crop_pct   how it is fitted into `size` in tests, and for `shift`: zoo.images.fitted
    crops        shift: fitted, reflect-padded by an eighth and cropped at random (the CIFAR papers); resized: a part of
                 `crop_area` to 100 % of the picture, 3:4 to 4:3, at random (torchvision's RandomResizedCrop)
    flips        none; mirror: left and right; all: also upside down and a quarter turn
    color_jitter brightness, contrast and saturation times 1 ± this, in random order; `resized` only
    interpolation   bilinear or bicubic: how pictures are resized
    crop_area    the smallest part that `resized` takes
    reduced      for `resized`: decode JPEGs in the quick way, and at 1/2, 1/4 or 1/8 of their sides if the part still
                 has `size` pixels. On average under 3 of 255 levels from exact decoding, which METASAUG_EXACT_JPEG=1
                 in the environment turns on
    reading      how to read picture files that leave something open
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
    crop_area: float = 0.08
    reduced: bool = os.environ.get("METASAUG_EXACT_JPEG") != "1"
    reading: Reading = PUBLIC

    def __post_init__(self):
        height, width = self.size
        if self.flips == "all" and height != width:
            raise DataError(f"--flips all needs square pictures for its quarter turns, and {width} x {height} is not "
                            "square: give --input-size, or another --flips.")

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The view for predictions, with the keys of a model folder."""
        return {"input_size": [3, *self.size], "mean": list(self.mean), "std": list(self.std),
                "interpolation": self.interpolation, "crop_pct": self.crop_pct, "crop_mode": self.crop_mode}

    @property
    def padding(self) -> int:
        return self.size[0] // 8

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """int64 (n, 5): the random crop and flips of each of n pictures.

        Columns: top and left for shift, a seed and 0 for resized; then mirrored, upside down, turned.
        """
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

    def fit_all(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3), `fit` of each; pictures that have the size already are returned unchanged."""
        if pictures.shape[1:3] == self.size:
            return pictures
        return np.stack([self.fit(Image.fromarray(picture)) for picture in pictures])

    def padded(self, fitted_picture: np.ndarray) -> np.ndarray:
        """(..., H, W, 3) -> reflect-padded, for `shifted`."""
        edge = (self.padding, self.padding)
        return np.pad(fitted_picture, (*[(0, 0)] * (fitted_picture.ndim - 3), edge, edge, (0, 0)), mode="reflect")

    def shifted(self, padded: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        top, left, *flips = drawn
        return _flipped(padded[top : top + self.size[0], left : left + self.size[1]], flips)

    def augmented(self, source: Picture, drawn: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3), decoded and as drawn."""
        if self.crops == "shift":
            return self.shifted(self.padded(self.fit(decode(source, reading=self.reading))), drawn)
        rng = random.Random(int(drawn[0]))  # made in a tenth of NumPy's time
        part = _resized_part(source, rng, self)
        return _flipped(_jittered(rng, part, self.color_jitter), drawn[2:])


def _flipped(picture: np.ndarray, flips: Sequence[int] | np.ndarray) -> np.ndarray:
    """(H, W, 3); flips: mirrored, upside down, turned."""
    mirrored, upside_down, turned = flips
    if turned:
        picture = picture.swapaxes(0, 1)
    sides = [side for side, flip in ((0, upside_down), (1, mirrored)) if flip]
    return torch.from_numpy(picture).flip(sides).numpy() if sides else picture  # eight times numpy's speed


def _resized_part(source: Picture, rng: random.Random, view: View) -> np.ndarray:
    """uint8 (H, W, 3): a random part of the picture in the view's size; a JPEG is decoded no larger than needed."""
    height, width = view.size
    sides: tuple[int, int] | None = None
    part: tuple[int, int, int, int] | None = None

    def shrink(width: int, height: int) -> int:
        nonlocal sides, part
        sides, part = (width, height), _part(rng, width, height, view.crop_area)
        return _scale(part, view)

    picture = decode(source, shrink=shrink if view.reduced else None, reading=view.reading)
    if sides is None or part is None:  # `shrink` was not called
        sides, part = picture.size, _part(rng, *picture.size, view.crop_area)
    # On the grid of the smaller decoding, even if it was not used, so that both show the same part.
    grid = _scale(part, view)
    decoded = next(s for s in (1, 2, 4, 8) if -(-sides[0] // s) == picture.width)
    left, top, right, bottom = (side // grid * grid // decoded for side in part)
    pixels = torch.from_numpy(np.array(picture.crop((left, top, right, bottom))))
    # Pillow's result to a level, in a fifth of the time.
    resized = F.interpolate(pixels[None].permute(0, 3, 1, 2), (height, width), mode=view.interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _scale(part: tuple[int, int, int, int], view: View) -> int:
    """The largest factor for decoding smaller with which the part keeps at least the view's pixels."""
    left, top, right, bottom = part
    return max(s for s in (1, 2, 4, 8)
               if s == 1 or (right // s - left // s >= view.size[1] and bottom // s - top // s >= view.size[0]))


def _part(rng: random.Random, width: int, height: int, least: float = 0.08) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box: ten tries at `least` to 100 % of the area and 3:4 to 4:3, then the middle."""
    for _ in range(10):
        area = rng.uniform(least, 1) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = max(1, min(width, round(height * 4 / 3))), max(1, min(height, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _jittered(rng: random.Random, pixels: np.ndarray, spread: float) -> np.ndarray:
    if not spread:
        return pixels
    picture = Image.fromarray(pixels)
    for kind in rng.sample((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), 3):
        picture = kind(picture).enhance(rng.uniform(1 - spread, 1 + spread))
    return np.array(picture)


# ---- pictures on disk ----


class _Decoded(Dataset):
    """Decoded batches for slices of `at` and `drawn`: uint8 (N, H, W, 3), and the errors of bad pictures.

    slots   memory shared with the workers, which batches use in turn: nothing is copied or sent
    """

    def __init__(self, paths: Sequence[os.PathLike], view: View, at: np.ndarray, drawn: np.ndarray | None,
                 slots: np.ndarray | None):
        self.paths, self.view, self.at, self.drawn, self.slots = paths, view, at, drawn, slots

    def __getitem__(self, numbered: tuple[int, slice]) -> tuple[np.ndarray | None, list[str]]:
        number, part = numbered
        at, bad = self.at[part], list[str]()
        if self.slots is None:
            pictures = np.empty((len(at), *self.view.size, 3), np.uint8)
        else:
            pictures = self.slots[number % len(self.slots)]
        for k, i in enumerate(at):
            try:
                if self.drawn is None:
                    pictures[k] = self.view.fit(decode(self.paths[i], reading=self.view.reading))
                else:
                    pictures[k] = self.view.augmented(self.paths[i], self.drawn[part][k])
            except PictureError as error:
                bad.append(str(error))
        return (pictures if self.slots is None else None), bad


def _decoded(
    files: PictureFiles, view: View, at: np.ndarray, drawn: np.ndarray | None, parts: Sequence[slice], workers: int
) -> Iterator[np.ndarray]:
    """uint8 (N, H, W, 3) for each part of `at`, valid until the next; DataError names files that cannot be read."""
    slots, largest = None, max((part.stop - part.start for part in parts), default=0)
    # Fork, whatever Python's default: spawned workers would import torch and receive the file list every epoch.
    forked = workers > 0 and sys.platform == "linux"
    if forked and largest:  # one batch in use, and the two per worker that the loader requests in advance
        count = 2 * workers + 1
        shared = mmap.mmap(-1, count * largest * math.prod(view.size) * 3)
        slots = np.frombuffer(shared, np.uint8).reshape(count, largest, *view.size, 3)
    loader = DataLoader(_Decoded(files.paths, view, at, drawn, slots), batch_size=None, sampler=[*enumerate(parts)],
                        num_workers=workers, collate_fn=_as_it_is, worker_init_fn=_in_a_worker,
                        prefetch_factor=2 if workers else None, multiprocessing_context="fork" if forked else None)
    for (number, part), (pictures, bad) in zip(enumerate(parts), loader, strict=True):
        if bad:
            raise DataError("Pictures that could be read at the start cannot be read now:\n  " + "\n  ".join(bad[:10]))
        if slots is not None:
            pictures = slots[number % len(slots)][: part.stop - part.start]
        yield pictures


def _as_it_is(batch: Any) -> Any:
    return batch


def _in_a_worker(_worker: int) -> None:
    """Ignore stop signals in a worker, and exit when the main process dies.

    Ctrl-C, a closed terminal and some schedulers' SIGTERM reach every process, but the main process needs its workers
    until it has saved. If it was killed, a worker that waits to hand over a batch would stay for ever and hold the lock
    of the run folder.
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
    """All pictures resized and cropped to the view, in memory."""
    if isinstance(pictures, Split):
        return Split(view.fit_all(pictures.pictures), pictures.labels)
    held = np.empty((len(pictures), *view.size, 3), np.uint8)
    parts = slices(batch_sizes(len(pictures), 256))
    for part, batch in zip(parts, _decoded(pictures, view, np.arange(len(pictures)), None, parts, workers),
                           strict=True):
        held[part] = batch
    return Split(held, pictures.labels)


def fits_in_memory(view: View, pictures: int) -> bool:
    """Whether `hold` may take this many. Batches, and devices without their own memory, add no copy."""
    needed = pictures * 3 * math.prod(view.size)
    return view.crops == "shift" and needed <= min(IN_MEMORY_BYTES, memory() / 2)


# ---- batches ----


class Batches:
    """Augmented, normalised batches of a training or meta set: float32 (N, 3, H, W) and int64 (N,), on the device.

    pictures   in memory, or on disk               workers   processes that decode
    first      use only the first pictures, this many; both stages can share one copy in memory
    processes  that train together: each gets its part of the pictures, and the labels of all
    each_C     pictures of each class in an epoch, drawn again each time; None: all
    """

    def __init__(self, pictures: Split | PictureFiles, view: View, seed: int, batch_size: int, device: torch.device,
                 workers: int = 0, processes: Processes = ALONE, first: int | None = None,
                 each_C: Sequence[int] | np.ndarray | None = None):
        self.pictures, self.view, self.workers = pictures, view, workers
        self.labels = pictures.labels[:first]
        self.seed, self.device, self.processes = seed, device, processes
        self.each_C = None if each_C is None or sum(each_C) == len(self.labels) else np.asarray(each_C)
        self.length = len(self.labels) if self.each_C is None else int(self.each_C.sum())
        self.batch_size = min(batch_size, self.length)
        if self.batch_size < 2 * processes.count:
            raise DataError(f"{self.batch_size} pictures a step are too few for {processes.count} processes: batch "
                            "norm needs 2 in each.")
        # A last batch of one picture (per process) has no batch statistics: it is left out.
        self.steps = self.length // self.batch_size + (self.length % self.batch_size >= 2 * processes.count)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """The random crop and flips of each of n pictures, (n, ...)."""
        return self.view.draw(rng, n)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an epoch from `first_step` on: each picture once, or `each_C` of each class, in random order."""
        n = len(self.labels)
        order = np.random.default_rng([self.seed, epoch, ORDER]).permutation(n)
        if self.each_C is not None:
            order = order[rank_in_class(self.labels[order]) < self.each_C[self.labels[order]]]
        drawn = self.draw(np.random.default_rng([self.seed, epoch, CROPS]), n)
        sizes = batch_sizes(self.length, self.batch_size)[first_step : self.steps]
        at = order[first_step * self.batch_size :][: sum(sizes)]
        yield from self._batches(at, drawn[at], sizes)

    def meta(self, epoch: int, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A whole batch for each of these steps; each pass over the set has a new order."""
        n, size = len(self.labels), self.batch_size
        turns = n // size  # steps until the order is a new one
        at, drawn = [], []
        for turn in range(first_step // turns, -(-last_step // turns)):
            rng = np.random.default_rng([self.seed, epoch, META, turn])
            steps = slice(max(first_step - turn * turns, 0) * size, min(last_step - turn * turns, turns) * size)
            at.append(rng.permutation(n)[steps].copy())  # not a view, which would keep the whole permutation
            drawn.append(self.draw(rng, n)[at[-1]])
        if at:
            yield from self._batches(np.concatenate(at), np.concatenate(drawn), [size] * (last_step - first_step))

    def _batches(self, at: np.ndarray, drawn: np.ndarray, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and labels of consecutive batches of these sizes; drawn: for each of `at`."""
        labels, parts = moved(self.labels[at], self.device), slices(sizes)
        for part, pictures in zip(parts, self._shown(at, drawn, own(parts, self.processes)), strict=True):
            yield pictures, labels[part]

    def _shown(self, at: np.ndarray, drawn: np.ndarray, parts: list[slice]) -> Iterator[Tensor]:
        return shown(self.pictures, self.view, at, drawn, parts, self.device, self.workers)


def batch_sizes(pictures: int, batch: int) -> list[int]:
    """Sizes of the batches: whole ones, and the rest."""
    return [min(batch, pictures - first) for first in range(0, pictures, batch)]


def own(parts: list[slice], processes: Processes) -> list[slice]:
    """This process's part of each slice."""
    mine = [processes.part(part.stop - part.start) for part in parts]
    return [slice(part.start + m.start, part.start + m.stop) for part, m in zip(parts, mine, strict=True)]


def slices(sizes: Iterable[int]) -> list[slice]:
    """Consecutive slices of these sizes, from 0."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def in_order(
    pictures: Split | PictureFiles, view: View, device: torch.device, workers: int = 0, processes: Processes = ALONE
) -> Iterator[tuple[Tensor, int]]:
    """The pictures in their order, as in predictions: this process's part of each batch, and the batch's size.

    Pictures in memory that have the view's size stay on the device for the next call.
    """
    sizes = batch_sizes(len(pictures), at_once(view))
    batches = shown(pictures, view, np.arange(len(pictures)), None, own(slices(sizes), processes), device, workers)
    yield from zip(batches, sizes, strict=True)


def at_once(view: View) -> int:
    """Pictures in a batch of `in_order`."""
    return max(16, min(500, 500 * 64 * 64 // (view.size[0] * view.size[1])))


def shown(
    pictures: Split | PictureFiles, view: View, at: np.ndarray, drawn: np.ndarray | None, parts: Sequence[slice],
    device: torch.device, workers: int = 0,
) -> Iterator[Tensor]:
    """The network's input, float32 (N, 3, H, W) on the device, for each part of `at`, the indices of pictures.

    drawn   for each of `at` (View.draw); None: as in predictions
    """
    if isinstance(pictures, PictureFiles):
        for decoded in _decoded(pictures, view, at, drawn, parts, workers):
            yield normalised(moved(decoded, device), view)
    elif drawn is not None and view.crops == "resized":  # parts of any size: one by one, as from disk
        for part in parts:
            made = [view.augmented(pictures.pictures[i], row) for i, row in zip(at[part], drawn[part], strict=True)]
            yield normalised(moved(np.stack(made), device), view)
    else:
        whole = on_device(pictures.pictures, device) if pictures.pictures.shape[1:3] == view.size else None
        # The host sends the drawn numbers of all steps at once, so no step waits for them.
        places = moved(np.stack([at, *(() if drawn is None else _places(view, drawn))]), device)
        for part in parts:
            index = places[0, part]
            if whole is None:
                batch = moved(view.fit_all(pictures.pictures[at[part]]), device)
                index = torch.arange(len(index), device=device)
            else:
                batch = whole if drawn is not None else whole.index_select(0, index)
            if drawn is not None:
                batch = _gathered(batch, index, places[1, part], places[2, part], view)
            yield normalised(batch, view)


def _places(view: View, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row in each of the two tables of `_offsets` for what was drawn for a picture."""
    top, left, mirrored, upside_down, turned = drawn.T
    shifts = 2 * view.padding + 1
    return ((2 * turned + upside_down) * shifts + np.where(turned, left, top),
            (2 * turned + mirrored) * shifts + np.where(turned, top, left))


@lru_cache
def _offsets(view: View, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables of row and column offsets that do what `View.shifted` does, in a flat picture of H x W pixels.

    Each has one row for (turned, flipped, shift): pixel (i, j) is number rows[..., i] + columns[..., j].
    """
    height, width = view.size
    down, right = (np.lib.stride_tricks.sliding_window_view(np.pad(np.arange(side), view.padding, mode="reflect"), side)
                   for side in view.size)
    down = down * width
    # A quarter turn swaps rows and columns; pictures that are not square are never turned.
    by_turn = ([down, right], [right, down]) if height == width else ([down], [right])
    rows, columns = (np.array([[one, one[:, ::-1]] for one in table]).reshape(-1, table[0].shape[1])
                     for table in by_turn)
    return torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)


def _gathered(pictures: Tensor, index: Tensor, row: Tensor, column: Tensor, view: View) -> Tensor:
    """uint8 (N, H, W, 3): the pictures at `index`, padded, cropped and flipped like `View.shifted`."""
    rows, columns = _offsets(view, pictures.device)
    first = (index * math.prod(view.size)).view(-1, 1, 1)
    pixels = first + rows[row].unsqueeze(2) + columns[column].unsqueeze(1)
    return pictures.view(-1, 3).index_select(0, pixels.view(-1)).view(-1, *view.size, 3)


def normalised(pictures: Tensor, view: View) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W), channels last in memory: 1.6 x faster on a CPU.

    (x / 255 - mean) / std, in whole rows, which vectorise well on a CPU. It divides by tensors: on a GPU that is exact,
    unlike dividing by a number, so every device gives the same bits.
    """
    n, height, width, _ = pictures.shape
    white, mean, std = _of_a_row(view, pictures.device)
    rows = pictures.reshape(n, height, 3 * width).float()
    return rows.div_(white).sub_(mean).div_(std).view(n, height, width, 3).permute(0, 3, 1, 2)


@lru_cache
def _of_a_row(view: View, device: torch.device) -> Tensor:
    """255, mean and std for each number in a row."""
    return torch.tensor([(255.0,) * 3, view.mean, view.std], dtype=torch.float32, device=device).tile(view.size[1])


# ---- the device ----

_on_device: dict[tuple[int, torch.device], Tensor] = {}


def on_device(array: np.ndarray, device: torch.device) -> Tensor | None:
    """The array on the device, moved there once and kept while the array lives; None if it is too large."""
    key = id(array), device
    if key not in _on_device:
        if device.type == "cuda" and array.nbytes > ON_DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return None
        with warnings.catch_warnings():  # torch warns about read-only arrays; nothing writes to this one
            warnings.simplefilter("ignore")
            here = torch.from_numpy(np.ascontiguousarray(array))
        if device.type == "cpu":
            return here
        _on_device[key] = here.to(device)
        weakref.finalize(array, _on_device.pop, key, None)
    return _on_device[key]


def moved(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; to a GPU through pinned memory, without waiting for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
