"""One training step of a recipe, optimizer included: run eagerly or, on a GPU, as a CUDA graph."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.method.closed_form import SUPPORTED_LOSSES, frozen_head_step
from training.method.heldout import HeldOut, heldout_step
from training.method.metasaug import StepResult, isda_step, metasaug_step, plain_step
from training.network.derivatives import BatchFeatures, Compute
from training.recipes import Recipe
from training.run.stages import Stage
from training.run.state import State


class Stepper:
    """Steps of a run. `begin_epoch` first, then `step` for each batch.

    graphs   on CUDA: capture steps where their shapes and the method allow it; `eager_because` says why not
    """

    def __init__(self, recipe: Recipe, state: State, compute: Compute, device: torch.device, graphs: bool = True):
        self.recipe, self.state, self.compute, self.device = recipe, state, compute, device
        self.rates = Rates(device)

    def begin_epoch(self, stage: Stage) -> None:
        """stage   what this epoch trains on"""
        self.stage = stage
        self.rates.set(self.recipe, self.state.epoch)
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.rates.lr

    def step(self, pictures: Tensor, labels: Tensor, meta_batch: tuple[Tensor, Tensor] | None) -> None:
        """Train on a batch. Raises DivergenceError before anything is updated, on a GPU within STEPS_UNSEEN steps."""
        torch.manual_seed(seed_of_step(self.recipe, self.state, self.compute.processes.rank))
        self._step(pictures, labels, meta_batch)

    def _step(self, pictures: Tensor, labels: Tensor, meta_batch: tuple[Tensor, Tensor] | None) -> None:
        result = self.gradient(pictures, labels, meta_batch)
        figures = figures_of(result, labels)  # before the optimizer's step, which a GPU then takes meanwhile
        self.state.optimizer.step()
        self.state.sums.add(figures, len(labels))

    def gradient(
        self, pictures: Tensor, labels: Tensor, meta_batch: tuple[Tensor, Tensor] | None
    ) -> StepResult:
        """One step but for the optimizer's: its gradients are left in `.grad`."""
        recipe, state, stage, rates, compute = self.recipe, self.state, self.stage, self.rates, self.compute
        module = stage.head or state.module
        in_stage2 = state.epoch >= recipe.stage2_epoch
        if in_stage2 and recipe.augment == "isda":
            return isda_step(module, pictures, labels, state.covariance, stage.loss, rates.strength, stage.weights,
                             compute)
        if meta_batch is None:
            return plain_step(module, pictures, labels, stage.loss, stage.weights, compute)
        if isinstance(state.learned, HeldOut):
            return heldout_step(module, pictures, labels, *meta_batch, state.learned, stage.loss, rates.strength,
                                stage.weights, compute)
        how: dict[str, Any] = {"strength": rates.strength, "inner_rate": rates.inner, "meta_rate": recipe.meta_rate,
                               "fidelity": recipe.fidelity, "class_weights": stage.weights}
        if _in_closed_form(recipe):
            features, meta_features = (BatchFeatures(module, x, len(y), compute, graph=False).whole_NA
                                       for x, y in ((pictures, labels), meta_batch))
            return frozen_head_step(module.get_classifier(), features, labels,  # type: ignore[operator]
                                    meta_features, meta_batch[1], state.learned, stage.loss, **how)
        return metasaug_step(module, pictures, labels, *meta_batch, state.learned, stage.loss,
                             lookahead=recipe.lookahead, compute=compute, **how)

    def failed_step(self) -> int:
        """The step, from 1, that raised DivergenceError."""
        return self.state.step + 1


class Rates:
    """What changes from epoch to epoch: numbers on the CPU, 0-dimensional tensors on a GPU, so that graphs see them."""

    lr: Any
    strength: Any
    inner: Any

    def __init__(self, device: torch.device):
        pass

    def set(self, recipe: Recipe, epoch: int) -> None:
        """inner: alpha is the current learning rate; in the authors' code it lags the schedule by one epoch."""
        self.lr, self.strength = recipe.lr_at(epoch), recipe.strength_at(epoch)
        self.inner = recipe.lr_at(max(epoch - 1, 0) if recipe.fidelity == "reference" else epoch)


def seed_of_step(recipe: Recipe, state: State, rank: int) -> int:
    """For what torch itself draws in a step (dropout, stochastic depth)."""
    of_rank = [rank] if rank else []
    sequence = np.random.SeedSequence([recipe.seed, state.epoch, state.step, *of_rank])
    return int(sequence.generate_state(1, np.uint64)[0])


def _in_closed_form(recipe: Recipe) -> bool:
    return (recipe.stands_still(in_stage2=True) and recipe.covariance == "diagonal"
            and recipe.loss in SUPPORTED_LOSSES)


def set_trained(module: nn.Module, recipe: Recipe, in_stage2: bool) -> None:
    """Train mode; where only the last layer trains, the rest stands still in eval mode."""
    module.train()
    if recipe.stands_still(in_stage2):
        module.eval().requires_grad_(False)
        module.get_classifier().requires_grad_()  # type: ignore[operator, union-attr]
        module.zero_grad()  # the optimizer passes over what has no gradient


def figures_of(result: StepResult, labels: Tensor) -> dict[str, Tensor]:
    """What a step says for the log. `shift` is |S' - S| / |S|, `effect` what that change did to the loss."""
    figures = {"loss": result.loss, "wrong": (result.logits_NC.argmax(1) != labels).sum()}
    if result.meta_loss is not None:
        figures["meta_loss"] = result.meta_loss
    if result.loss_before is not None and result.shift is not None:
        figures |= {"shift": result.shift, "effect": result.loss - result.loss_before}
    return figures


def log_line(recipe: Recipe, state: State) -> dict:
    """The epoch's line in log.jsonl: means over its pictures."""
    sums = state.sums.to_dict()
    seen = sums["pictures"]
    means = {name: value / seen for name, value in sums.items() if name not in ("pictures", "wrong")}
    return {"epoch": state.epoch + 1, "stage": 2 if state.epoch >= recipe.stage2_epoch else 1,
            "lr": recipe.lr_at(state.epoch), **means, "train_error": sums["wrong"] / seen,
            "seconds": round(state.seconds, 1)}
