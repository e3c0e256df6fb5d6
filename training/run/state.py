"""The state that a run carries from step to step, and its value at the start."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from training.data.batches import View
from training.data.datasets import LongTailed, listed
from training.errors import DivergenceError, TrainingError
from training.method.covariance import LearnedCovariance, RunningCovariance
from training.method.finite import Finite, check_finite
from training.method.heldout import HeldOut
from training.network.derivatives import GradientScale
from training.network.distributed import Processes
from training.network.prepared import prepared
from training.network.start_weights import find_backbone, load_backbone, load_pretrained
from training.network.starts import find_start
from training.recipes import OwnPictures, Recipe
from training.run import checkpoints
from zoo.architectures import create


@dataclass
class State:
    """What a run carries from one step to the next."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    covariance: RunningCovariance
    learned: LearnedCovariance | HeldOut
    scale: GradientScale = field(default_factory=GradientScale)  # of float16's gradients
    epoch: int = 0  # the epoch that is running, from 0
    step: int = 0  # the next step in it
    seconds: float = 0.0
    log_bytes: int = 0  # length of the log when the state was saved
    sums: "Sums" = field(default_factory=lambda: Sums())  # of this epoch, for its log line

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        self.sums.load({})

    def check(self, kept: Path) -> None:
        """Raise DivergenceError if a number to be saved is NaN or infinite. kept: the folder of checkpoints."""
        momenta = _floats(one.get("momentum_buffer") for one in self.optimizer.state.values())
        covariances = [*self.covariance.state_dict().values(), *self.learned.state_dict().values()]
        try:
            check_finite(weight=_floats(self.module.state_dict().values()), covariance=_floats(covariances))
            if momenta:
                check_finite(momentum=momenta)
        except DivergenceError as error:
            raise DivergenceError(f"epoch {self.epoch + 1}, step {self.step}: {error} Not saved; "
                                  f"{checkpoints.whats_good(kept)}") from error

    def level(self, processes: Processes) -> None:
        """Make all processes bit-identical; on GPUs, what each computed alike may differ in the last bits."""
        momenta = _floats(one.get("momentum_buffer") for one in self.optimizer.state.values())
        processes.follow([*self.module.state_dict().values(), *momenta, *self.covariance.state_dict().values(),
                          *self.learned.state_dict().values()])

    def to_dict(self, recipe: Recipe, data: LongTailed) -> dict:
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        return {
            "format": 1, "recipe": recipe.to_dict(), "stage1_key": recipe.stage1_key(), "data": data.identity(),
            "module": self.module.state_dict(), "optimizer": optimizer,
            "covariance": self.covariance.state_dict(), "learned": self.learned.state_dict(),
            "scale": self.scale.state_dict(), "epoch": self.epoch, "step": self.step, "seconds": self.seconds,
            "log_bytes": self.log_bytes,
            "sums": self.sums.to_dict(),
        }

    def load_momenta(self, saved: dict) -> None:
        """Load momenta from an optimizer's state_dict; learning rates and implementation stay this run's own."""
        self.optimizer.load_state_dict({**saved, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def load_dict(self, saved: dict) -> None:
        self.module.load_state_dict(saved["module"])
        self.load_momenta(saved["optimizer"])
        self.covariance.load_state_dict(saved["covariance"])
        self.learned.load_state_dict(saved["learned"])
        self.scale.load_state_dict(saved.get("scale", self.scale.state_dict()))  # old checkpoints have no scale
        self.sums.load(saved["sums"])
        for name in ("epoch", "step", "seconds", "log_bytes"):
            setattr(self, name, saved[name])


class Sums:
    """Figures of an epoch, summed over its pictures on the device; only `to_dict` waits for the device."""

    NAMES = ("loss", "wrong", "meta_loss", "shift", "effect")

    def __init__(self, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self.values = torch.zeros(len(self.NAMES), device=device,
                                  dtype=torch.float32 if device.type == "mps" else torch.float64)
        self.names: tuple[str, ...] = ()
        self.pictures = 0

    def add(self, figures: dict[str, torch.Tensor], pictures: int, finite: Finite) -> None:
        """Each figure is a mean over the batch, except `wrong`, a count. `pictures` is counted elsewhere."""
        self.names = tuple(figures)
        for name, value in figures.items():
            place, value = self.NAMES.index(name), value.to(self.values.dtype)
            added = value if name == "wrong" else value * pictures
            self.values[place] += finite.kept(added, torch.zeros_like(added))

    def to_dict(self) -> dict[str, float]:
        values = dict(zip(self.NAMES, self.values.tolist(), strict=True))
        return {"pictures": self.pictures} | {name: values[name] for name in self.names} if self.pictures else {}

    def load(self, saved: dict[str, float]) -> None:
        self.pictures = int(saved.get("pictures", 0))
        self.names = tuple(name for name in saved if name != "pictures") or self.names
        self.values.copy_(torch.tensor([saved.get(name, 0.0) for name in self.NAMES], dtype=torch.float64))


def _floats(values: Iterable[Any]) -> list[torch.Tensor]:
    return [v for v in values if torch.is_tensor(v) and v.is_floating_point()]


def start(recipe: Recipe, data: LongTailed, device: torch.device) -> State:
    """The state before the first step. data: of stage 2."""
    torch.manual_seed(recipe.seed)
    num_classes = len(data.label_names)
    module = create(recipe.architecture, num_classes, recipe.cosine_scale)
    if recipe.pretrained is not None:
        fresh = load_pretrained(module, recipe.pretrained)
        if fresh and os.environ.get("RANK", "0") == "0":
            print(f"--pretrained {recipe.pretrained}: {listed(fresh, ', ')} start from random weights")
    if isinstance(recipe, OwnPictures) and recipe.starts_pretrained:
        load_backbone(module, find_start(recipe.start), False)
    if recipe.backbone is not None:
        load_backbone(module, find_backbone(recipe.backbone), recipe.last_layer == "ready")
    prepared(module, device).train()
    optimizer = torch.optim.SGD(module.parameters(), recipe.lr, recipe.momentum, nesterov=recipe.momentum > 0,
                                weight_decay=recipe.weight_decay, fused=device.type == "cuda")
    width: int = module.get_classifier().in_features  # type: ignore[operator, union-attr]
    kind = recipe.covariance if recipe.augment != "none" else "diagonal"  # not used: take the smaller
    covariance = RunningCovariance(num_classes, width, kind, device=device)
    if recipe.augment == "heldout":
        held = np.bincount(data.meta.labels, minlength=num_classes).tolist()
        return State(module, optimizer, covariance, HeldOut(covariance, held), sums=Sums(device))
    return State(module, optimizer, covariance, LearnedCovariance(covariance), sums=Sums(device))


def check_input_size(module: nn.Module, recipe: Recipe, view: View) -> None:
    """Raise TrainingError if the network does not take pictures of this size."""
    if because := why_not(module, view.size):
        raise TrainingError(f"{recipe.architecture} does not take pictures of {view.size[0]} x {view.size[1]}: "
                            f"{because} Give another --input-size or --architecture.")


def why_not(module: nn.Module, size: tuple[int, int]) -> str:
    """Why the network takes no pictures of this height and width; "" if it does. Leaves it in eval mode."""
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(2, 3, *size, device=next(module.parameters()).device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        return str(error).splitlines()[0]
    return ""
