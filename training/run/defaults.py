"""Defaults for your own pictures, chosen from the data and the machine, with a reason for each."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.datasets import LongTailed, PictureFiles, Split
from training.errors import TrainingError
from training.network.prepared import prepared
from training.network.start_weights import Backbone, find_backbone
from training.network.starts import BY_NAME
from training.recipes import OwnPictures, Recipe
from training.run.state import why_not
from zoo.architectures import create
from zoo.images import decode

SIZES = (32, 48, 64, 96, 128, 160, 192, 224)
LIBRARY_SIZES = (224, 256, 288, 336, 384, 448, 518)  # for networks that take one size only

# Steps of training from random weights: fewer leave stage 1 unfinished, more gain little (plankton, ResNet-32).
STEPS, STEPS_ON_GPU = 10_400, 40_000
# How long a run on a CPU may take.
CPU_SECONDS = 3600
# Seconds to train on a picture with one core, and its side in pixels, measured.
CORE_SECONDS = {"resnet32": (3.4e-3, 32), "resnet18": (45e-3, 224)}

FULL_COVARIANCE_BYTES = 64e6


# Epochs of a last layer on a pretrained backbone. Plain: as classifier-balancing on ImageNet-LT.
PLAIN_HEAD_EPOCHS = 10
HEAD_STEPS = 3_000
SMALL_HEAD = 64  # features; up to these, full covariances cost little


# ---- with a pretrained start ----

START_SIZES = (128, 160, 192, 224)  # training sizes
# The model's input is this much larger: trained at 160 pixels, macro error on clothes is 23.2 % at 192, 24.4 % at 160.
ABOVE = 32
# Most epochs of fine-tuning that are worth their time; below FEW_EPOCHS a smaller input size is better.
MOST_EPOCHS, FEW_EPOCHS = 40, 5
# Fewer steps of fine-tuning made the first answer worse (47 and 251 steps on two sets of photographs of clothes).
FEW_STEPS = 300
# Default minutes of a run: at most, at least; in between 2 seconds for each training picture.
MOST_MINUTES, LEAST_MINUTES, SECONDS_A_PICTURE = 55.0, 0.7, 2.0
SPARE = 1.1  # factor for what crops and the optimizer add to a step
READ = 3  # times that each file is read: before the run, by the frozen start, and in the first epoch
TESTS = 5  # tests during a run; each may leave a better model


def with_start(recipe: OwnPictures, data: LongTailed, device: str) -> tuple[OwnPictures, list[str]]:
    """The recipe for fine-tuning from a pretrained start, with its reasons; unchanged if there is no start."""
    from training.network.starts import REMEDY, choose_start, find_start

    reasons: list[str] = []

    def take(flag: str, value: Any, reason: str) -> None:
        nonlocal recipe
        if getattr(recipe, flag) in (None, 0, "auto"):
            recipe = dataclasses.replace(recipe, **{flag: value})
            reasons.append(f"--{flag.replace('_', '-')} {_words(value)}: {reason}")

    if recipe.start == "auto":
        if recipe.backbone or recipe.pretrained or recipe.architecture != "auto":
            return dataclasses.replace(recipe, start="none"), []
        found = choose_start(device)
        if found is None:
            take("start", "none", "no pretrained weights were found, so the run starts from random weights. That takes "
                                  f"hours and many pictures. To get weights, {REMEDY}.")
        else:
            take("start", *found)
    if recipe.start == "none":
        return recipe, reasons
    start = find_start(recipe.start)
    may_stop = recipe.freeze == "auto" and not recipe.epochs
    if recipe.architecture == "auto" and start.architecture is None:
        raise TrainingError(f"--start {recipe.start}: the file does not say which network it holds. Add "
                            "--architecture timm:NAME or torchvision:NAME.")
    take("architecture", start.architecture, "the network of the start")
    shown = _how_shown(start, recipe.architecture)
    if shown:
        for flag in ("mean", "std", "interpolation"):
            value = shown.get(flag)
            take(flag, tuple(value) if isinstance(value, (list, tuple)) else value, "as the start was trained")
    if device == "cpu":
        take("freeze", "early", "the start already detects edges and textures; a step takes half the time")
    count = len(data.train)
    take("batch_size", min(32, max(8, count // 8)), f"{count:,} training pictures")
    take("lr", 0.02, "fine-tuning: more would destroy what the start has learned")
    take("schedule", "one-cycle", "the learning rate falls to 0 at the end of a run of any length")
    take("loss", "logit-adjustment", "the model answers as if all classes were equally frequent")
    take("augment", "none", "logit adjustment alone; the paper's method: --augment metasaug")
    sampled = dataclasses.replace(recipe, sampling="square-root").shown_counts(data.class_counts)
    if recipe.augment == "none" and recipe.balances and sum(sampled) < count:
        take("sampling", "square-root", f"an epoch shows {sum(sampled):,} of {count:,} pictures, fewer of the common "
                                        "classes; rare classes are seen more often in the same time")
    take("meta_in_training", "stage2" if recipe.augment in ("none", "isda") else "never",
         "the meta set decides between first answer and fine-tuning; then the run trains on it too"
         if recipe.augment in ("none", "isda") else f"--augment {recipe.augment} measures on the meta set")
    take("covariance", "diagonal", "pretrained networks have many features")
    take("crops", "resized", "as the start was trained")
    take("crop_area", 0.35, "larger parts than the start's 0.08, for a shorter run")
    if recipe.input_size and recipe.epochs:
        return recipe, reasons
    usual_size = shown.get("input_size", [3, 224, 224])[1]
    recipe, of_time = _length_and_size(recipe, data, usual_size, device, may_stop)
    if recipe.freeze == "all":  # `of_time` has its own reason
        reasons = [reason for reason in reasons if not reason.startswith("--freeze")]
    return recipe, reasons + of_time


def _length_and_size(
    recipe: OwnPictures, data: LongTailed, usual_size: int, device: str, may_stop: bool
) -> tuple[OwnPictures, list[str]]:
    """Epochs and sizes that the minutes allow. They stay the same for the whole run, also after a resume.

    Training shows pictures smaller than the model's input: see --train-size. may_stop: if only a few steps fit into
    the time, the first answer is the model, at the largest size that fits into the time.
    """
    count, others, reasons = len(data.train), len(data.meta) + len(data.test), []
    shown = sum(recipe.shown_counts(data.class_counts))
    minutes = recipe.minutes or min(
        MOST_MINUTES, max(LEAST_MINUTES, LEAST_MINUTES + (count - 200) * SECONDS_A_PICTURE / 60))
    typical = float(np.median(np.sqrt(_sizes(data.train).prod(1))))
    # Small pictures are enlarged: a pretrained network recognises little below 128 pixels.
    filled = [size for size in START_SIZES if size <= min(usual_size, max(typical * 1.5, START_SIZES[0]))]
    given = recipe.train_size or recipe.input_size
    takes_any = not why_not(create(recipe.architecture, 2), (START_SIZES[0],) * 2)
    sizes = [given] if given else filled if filled and takes_any else [usual_size]
    above = ABOVE if takes_any and recipe.start in BY_NAME and not recipe.input_size else 0
    largest = sizes[-1]
    each, forward, read = measure_speed(recipe, data.train, largest, largest + above, device)

    def look(size: int) -> float:
        return forward * ((size + above) / (largest + above)) ** 2

    def left(size: int) -> float:
        """Seconds left after reading the files and one pass of all pictures through the frozen start."""
        return minutes * 60 - (count + others) * (look(size) + READ * read)

    def epochs_in(size: int) -> float:
        """Epochs, with their tests, in the time left."""
        step, test = shown * each * (size / largest) ** 2 * SPARE, len(data.test) * look(size)
        time = left(size)
        return max(time / (step + test) if time < TESTS * (step + test) else (time - TESTS * test) / step, 0)

    size = next((size for size in reversed(sizes) if epochs_in(size) >= FEW_EPOCHS), sizes[0])
    epochs = min(MOST_EPOCHS, max(2, int(epochs_in(size))))
    steps = epochs * -(-shown // recipe.batch_size)
    if may_stop and epochs < MOST_EPOCHS and steps < FEW_STEPS:
        size = next((size for size in reversed(sizes) if left(size) > 0), sizes[0])
        return dataclasses.replace(recipe, freeze="all", epochs=epochs, input_size=recipe.input_size or size + above), [
            f"--freeze all --input-size {recipe.input_size or size + above}: the first answer is the model, because "
            f"{minutes:.2g} minutes allow only {steps} steps of fine-tuning, too few to improve it; --minutes gives "
            "more time"]
    if recipe.input_size is None:
        recipe = dataclasses.replace(recipe, input_size=size + above, train_size=size if above else None)
        reasons.append((f"--train-size {size} --input-size {size + above}" if above else f"--input-size {size}")
                       + f": a typical picture has {typical:.0f} x {typical:.0f} pixels"
                       + (f", and {sizes[-1]} pixels would allow only {epochs_in(largest):.1f} epochs"
                          if size < largest else ""))
    if not recipe.epochs:
        takes = minutes - (epochs_in(size) - epochs) * shown * each * (size / largest) ** 2 * SPARE / 60
        recipe = dataclasses.replace(recipe, epochs=epochs)
        reasons.append(f"--epochs {epochs}: about {max(1, round(takes))} minutes for the whole run, at "
                       f"{1 / (each * (size / largest) ** 2):.0f} pictures a second in training"
                       + ("; --minutes sets another length" if not recipe.minutes else ""))
    return recipe, reasons


def measure_speed(
    recipe: OwnPictures, pictures: Split | PictureFiles, size: int, seen: int, device: str
) -> tuple[float, float, float]:
    """Seconds per picture on this machine: a training step, a forward pass, reading its file.

    size   in pixels, of the training step          seen   of the forward pass
    """
    from training.run.steps import set_trained

    module = prepared(create(recipe.architecture, 2), device)
    set_trained(module, dataclasses.replace(recipe, input_size=size, train_size=None), False)

    def seconds(side: int, step: Callable[[torch.Tensor], object]) -> float:
        """The median of three, after one to warm up."""
        batch = torch.zeros(recipe.batch_size, 3, side, side, device=device)
        batch = batch.contiguous(memory_format=torch.channels_last)
        took = []
        for _ in range(4):
            began = time.perf_counter()
            step(batch)
            if device == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - began)
        return float(np.median(took[1:])) / recipe.batch_size

    each = seconds(size, lambda batch: module(batch).sum().backward())
    with torch.no_grad():
        module.eval()
        look = seconds(seen, module)
    reading = [0.0]
    for path in _some(pictures, 33):  # the median: the first files load the decoder, or come from a cold disk
        began = time.perf_counter()
        decode(path, reading=recipe.reading).load()
        reading.append(time.perf_counter() - began)
    return each, look, float(np.median(reading))


def on_backbone(recipe: Recipe, data: LongTailed) -> tuple[Recipe, list[str]]:
    """The recipe with the flags that its backbone needs, and a line for each choice; flags that were given stay.

    Raises TrainingError or another ZooError: there is no such backbone, or its network is not known.
    """
    assert recipe.backbone is not None
    backbone, usual, reasons = find_backbone(recipe.backbone), type(recipe)(), []

    def take(flag: str, value: Any, reason: str) -> None:
        nonlocal recipe
        if getattr(recipe, flag) == getattr(usual, flag) and value not in (None, getattr(usual, flag)):
            recipe = dataclasses.replace(recipe, **{flag: value})
            reasons.append(f"--{flag.replace('_', '-')} {_words(value)}: {reason}")

    take("architecture", backbone.architecture, f"{recipe.backbone} is that network")
    if recipe.architecture == "auto":
        raise TrainingError(f"--backbone {recipe.backbone}: the file does not say which network it holds. Add "
                            "--architecture NAME.")
    shown = _how_shown(backbone, recipe.architecture)
    why = "the backbone was trained so" if backbone.cfg else f"the library's {recipe.architecture} was trained so"
    if shown:
        take("input_size", shown["input_size"][1], why)
        for flag in ("mean", "std"):
            take(flag, tuple(shown[flag]), why)
        for flag in ("interpolation", "crop_pct", "crop_mode"):
            take(flag, shown.get(flag), why)
    ready = backbone.has_last_layer_for(data.label_names, recipe.cosine_scale)
    if recipe.last_layer == "ready" and not ready:
        raise TrainingError(f"--last-layer ready: {recipe.backbone} has no last layer for these "
                            f"{len(data.label_names)} classes. Train one with --last-layer fresh.")
    if recipe.last_layer == "auto":
        recipe = dataclasses.replace(recipe, last_layer="ready" if ready else "fresh")
        reasons.append(f"--last-layer {recipe.last_layer}: " + (
            "the backbone has one for these classes, so every epoch is stage 2" if ready else
            f"the backbone's is for {backbone.num_classes or 'no'} classes" if backbone.label_names is None else
            "the backbone's is for other classes"))
    if recipe.stage2_trains == "network":
        recipe = dataclasses.replace(recipe, stage2_trains="classifier")
        reasons.append("--stage2-trains classifier: a --backbone is not trained; --pretrained trains the whole network")
    if recipe.epochs == usual.epochs and recipe.epochs:
        second = recipe.epochs - recipe.stage2_epoch
        epochs = second if recipe.last_layer == "ready" else second + PLAIN_HEAD_EPOCHS
        recipe = dataclasses.replace(recipe, epochs=epochs, stage2_epochs=second)
        reasons.append(f"--epochs {epochs}: {second} of stage 2"
                       + (f", after {PLAIN_HEAD_EPOCHS} that train a last layer alone" if epochs > second else ""))
    if not recipe.cache_features:
        reasons.append("With --cache-features 4, each picture passes through the backbone 4 times in all, not once an "
                       "epoch.")
    return recipe, reasons


def _how_shown(backbone: Backbone, architecture: str) -> Mapping[str, Any]:
    """Input size, mean and so on that its weights were trained with; for a file, those of the library's own weights."""
    if backbone.cfg or not architecture.startswith(("timm:", "torchvision:")):
        return backbone.cfg
    return find_backbone(architecture).cfg


