"""`python -m benchmarks.large`: stage 2 on cached features at iNaturalist 2018's size, and what stage 1 costs.

437,513 pictures, 8142 classes, 2048 features, batch 256. It takes the steps of `metasaug train inat18 --cache-features`
on made-up features, memory-mapped in float16 like the cache. CPU times are measured; GPU times are computed. `--docs`
writes the tables into docs/large_sets.md.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

from benchmarks.measuring import Row, figure_row, filled, machine, process_memory, report, side_by_side
from training.data.batches import View
from training.data.datasets import PictureFiles
from training.data.imagenet_inat import IMAGENET_LT, INAT
from training.method.closed_form import LOGGED, frozen_head_step
from training.method.covariance import LearnedCovariance, RunningCovariance
from training.method.losses import HeadLoss, class_balanced_weights
from training.method.metasaug import isda_step, plain_step
from training.network.feature_cache import CachedBatches, Head
from training.recipes import ImageNetLT, INat17, INat18
from zoo.architectures import create

RECIPE, SET, FEATURES = INat18(), INAT["inat18"], 2048
BATCH = RECIPE.stage2_batch_size or RECIPE.batch_size
EPOCHS = RECIPE.epochs - RECIPE.stage2_epoch
STEPS = math.ceil(SET.train_pictures / BATCH)
VIEWS = (1, 4, 10)

# Training speed of ResNet-50 at 224 x 224 on one A100 80GB, in pictures a second.
A100_TRAINING = {"TF32": 938, "mixed precision": 2470}
A100_SOURCE = "NVIDIA's own, DeepLearningExamples, ResNet50 v1.5 for PyTorch, container 21.03; not measured by us"
# One A100 80GB by its data sheet, and the share of it that we assume is reached.
A100_FP32, A100_BYTES, UTILISATION = 19.5e12, 2.0e12, 0.5

BEGIN, END = "<!-- python -m benchmarks.large --docs -->", "<!-- end of benchmarks.large -->"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "large_sets.md"


# ---- made-up features ----


def class_counts() -> np.ndarray:
    """Pictures per class, int64 (8142,): an exponential tail with iNaturalist 2018's total, down to its 2."""
    classes = SET.classes
    low, high = 2.0, 1e4
    while high - low > 1e-6:  # the largest class, by bisection on the total
        middle = (low + high) / 2
        total = (middle * (2 / middle) ** (np.arange(classes) / (classes - 1))).sum()
        low, high = (middle, high) if total < SET.train_pictures else (low, middle)
    counts = np.maximum(2, np.rint(low * (2 / low) ** (np.arange(classes) / (classes - 1)))).astype(np.int64)
    counts[0] += SET.train_pictures - counts.sum()
    return counts


def write_features(folder: Path, views: int = 1) -> None:
    """Write rectified noise: half of it is zero, as in features of a ResNet."""
    rng = np.random.default_rng(0)
    for kind, pictures in (("train", SET.train_pictures), ("meta", SET.classes * RECIPE.meta_per_class)):
        with open(folder / f"{kind}.float16", "wb") as file:
            for start in range(0, pictures * views, 8192):
                rows = min(8192, pictures * views - start)
                noise = rng.standard_normal((rows, FEATURES), np.float32)
                file.write(np.maximum(noise, 0, out=noise).astype(np.float16).tobytes())


def batches(folder: Path, kind: str, labels: np.ndarray, batch: int) -> CachedBatches:
    mapped = np.memmap(folder / f"{kind}.float16", np.float16, "r").reshape(-1, len(labels), FEATURES)
    view = View((224, 224), SET.mean, SET.std)
    return CachedBatches(PictureFiles(Path(), (), labels), mapped, view, 0, batch, torch.device("cpu"))


