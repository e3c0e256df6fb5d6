"""The first answer of a run from a pretrained start: a last layer on its frozen features.

Shape suffixes: N pictures, C classes, A features.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.batches import View, in_order
from training.data.datasets import LongTailed
from training.data.splits import rank_in_class
from training.network.feature_cache import FeatureCache
from training.recipes import OwnPictures
from training.run.evaluation import evaluate
from training.run.stages import view_of
from training.run.state import check_input_size, start
from zoo.architectures import classifier_name
from zoo.labels import assign_groups

# Weight decays of the last layer to try, and the one to use if fewer than FEW pictures are held out.
PENALTIES, USUAL_PENALTY = (0.1, 0.03, 0.01, 0.003), 0.03
FEW = 30
FIT_STEPS = 60
SAMPLE = 6_000  # training pictures behind the first answer, if there are more than twice as many
# Held-out pictures to flip, and the accuracy that a harmless flip may lose. A quarter turn may lose more: pictures on
# their side can look new to the start even if they have no upright direction.
TURNED, FLIP_LOSS, QUARTER_LOSS = 400, 0.04, 0.12


class FirstAnswer:
    """A last layer on the start's features, before and after training on the held-out pictures too.

    seen_N    places in `joined.train` of the pictures that it knows: at first a sample, after `see_rest` all
    held_NC   logits of the held-out pictures, before          score   their mean recall; None without any
    """

    def __init__(self, recipe: OwnPictures, data: LongTailed, folder: Path, device: torch.device, workers: int,
                 features: Path | None, sample: bool):
        self.recipe, self.data, self.folder, self.device = recipe, data, folder, device
        self.state = start(dataclasses.replace(recipe, augment="none"), data, device)
        self.module = self.state.module.eval()
        self.view = view_of(recipe, data)
        check_input_size(self.module, recipe, self.view)
        self.cache = FeatureCache(features or folder / "features", 1, self.view, recipe.seed, device, workers)
        # The training pictures first, then those of the meta set that are not among them.
        self.joined = data.with_meta_in_training()
        n = len(data.train)
        some = np.ones(len(self.joined.train), bool)
        if sample and n > 2 * SAMPLE:
            some[:n] = False
            some[some_of_each(data.train.labels, SAMPLE, recipe.seed)] = True
        self.seen_N, self.rest = np.flatnonzero(some), np.flatnonzero(~some)
        self.features_NA = self._features(self.seen_N)
        self.last_layer, self.held_NC, self.score = self._fit()

    def see_rest(self) -> None:
        """Fit the last layer to all pictures."""
        both_N, features_NA = np.concatenate([self.seen_N, self.rest]), self._features(self.rest)
        order = np.argsort(both_N)
        self.features_NA = torch.cat([self.features_NA, features_NA])[order]
        self.seen_N, self.rest = both_N[order], self.rest[:0]
        self.last_layer, self.held_NC, self.score = self._fit()

    def _features(self, at: np.ndarray) -> Tensor:
        return torch.from_numpy(self.cache.of("test", self.joined.train.at(at), self.module)[0].copy())

    @property
    def labels_N(self) -> Tensor:
        return torch.from_numpy(self.joined.train.labels[self.seen_N])

    def _fit(self) -> tuple[dict[str, Tensor], np.ndarray, float | None]:
        """The last layer fitted to the training pictures only, with the best of PENALTIES; fine-tuning begins with it.

        Also returns its logits of the held-out pictures, and their score.
        """
        n, C = int((self.seen_N < len(self.data.train)).sum()), len(self.data.label_names)
        balanced = self.recipe.balances
        held_NA, held_N = self.features_NA[n:], self.labels_N[n:].numpy()
        self.penalty, best, found = USUAL_PENALTY, None, None
        for penalty in PENALTIES if len(held_N) >= FEW else [USUAL_PENALTY]:
            weight, bias = fit_last_layer(self.features_NA[:n], self.labels_N[:n], C, penalty, balanced)
            said_NC = F.linear(held_NA, weight, bias).numpy()
            score = mean_recall(said_NC, held_N) if len(held_N) else None
            if found is None or (score is not None and best is not None and score > best):
                self.penalty, best, found = penalty, score, (weight, bias, said_NC)
        assert found is not None
        return self._named(*found[:2]), found[2], best

    def _named(self, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        name = classifier_name(self.module)
        return {f"{name}.weight": weight.to(self.device), f"{name}.bias": bias.to(self.device)}

    def with_flips(self) -> OwnPictures:
        """The recipe, with --flips chosen and printed if it is auto."""
        if self.recipe.flips == "auto":
            self.module.load_state_dict(self.last_layer, strict=False)
            flips, why = self._flips()
            self.recipe = dataclasses.replace(self.recipe, flips=flips)  # type: ignore[arg-type]
            print(f"--flips {flips}: {why}")
        return self.recipe

    def fitted(self, features_NA: Tensor, labels_N: Tensor, steps: int = FIT_STEPS) -> tuple[Tensor, Tensor]:
        """Weight (C, A) and bias (C,) of a last layer for these pictures, in at most this many steps."""
        return fit_last_layer(features_NA, labels_N, len(self.data.label_names), self.penalty, self.recipe.balances,
                              steps)

    def on_all(self) -> tuple[dict, np.ndarray]:
        """Train on the meta set too; returns the test results and the logits (N, C)."""
        self.module.load_state_dict(self._named(*self.fitted(self.features_NA, self.labels_N)), strict=False)
        groups, _ = assign_groups(self.joined.class_counts)
        kept: list[np.ndarray] = []
        prior = as_fitted(self.recipe).implicit_prior(self.joined.class_counts)
        results = evaluate(self.module, self.joined, self.view, groups, self.device, prior=prior,
                           features_KNA=self.cache.of("test", self.data.test, self.module), kept=kept)
        return {"split": "test", "epoch": 0, **results}, np.concatenate(kept)

    def _flips(self) -> tuple[str, str]:
        """Flips that keep the accuracy on held-out pictures, and a sentence with these accuracies."""
        held = self.data.held_out
        if len(held) < FEW:
            return "mirror", "too few pictures are held out to measure which flips are harmless"
        some = held.at(np.linspace(0, len(held) - 1, min(len(held), TURNED)).astype(int))
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "upright": lambda x: x, "mirrored": lambda x: x.flip(3), "upside down": lambda x: x.flip(2),
            "turned": lambda x: x.rot90(1, (2, 3))}
        answers = {way: logits_of(self.module, some, self.view, self.device, turn).argmax(1)
                   for way, turn in ways.items()}
        right = {way: float((answers_N == some.labels).mean()) for way, answers_N in answers.items()}
        lost = {way: right["upright"] - share for way, share in right.items()}
        flips = ("none" if lost["mirrored"] > FLIP_LOSS else
                 "all" if lost["upside down"] <= FLIP_LOSS and lost["turned"] <= QUARTER_LOSS else "mirror")
        return flips, "accuracy of the first answer: " + ", ".join(f"{share:.0%} {way}" for way, share in right.items())


def fit_last_layer(
    features_NA: Tensor, labels_N: Tensor, C: int, penalty: float, balanced: bool, steps: int = FIT_STEPS
) -> tuple[Tensor, Tensor]:
    """Weight (C, A) and bias (C,) that minimise, by L-BFGS from 0, on features of mean 0 and variance 1,

        mean cross entropy(logits + log prior, labels) + penalty / 2 * sum weight^2

    balanced   add the log prior of the classes, as logit adjustment does
    """
    mean_A, std_A = features_NA.mean(0), features_NA.std(0).clamp_min(1e-4)
    x_NA = (features_NA - mean_A) / std_A
    counts_C = torch.bincount(labels_N, minlength=C).clamp_min(1).float()
    shift_C = (counts_C / counts_C.sum()).log() if balanced else torch.zeros(C)
    weight, bias = torch.zeros(C, x_NA.shape[1], requires_grad=True), torch.zeros(C, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x_NA, weight, bias) + shift_C, labels_N) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        scaled = weight / std_A
        return scaled, bias - scaled @ mean_A


def some_of_each(labels_N: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Places of at most `most` pictures, sorted: rare classes whole, about as many of each larger one, at random."""
    order = np.random.default_rng(seed).permutation(len(labels_N))
    return np.sort(order[np.argsort(rank_in_class(labels_N[order]), kind="stable")[:most]])


def mean_recall(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean accuracy over the classes that have pictures."""
    right_N = logits_NC.argmax(1) == labels_N
    return float(np.mean([right_N[labels_N == c].mean() for c in np.unique(labels_N)]))


@torch.no_grad()
def logits_of(module: nn.Module, pictures, view: View, device: torch.device,
            turn: Callable[[Tensor], Tensor] = lambda x: x) -> np.ndarray:
    training = module.training
    module.eval()
    rows = [module(turn(batch)).float().cpu().numpy() for batch, _ in in_order(pictures, view, device)]
    module.train(training)
    return np.concatenate(rows)


def as_fitted(recipe: OwnPictures) -> OwnPictures:
    """The recipe of `fit_last_layer`: with the log prior instead of class weights and augmentation."""
    return dataclasses.replace(recipe, augment="none", class_weights="none", sampling="instance",
                               loss="balanced-softmax" if recipe.balances else recipe.loss)
