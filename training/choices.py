"""What nobody said about their own pictures, chosen from the pictures and the machine, with a reason for each."""

import dataclasses
import math
from typing import Any

import numpy as np

from training.datasets import LongTailed, PictureFiles, Split
from training.recipes import OwnPictures
from zoo.images import decode

SIZES = (32, 48, 64, 96, 128, 160, 192, 224)

# Steps of training from nothing: with fewer stage 1 is unfinished, with more little is gained (plankton, ResNet-32).
STEPS, STEPS_ON_GPU = 10_400, 40_000
# How long a run on a CPU may take.
CPU_SECONDS = 3600
# Forward and backward of a picture on one core, measured: ResNet-32 at 32 x 32, ResNet-18 at 224 x 224.
CORE_SECONDS = {"resnet32": (3.4e-3, 32), "resnet18": (45e-3, 224)}

FULL_COVARIANCE_BYTES = 64e6
FEATURES = {"resnet32": 64, "resnet10": 512, "resnet18": 512, "resnet34": 512}


def choose(recipe: OwnPictures, data: LongTailed, device: str, cores: int) -> tuple[OwnPictures, list[str]]:
    """The recipe with nothing left to choose, and a line for each choice: "--flag value: because".

    device   cpu, cuda or mps          cores   of the processor
    """
    count, reasons = len(data.train), []
    sizes = _sizes(data.train)

    def take(flag: str, value: Any, reason: str) -> None:
        nonlocal recipe
        recipe = dataclasses.replace(recipe, **{flag: value})
        reasons.append(f"--{flag.replace('_', '-')} {value}: {reason}")

    if not recipe.batch_size:
        batch = min(100, max(16, count // 10))
        take("batch_size", batch, f"{math.ceil(count / batch):,} steps an epoch for {count:,} training pictures")
    if not recipe.epochs:
        steps = STEPS if device == "cpu" else STEPS_ON_GPU
        epochs = min(200, max(30, math.ceil(steps * recipe.batch_size / count)))
        take("epochs", epochs, f"about {epochs * count // recipe.batch_size:,} steps in all, stage 2 being the last "
                               "fifth")
    if recipe.input_size is None:
        take("input_size", *_input_size(recipe, sizes, count, device, cores))
    size = recipe.input_size or SIZES[0]
    if recipe.architecture == "auto":
        take("architecture", *_architecture(size, count, device))
    if recipe.crop_mode == "auto":
        long_ones = float(np.mean(sizes.max(1) > 1.5 * sizes.min(1)))
        take("crop_mode", "squash" if long_ones > 0.1 else "center",
             f"{long_ones:.0%} of the pictures are over 1.5 times as long as wide")
    if recipe.crops == "auto":
        take("crops", "shift" if size <= 96 else "resized",
             f"the usual one for pictures of {size} pixels")
    if recipe.covariance == "auto":
        wide = FEATURES.get(recipe.architecture, 2048)
        full = len(data.label_names) * wide**2 * 4
        take("covariance", "full" if full <= FULL_COVARIANCE_BYTES else "diagonal",
             f"full ones of {len(data.label_names)} classes and {wide} features take {full / 1e6:,.0f} MB")
    return recipe, reasons


def _sizes(pictures: Split | PictureFiles) -> np.ndarray:
    """(N, 2), width and height; of a few hundred where they were not looked at yet."""
    if isinstance(pictures, Split):
        return np.array([pictures.pictures.shape[2:0:-1]])
    if pictures.sizes is not None:
        return pictures.sizes
    some = np.linspace(0, len(pictures) - 1, min(len(pictures), 300)).astype(int)
    return np.array([decode(pictures.paths[i]).size for i in some])


def _architecture(size: int, count: int, device: str) -> tuple[str, str]:
    if size <= 64:
        return "resnet32", f"made for small pictures, {size} x {size}"
    if device != "cpu" and count >= 50_000:
        return "resnet50", f"{count:,} training pictures and a GPU"
    return "resnet18", f"{size} x {size} pixels" + (" on a CPU" if device == "cpu" else f", {count:,} pictures")


def _input_size(recipe: OwnPictures, sizes: np.ndarray, count: int, device: str, cores: int) -> tuple[int, str]:
    """The largest that the pictures fill and, on a CPU, that an hour is enough for."""
    typical = float(np.median(np.sqrt(sizes.prod(1))))
    filled = [size for size in SIZES if size <= typical * 1.1] or [SIZES[0]]
    why = f"a typical picture has {typical:.0f} x {typical:.0f} pixels"
    if device != "cpu":
        return filled[-1], why
    seconds = {}
    for size in filled:
        name = recipe.architecture if recipe.architecture in CORE_SECONDS else _architecture(size, 0, device)[0]
        each, at = CORE_SECONDS[name]
        seconds[size] = each * (size / at) ** 2 * recipe.epochs * count / cores
    fast = [size for size in filled if seconds[size] <= CPU_SECONDS] or filled[:1]
    chosen = fast[-1]
    return chosen, (f"{why}; {recipe.epochs} epochs take about {max(1, round(seconds[chosen] / 60))} minutes on "
                    f"{cores} CPU cores")
