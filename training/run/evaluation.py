"""Test results of a network in training."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from training.data.batches import View, in_order
from training.data.datasets import LongTailed
from training.network.distributed import ALONE, Processes
from training.network.feature_cache import Head, features_in_order
from training.report.metrics import Tally


def evaluate(
    module: nn.Module, data: LongTailed, view: View, groups: tuple[str, ...], device: torch.device, workers: int = 0,
    prior: str | Sequence[float] | None = None, before_each: Callable[[], None] = lambda: None,
    features_KNA: np.ndarray | None = None, processes: Processes = ALONE, kept: list[np.ndarray] | None = None,
) -> dict:
    """Test results of the module in its current state; see training.report.metrics.Tally.

    before_each    called before each batch; it may raise to stop
    features_KNA   cached features of the test pictures: the same results without decoding pictures
    kept           collects the logits, (N, C) of each batch
    processes      each sees its part of every batch, and all return the same results
    """
    was_training = module.training
    module.eval()
    tally, seen = Tally(data.label_names, data.class_counts, groups, prior), 0
    with torch.no_grad():
        if features_KNA is None:
            net, looks = module, in_order(data.test, view, device, workers, processes)
        else:
            net = Head(module.get_classifier())  # type: ignore[operator]
            looks = features_in_order(features_KNA, view, device, processes)
        for pictures, total in looks:
            before_each()
            logits = net(pictures) if len(pictures) else torch.empty(0, len(data.label_names), device=device)
            logits = processes.gather(logits.float(), total)
            if kept is not None:
                kept.append(logits.cpu().numpy())
            tally.add(logits.cpu().numpy(), data.test.labels[seen : seen + total])
            seen += total
    module.train(was_training)
    return tally.results()
