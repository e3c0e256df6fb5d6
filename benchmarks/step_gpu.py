"""`python -m benchmarks.step_gpu --device cuda`: time whole training steps as CUDA graphs against eager steps.

ResNet-32, 32 x 32, batch 100, full covariances, optimizer included; and the last layer alone at iNaturalist 2018's
size (8142 x 2048, batch 256, diagonal covariances). Each ratio is of steps taken in turn in one process.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measuring import Row, command, ratio_row, side_by_side
from training.data.datasets import LongTailed, Split
from training.method.closed_form import frozen_head_step
from training.method.covariance import LearnedCovariance, RunningCovariance
from training.method.finite import Finite
from training.method.losses import HeadLoss
from training.method.metasaug import metasaug_step
from training.network.derivatives import Compute
from training.network.feature_cache import Head
from training.recipes import Cifar10LT, Recipe
from training.run import loop
from training.run.steps import CapturedStep

STEPS = 20  # a round
METHODS: dict[str, dict] = {
    "plain": {"augment": "none"}, "isda": {"augment": "isda"}, "heldout": {"augment": "heldout"},
    "classifier": {"lookahead": "classifier", "fidelity": "reference"},
    "network": {"lookahead": "network", "fidelity": "reference"},
}
TO_REACH = {"plain": 0.28, "classifier": 0.22, "network": 0.22}


@functools.cache
def pictures(num_classes: int) -> LongTailed:
    """Noise under long-tailed labels."""
    rng = np.random.default_rng(0)

    def split(labels: np.ndarray) -> Split:
        return Split(rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8), labels)

    train = np.repeat(np.arange(num_classes), np.linspace(2000 / num_classes, 20, num_classes).astype(int))
    each = np.repeat(np.arange(num_classes), 10)
    names = tuple(str(c) for c in range(num_classes))
    return LongTailed(split(train), split(each), split(each), names, "noise", (0.5,) * 3, (0.25,) * 3)


def steps_of(method: str, num_classes: int, graphs: bool, **recipe) -> Callable[[], object]:
    """STEPS steps of stage 2, on batches that are on the device already."""
    device = torch.get_default_device()
    whole: Recipe = dataclasses.replace(Cifar10LT(), epochs=2, stage2_epochs=2, lr=1e-3, **METHODS[method], **recipe)
    with torch.device("cpu"):  # tensors made from numpy arrays move to the device by themselves
        run = loop.Run(whole, pictures(num_classes), Path(), device, loop.Options(graphs=graphs), loop.ALONE, None)
        run.prepare()
        stage = run.stage(True)
        run.stepper.begin_epoch(stage)
        batches = [batch for batch, _ in zip(stage.batches.epoch(0), range(5), strict=False)]
        metas = list(stage.meta.meta(0, 0, 5)) if whole.looks_at_meta else [None] * 5

    def steps() -> None:
        for number in range(STEPS):
            run.stepper.step(*batches[number % 5], metas[number % 5])

    return steps


def head_steps(num_classes: int) -> dict[str, Callable[[], object]]:
    """A last layer of 2048 features, batch 256, diagonal covariances: each kind of step as a graph."""
    device, features, batch = torch.get_default_device(), 2048, 256
    layer = nn.Linear(features, num_classes)
    running = RunningCovariance(num_classes, features, "diagonal", device=device)
    running.update(torch.randn(4 * batch, features), torch.randint(num_classes, (4 * batch,)))
    learned, head, rate = LearnedCovariance(running), Head(layer), torch.tensor(3e-4, dtype=torch.float64)
    how = {"strength": rate * 800, "inner_rate": rate, "compute": Compute(finite=Finite(device), draws=False)}
    f, f_meta = torch.randn(2, batch, features).relu()
    y, y_meta = torch.randint(num_classes, (2, batch))

    def plain(f, y, *_):
        torch.autograd.grad(F.cross_entropy(layer(f), y), list(layer.parameters()))

    def closed(f, y, f_meta, y_meta):
        frozen_head_step(layer, f, y, f_meta, y_meta, learned, HeadLoss("ce"), **how)

    def autograd(f, y, f_meta, y_meta):
        metasaug_step(head, f, y, f_meta, y_meta, learned, HeadLoss("ce"), implementation="autograd", **how)

    return {f"{step.__name__}, {num_classes}": captured(step, (f, y, f_meta, y_meta))
            for step in (plain, closed, autograd)}


def captured(step: Callable[..., None], batch: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*batch)
    return functools.partial(CapturedStep(lambda inputs: step(*inputs), batch, stream).replay, batch)


def measure(rounds: int) -> list[Row]:
    head = {classes: side_by_side(head_steps(classes), rounds) for classes in (1024, 8142)}
    rows = [ratio_row(f"last layer, {classes} classes: closed form / {other}, captured", times[f"closed, {classes}"],
                      times[f"{other}, {classes}"], to_reach.get(classes))
            for classes, times in head.items()
            for other, to_reach in (("autograd", {8142: 0.6}), ("plain", {8142: 8.5}))]
    for num_classes in (10, 100):
        times = side_by_side({f"{method} {way}": steps_of(method, num_classes, way == "captured")
                              for method in METHODS for way in ("captured", "eager")}
                             | {"plain bfloat16": steps_of("plain", num_classes, True, precision="bfloat16")},
                             rounds)
        of_step = {name: [t / STEPS for t in taken] for name, taken in times.items()}
        for method in METHODS:
            rows.append(ratio_row(f"{method}, captured / eager, {num_classes} classes", of_step[f"{method} captured"],
                                  of_step[f"{method} eager"], TO_REACH.get(method)))
        for method in METHODS:
            if method != "plain":
                rows.append(ratio_row(f"{method} / plain, both captured, {num_classes} classes",
                                      of_step[f"{method} captured"], of_step["plain captured"],
                                      4.1 if method == "network" else None))
        rows.append(ratio_row(f"plain in bfloat16 / float32 (TF32), captured, {num_classes} classes",
                              of_step["plain bfloat16"], of_step["plain captured"]))
    return rows


if __name__ == "__main__":
    command("python -m benchmarks.step_gpu", measure)