def step_of(name: str, folder: Path, batch: int = BATCH) -> Callable[[], object]:
    """A whole step of a method as training takes it: reading a batch, the gradients, the optimizer."""
    counts = class_counts()
    labels = np.repeat(np.arange(SET.classes), counts)
    of_meta = np.repeat(np.arange(SET.classes), RECIPE.meta_per_class)
    weights, loss = class_balanced_weights(counts.tolist(), RECIPE.beta), HeadLoss("ce", counts.tolist())
    torch.manual_seed(0)
    head = Head(nn.Linear(FEATURES, SET.classes))
    optimizer = torch.optim.SGD(head.parameters(), 3e-4, RECIPE.momentum, nesterov=True,
                                weight_decay=RECIPE.weight_decay)
    learned = LearnedCovariance(RunningCovariance(SET.classes, FEATURES, "diagonal"))
    stream = batches(folder, "train", labels, batch).epoch(0)
    meta = batches(folder, "meta", of_meta, batch).meta(0, 0, STEPS)

    def step() -> None:
        x, y = next(stream)
        if name == "plain":
            plain_step(head, x, y, loss)
        elif name == "ISDA":
            isda_step(head, x, y, learned.running, loss, RECIPE.strength, weights)
        else:
            frozen_head_step(head.get_classifier(), x, y, *next(meta), learned, loss, strength=RECIPE.strength,
                             inner_rate=3e-4, class_weights=weights)
        optimizer.step()

    return step


def backbone(pictures: int) -> dict[str, Callable[[], object]]:
    """ResNet-50 at 224 x 224: a training step of stage 1, and the pass that computes features."""
    module = create("resnet50", 1000).to(memory_format=torch.channels_last)
    x = torch.randn(pictures, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    y = torch.arange(pictures)

    def train() -> None:
        module.train().zero_grad()
        F.cross_entropy(module(x), y).backward()

    def features() -> None:
        with torch.no_grad():
            module.eval()(x)

    return {"train": train, "features": features}


# ---- rows ----


def time_rows(name: str, seconds: Sequence[float], note: str) -> list[Row]:
    """A step as measured, and from it the time of an epoch and of all of stage 2."""
    ordered = sorted(seconds)
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]

    def row(what: str, times: float, unit: str) -> Row:
        return Row(f"{name}: {what}", round(middle * times, 4), round(low * times, 4), round(high * times, 4), None,
                   None, unit, note, machine())

    return [row("a step", 1, "s"), row("an epoch", STEPS / 60, "min"), row("stage 2", STEPS * EPOCHS / 3600, "h")]


def gpu_rows() -> list[Row]:
    """A step on an A100, computed from its products (training.method.closed_form) and the bytes that it moves."""
    product = 2 * BATCH * SET.classes * FEATURES
    work = {"plain": 2 * product, "MetaSAug": product * (16 + 1 / LOGGED)}
    layer = SET.classes * FEATURES * 4
    moved = {"plain": 8 * layer, "MetaSAug": 13 * layer}  # SGD's part: reads weight, gradient, momentum; writes two
    rows = []
    for name in work:
        seconds = max(work[name] / A100_FP32, moved[name] / A100_BYTES) / UTILISATION
        note = (f"by arithmetic, not measured: {work[name] / 1e9:.0f} GFLOP at {A100_FP32 / 1e12:g} TFLOP/s (float32) "
                f"against {moved[name] / 1e9:.2f} GB at {A100_BYTES / 1e12:g} TB/s, {UTILISATION:.0%} of either")
        rows += [figure_row(f"{name} on an A100: a step", round(seconds * 1e3, 2), "ms", note=note),
                 figure_row(f"{name} on an A100: stage 2", seconds * STEPS * EPOCHS / 60, "min", note=note)]
    return rows


def disk_rows() -> list[Row]:
    pictures = SET.train_pictures + SET.classes * RECIPE.meta_per_class
    sizes = {k: (2 * k * pictures + 4 * SET.test_pictures) * FEATURES / 1e9 for k in VIEWS}
    return [figure_row(f"disk of --cache-features {k}", size, "GB",
                       note="training and meta features in float16, test features in float32")
            for k, size in sizes.items()]