def _words(value: Any) -> str:
    return " ".join(f"{number:.4g}" for number in value) if isinstance(value, tuple) else str(value)


def choose(recipe: OwnPictures, data: LongTailed, device: str, cores: int) -> tuple[OwnPictures, list[str]]:
    """The recipe with nothing left to choose, and a line for each choice: "--flag value: reason".

    device   cpu, cuda or mps          cores   of the processor
    """
    recipe, reasons = with_start(recipe, data, device)
    count = len(data.train)
    sizes = _sizes(data.train)

    def take(flag: str, value: Any, reason: str) -> None:
        nonlocal recipe
        recipe = dataclasses.replace(recipe, **{flag: value})
        reasons.append(f"--{flag.replace('_', '-')} {value}: {reason}")

    quiet: dict[str, Any] = {  # chosen without a line
        "interpolation": "bilinear", "schedule": "steps", "flips": "mirror" if recipe.start == "none" else "auto",
        "loss": "ce", "crop_area": 0.08, "freeze": "none", "sampling": "instance"}
    recipe = dataclasses.replace(recipe, **{flag: value for flag, value in quiet.items()
                                            if getattr(recipe, flag) in ("auto", 0)})
    if recipe.freeze == "all" and recipe.start == "none":
        raise TrainingError("--freeze all needs a pretrained network: give --start, or use --backbone instead.")
    if not recipe.lr:
        recipe = dataclasses.replace(recipe, lr=0.01 if recipe.pretrained else 0.1)
    if recipe.augment == "auto":
        take("augment", "isda" if recipe.backbone is None else "metasaug",
             "the best measured on a natural tail (docs/ledger.md); the paper's method: --augment metasaug"
             if recipe.backbone is None else "the paper's method for a last layer")
    if recipe.meta_in_training == "auto":
        joined = recipe.augment in ("none", "isda") and recipe.backbone is None
        recipe = dataclasses.replace(recipe, meta_in_training="stage2" if joined else "never")
    if not recipe.batch_size:
        batch = min(100, max(16, count // 10))
        take("batch_size", batch, f"{math.ceil(count / batch):,} steps per epoch for {count:,} training pictures")
    if not recipe.epochs:
        steps, least, most = (STEPS if device == "cpu" else STEPS_ON_GPU), 30, 200
        if recipe.backbone is not None:
            steps, least, most = HEAD_STEPS, 20, 50
        epochs = min(most, max(least, math.ceil(steps * recipe.batch_size / count)))
        take("epochs", epochs, f"about {epochs * count // recipe.batch_size:,} steps in all; stage 2 is the last fifth")
    if recipe.input_size is None:
        size, why = _input_size(recipe, sizes, count, device, cores)
        if ":" in recipe.architecture and why_not(network := create(recipe.architecture, 2), (size, size)):
            size = next((each for each in LIBRARY_SIZES if not why_not(network, (each, each))), size)
            why = f"{recipe.architecture} takes no other size"
        take("input_size", size, why)
    size = recipe.input_size or SIZES[0]
    if recipe.architecture == "auto":
        take("architecture", *_architecture(size, count, device))
    if recipe.crop_mode == "auto":
        long_ones = float(np.mean(sizes.max(1) > 1.5 * sizes.min(1)))
        take("crop_mode", "squash" if long_ones > 0.1 else "center",
             f"{long_ones:.0%} of the pictures are over 1.5 times as long as wide")
    if recipe.crops == "auto":
        take("crops", "shift" if size <= 96 else "resized",
             f"usual for pictures of {size} pixels")
    if recipe.covariance == "auto":
        wide = create(recipe.architecture, 2).num_features
        full = len(data.label_names) * wide**2 * 4
        if recipe.backbone is not None and wide > SMALL_HEAD:
            take("covariance", "diagonal", f"for {wide} features; a step of the last layer is then a few products")
        else:
            take("covariance", "full" if full <= FULL_COVARIANCE_BYTES else "diagonal",
                 f"full covariances of {len(data.label_names)} classes and {wide} features take {full / 1e6:,.0f} MB")
    return recipe, reasons


def _sizes(pictures: Split | PictureFiles) -> np.ndarray:
    """(N, 2), width and height; of a few hundred files if they were not scanned yet."""
    if isinstance(pictures, Split):
        return np.array([pictures.pictures.shape[2:0:-1]])
    if pictures.sizes is not None:
        return pictures.sizes
    return np.array([decode(path).size for path in _some(pictures, 300)])


def _some(pictures: Split | PictureFiles, most: int) -> list[Path]:
    """At most `most` files, evenly spread; none for pictures in memory."""
    if isinstance(pictures, Split):
        return []
    return [pictures.paths[i] for i in np.linspace(0, len(pictures) - 1, min(len(pictures), most)).astype(int)]


def _architecture(size: int, count: int, device: str) -> tuple[str, str]:
    if size <= 64:
        return "resnet32", f"made for small pictures, {size} x {size}"
    if device != "cpu" and count >= 50_000:
        return "resnet50", f"{count:,} training pictures and a GPU"
    return "resnet18", f"{size} x {size} pixels" + (" on a CPU" if device == "cpu" else f", {count:,} pictures")


def _input_size(recipe: OwnPictures, sizes: np.ndarray, count: int, device: str, cores: int) -> tuple[int, str]:
    """The largest size that the pictures fill and that, on a CPU, trains within an hour."""
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
