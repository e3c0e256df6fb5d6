"""`python -m benchmarks.head`: time a whole MetaSAug step of a last layer on a frozen backbone, at iNaturalist's size.

C = 8142 classes, A = 2048 features, batch 256, diagonal covariances, made-up features. It is compared with plain cross
entropy (forward and backward) on the same layer, and with autograd over the matmul form (training/method/reference.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measuring import Row, added_memory, command, figure_row, ratio_row, side_by_side
from training.method import reference as naive
from training.method.closed_form import LOGGED, frozen_head_step
from training.method.covariance import LearnedCovariance, RunningCovariance
from training.method.losses import HeadLoss

CLASSES, FEATURES, BATCH = 8142, 2048, 256
SCALING = (1024, 2048, 4096, 8192, 16384)


def _setting(classes: int):
    torch.manual_seed(0)
    layer = nn.Linear(FEATURES, classes)
    f, f_meta = torch.randn(BATCH, FEATURES).relu(), torch.randn(BATCH, FEATURES).relu()
    y, y_meta = torch.randint(0, classes, (BATCH,)), torch.randint(0, classes, (BATCH,))
    running = RunningCovariance(classes, FEATURES, "diagonal", device=f.device)
    running.covariance.uniform_(0, 0.1)
    return layer, f, y, f_meta, y_meta, running


def plain(classes: int) -> Callable[[], object]:
    layer, f, y, *_ = _setting(classes)

    def step():
        layer.zero_grad()
        F.cross_entropy(layer(f), y).backward()

    return step


def ours(classes: int) -> Callable[[], object]:
    layer, f, y, f_meta, y_meta, running = _setting(classes)
    learned = LearnedCovariance(running)
    return lambda: frozen_head_step(layer, f, y, f_meta, y_meta, learned, HeadLoss("ce"), strength=0.25,
                                    inner_rate=3e-4)


def authors(classes: int, batch: int = 8) -> Callable[[], object]:
    """The authors' formulation, over (N, C, A) differences. Only its memory is measured, at a batch size that fits."""
    layer, f, y, f_meta, y_meta, running = _setting(classes)
    return lambda: naive.autograd_frozen_head_step(
        f[:batch], y[:batch], f_meta[:batch], y_meta[:batch], layer.weight, layer.bias, running.covariance, 0.25, 3e-4,
        0.1, spread=naive.spread,
    )  # fmt: skip


def autograd(classes: int) -> Callable[[], object]:
    layer, f, y, f_meta, y_meta, running = _setting(classes)
    return lambda: naive.autograd_frozen_head_step(f, y, f_meta, y_meta, layer.weight, layer.bias, running.covariance,
                                                   0.25, 3e-4, 0.1)


def update(classes: int) -> Callable[[], object]:
    _, f, y, _, _, running = _setting(classes)
    return lambda: running.update(f, y)


def rows_at_full_size(rounds: int) -> list[Row]:
    _, _, y, *_ = _setting(CLASSES)
    present = len(y.unique())
    product = 2 * BATCH * CLASSES * FEATURES
    work = product * (16 + 1 / LOGGED)
    W = CLASSES * FEATURES * 4
    times = side_by_side({"plain": plain(CLASSES), "ours": ours(CLASSES), "autograd": autograd(CLASSES),
                          "update": update(CLASSES)}, rounds)
    rate = work / sorted(times["ours"])[rounds // 2] / 1e9
    plain_rate = 2 * product / sorted(times["plain"])[rounds // 2] / 1e9
    # Six passes over W, in chunks that stay in the cache for all products of a pass, and one for the logits of the log;
    # the gradient is written once.
    counted = (f"16 products of {product / 1e9:.1f} GFLOP, plain has 2; {8 * W / 1e6:.0f} MB of W and its gradient "
               f"moved; {rate:.0f} GFLOP/s, plain {plain_rate:.0f}")
    memory, memory_autograd = added_memory(ours(CLASSES)), added_memory(autograd(CLASSES))
    memory_authors = added_memory(authors(CLASSES))
    return [
        ratio_row("MetaSAug step / plain step", times["ours"], times["plain"], 8.5, counted),
        ratio_row("MetaSAug step / autograd over the matmul form", times["ours"], times["autograd"]),
        ratio_row("estimator update / plain step", times["update"], times["plain"], 0.2, f"{present} rows touched"),
        figure_row("extra memory of the MetaSAug step", memory, "MB", 500.0,
                   f"its gradient of W alone: {W / 1e6:.0f} MB; autograd: {memory_autograd:.0f} MB; "
                   f"the authors' formulation at batch 8: {memory_authors:.0f} MB"),
    ]


def rows_by_size(rounds: int) -> list[Row]:
    """Cost grows as N C A: the time for 1,000 classes stays the same."""
    rows = []
    for classes in SCALING:
        times = side_by_side({"plain": plain(classes), "ours": ours(classes)}, rounds)
        per_thousand = sorted(times["ours"])[rounds // 2] / classes * 1e6
        rows.append(ratio_row(f"MetaSAug step / plain step, {classes} classes", times["ours"], times["plain"], None,
                              f"{per_thousand:.0f} ms for 1,000 classes"))
    return rows


def measure(rounds: int) -> list[Row]:
    return rows_at_full_size(rounds) + rows_by_size(max(3, rounds // 2))


if __name__ == "__main__":
    command("python -m benchmarks.head", measure)
