"""`python -m benchmarks.loader`: compare our loading of batches with what torchvision users write, on the same cores.

From disk: ImageFolder with RandomResizedCrop(224), flip, ToTensor and Normalize in a DataLoader, against
training.data.batches on the same synthetic photographs. In memory: 32 x 32 pictures with RandomCrop and flip.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.measuring import Row, command, ratio_row, side_by_side
from training.data.batches import Batches, View
from training.data.datasets import PictureFiles, Split

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = {(500, 375): 512, (1600, 1200): 128}  # (width, height): number of pictures
IN_MEMORY = 10_000


def photograph(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Noise with the spectrum of natural pictures: 0.5 bytes a pixel as a JPEG of quality 90, like photographs."""
    down, right = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(down, right)
    frequency[0, 0] = 1

    def channel(slope: float) -> np.ndarray:
        spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        plane = np.fft.irfft2(spectrum / frequency**slope, s=(height, width))
        return plane / plane.std()

    light = channel(1.1)
    planes = np.stack([light + 0.4 * channel(1.4) for _ in range(3)], -1)
    return Image.fromarray((128 + 50 * planes).clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, width: int, height: int, number: int) -> None:
    """Two classes; 16 different pictures, each written several times."""
    rng = np.random.default_rng(0)
    for i in range(16):
        picture = photograph(width, height, rng)
        for copy in range(i, number, 16):
            path = folder / f"class{copy % 2}" / f"{copy:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=90)


def drained(batches: Callable[[], Iterable], device: torch.device) -> Callable[[], None]:
    """A step of the benchmark: move every batch of an epoch to the device."""

    def step() -> None:
        for pictures, labels in batches():
            pictures.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return step


def from_disk(width: int, height: int, rounds: int, device: torch.device, workers: int) -> Row:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, width, height, PHOTOGRAPHS[width, height])
        names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.jpg"))
        files = PictureFiles(folder, tuple(names), np.array([int(name[5]) for name in names]))
        ours = Batches(files, View((224, 224), MEAN, STD, crops="resized"), 0, BATCH, device, workers)
        theirs = DataLoader(ImageFolder(name, transforms.Compose([
            transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(MEAN, STD)])), BATCH, shuffle=True, num_workers=workers, generator=torch.Generator(),
            pin_memory=device.type == "cuda")
        times = side_by_side({"ours": drained(lambda: ours.epoch(0), device),
                              "torchvision": drained(lambda: theirs, device)}, rounds)
    return ratio_row(f"JPEGs of {width} x {height}, ours / torchvision", times["ours"], times["torchvision"], 1 / 1.5,
                     f"an epoch of {PHOTOGRAPHS[width, height]} pictures at 224 px, {workers} workers")


class _Pictures(Dataset):
    """CIFAR as a tutorial loads it."""

    def __init__(self, split: Split):
        self.split = split
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4, padding_mode="reflect"), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.split.pictures[i])), int(self.split.labels[i])


def in_memory(rounds: int, device: torch.device, workers: int) -> Row:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (IN_MEMORY, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, IN_MEMORY))
    ours = Batches(split, View((32, 32), MEAN, STD), 0, 100, device)
    theirs = DataLoader(_Pictures(split), 100, shuffle=True, num_workers=workers, generator=torch.Generator(),
                        pin_memory=device.type == "cuda")
    times = side_by_side({"ours": drained(lambda: ours.epoch(0), device),
                          "torchvision": drained(lambda: theirs, device)}, rounds)
    a_second = IN_MEMORY / 100 / np.median(times["ours"])
    return ratio_row("32 x 32 in memory, ours / torchvision", times["ours"], times["torchvision"], None,
                     f"{IN_MEMORY} pictures, {a_second:.0f} batches a second, theirs with {workers} workers")


def measure(rounds: int) -> list[Row]:
    device, workers = torch.get_default_device(), len(os.sched_getaffinity(0))
    torch.set_default_device("cpu")  # otherwise their transforms would run on the GPU, in forked processes
    rows = [from_disk(*size, rounds, device, workers) for size in PHOTOGRAPHS]
    return [*rows, in_memory(rounds, device, workers)]


if __name__ == "__main__":
    command("python -m benchmarks.loader", measure)
