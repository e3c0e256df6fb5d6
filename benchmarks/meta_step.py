"""`python -m benchmarks.meta_step`: time the exact meta step of ResNet-32 against double backward and plain training.

Batch 100, 32 x 32 pictures, full covariances, look-ahead through the network and through the classifier. The twin in
training/method/reference.py does double backward through everything, with the same result.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.measuring import Row, added_memory, command, figure_row, ratio_row, side_by_side
from training.method import reference as naive
from training.method.covariance import LearnedCovariance, RunningCovariance
from training.method.losses import HeadLoss
from training.method.metasaug import Lookahead, metasaug_step
from zoo.architectures import create

BATCH = 100


def _setting(num_classes: int):
    torch.manual_seed(0)
    module = create("resnet32", num_classes).to(memory_format=torch.channels_last).train()
    x, x_meta = (torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2))
    # A long-tailed batch: a few classes often, many not at all. The meta batch has all classes equally often.
    y = (torch.rand(BATCH) ** 3 * num_classes).long()
    y_meta = torch.arange(BATCH) % num_classes
    running = RunningCovariance(num_classes, 64, device=x.device)
    running.update(torch.randn(20 * num_classes, 64), torch.arange(20 * num_classes) % num_classes)
    return module, x, y, x_meta, y_meta, running


def plain(num_classes: int) -> Callable[[], object]:
    module, x, y, *_ = _setting(num_classes)

    def step():
        module.zero_grad()
        F.cross_entropy(module(x), y).backward()

    return step


def ours(num_classes: int, lookahead: Lookahead, fidelity: str = "reference") -> Callable[[], object]:
    module, x, y, x_meta, y_meta, running = _setting(num_classes)
    learned = LearnedCovariance(running)
    return lambda: metasaug_step(module, x, y, x_meta, y_meta, learned, HeadLoss("ce"), strength=0.5, inner_rate=0.1,
                                 lookahead=lookahead, fidelity=fidelity)  # type: ignore[arg-type]


def double_backward(num_classes: int, lookahead: Lookahead) -> Callable[[], object]:
    module, x, y, x_meta, y_meta, running = _setting(num_classes)
    S = running.covariance

    def loss(f, W, b, y, S):
        return naive.head_loss(f, W, b, y, S, 0.5)

    def step():
        grad_S, real = naive.double_backward_step(module, x, y, x_meta, y_meta, S, loss, 0.1, lookahead)
        return real(S - 0.1 * grad_S)

    return step


def rows_for(num_classes: int, rounds: int) -> list[Row]:
    times = side_by_side({
        "plain": plain(num_classes), "network": ours(num_classes, "network"),
        "fixed": ours(num_classes, "network", "fixed"), "classifier": ours(num_classes, "classifier"),
        "twin": double_backward(num_classes, "network"),
    }, rounds)  # fmt: skip
    memory = {"ours": added_memory(ours(num_classes, "network")),
              "twin": added_memory(double_backward(num_classes, "network"))}
    classes = f"{num_classes} classes"
    return [
        ratio_row(f"network / double backward, {classes}", times["network"], times["twin"], 0.6),
        ratio_row(f"network / plain step, {classes}", times["network"], times["plain"], 4.1,
                  "3.7 by counting passes"),
        ratio_row(f"network, S kept and projected / plain step, {classes}", times["fixed"], times["plain"]),
        ratio_row(f"classifier / plain step, {classes}", times["classifier"], times["plain"], 1.5),
        figure_row(f"peak memory, network / double backward, {classes}", memory["ours"] / memory["twin"], "x", 0.8,
                   f"{memory['ours']:.0f} MB against {memory['twin']:.0f} MB, torch's allocations"),
    ]


def measure(rounds: int) -> list[Row]:
    return [row for num_classes in (10, 100) for row in rows_for(num_classes, rounds)]


if __name__ == "__main__":
    command("python -m benchmarks.meta_step", measure)