def stage_1_rows(pictures_a_second: float) -> list[Row]:
    """Pictures x epochs / pictures a second."""
    rows = []
    for recipe, facts in ((ImageNetLT(), IMAGENET_LT), (INat17(), INAT["inat17"]), (INat18(), INAT["inat18"])):
        work = facts.train_pictures * recipe.stage2_epoch
        what = f"{facts.train_pictures:,} x {recipe.stage2_epoch} epochs"
        rows += [figure_row(f"stage 1 of {recipe.dataset}, A100 {precision}", work / rate / 3600, "h",
                            note=f"{what} / {rate} a second: {A100_SOURCE}")
                 for precision, rate in A100_TRAINING.items()]
        rows.append(figure_row(f"stage 1 of {recipe.dataset}, this CPU", work / pictures_a_second / 86400, "days",
                               note=f"{what} / {pictures_a_second:.1f} a second, measured here"))
    return rows


def measure(rounds: int, folder: Path) -> list[Row]:
    write_features(folder)
    times = side_by_side({name: step_of(name, folder) for name in ("plain", "ISDA", "MetaSAug")}, rounds)
    made_up = (f"made-up features in an exponential tail, {class_counts()[0]} to 2 pictures a class; batch {BATCH}, "
               f"{STEPS} steps an epoch, {EPOCHS} epochs")
    rows = [row for name, seconds in times.items() for row in time_rows(name, seconds, made_up)]
    rows += [figure_row(f"memory of a process that takes MetaSAug steps, {said}", process_memory(
        what, step_of, "MetaSAug", folder) / 1e3  # type: ignore[arg-type]
       , "GB", note=note)
        for what, said, note in (
            ("own", "its own", "after two steps (RssAnon)"),
            ("peak", "with mapped features", "VmHWM: the system maps around what is read as far as memory is free"))]
    rows += disk_rows()
    pictures = 16
    of_backbone = side_by_side(backbone(pictures), max(3, rounds // 2))
    rates = {name: pictures / sorted(seconds)[len(seconds) // 2] for name, seconds in of_backbone.items()}
    rows += [figure_row(f"ResNet-50 at 224, this CPU: {what}", rates[name], "pictures/s",
                        note=f"batches of {pictures}, without decoding")
             for name, what in (("train", "training"), ("features", "features"))]
    rows.append(figure_row("features of a view, this CPU", SET.train_pictures / rates["features"] / 3600, "h",
                           note="once, without decoding"))
    return rows + gpu_rows() + stage_1_rows(rates["train"])


# ---- the page ----


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table between the markers in docs/large_sets.md."""
    lines = ["| what | figure | smallest and largest |", "|---|---|---|"]
    for row in rows:
        spread = "" if row["low"] == row["high"] else f"{row['low']:.3g} to {row['high']:.3g}"
        lines.append(f"| {row['name']} | {row['ratio']:.3g} {row['unit']} | {spread} |")
    notes = dict.fromkeys(row["note"] for row in rows if "on an A100" in row["name"] or "A100 TF32" in row["name"])
    return "\n".join([*lines, "", f"CPU: {rows[0]['machine']}; {rows[0]['note']}.", "",
                      *(f"- {note}" for note in notes)])


def with_table(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return filled(text, BEGIN, END, table(rows))


def main(json: bool = False, out: Path | None = None, docs: bool = False, rounds: int = 7, threads: int | None = None,
         folder: Path | None = None) -> None:
    """Measure and print; on request, write the rows and the page.

    Args:
        json: One JSON object a line instead of the table.
        out: Write those lines here too.
        docs: Write the tables into docs/large_sets.md.
        rounds: Rounds that count. Each round takes every step once.
        threads: CPU threads. By default torch chooses.
        folder: Folder for 1.9 GB of temporary features. By default the system's folder for temporary files.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        rows = measure(rounds, Path(temporary))
    report(rows, json, out)
    if docs:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), [asdict(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.large", description=__doc__)
