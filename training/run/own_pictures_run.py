"""A run on your own pictures from a pretrained start: a first answer in minutes, fine-tuning, the better of the two.

1. The start stands still: features of all pictures are computed once, and a last layer is fitted to them. That is the
   first model, with its report.
2. Everything is fine-tuned from there by training.run.loop. Each test may leave a better model.
3. The better one stays, by pictures of the meta set that neither was trained on. Those pictures are trained on last.

Where too few pictures are held out to tell which is better, the first model is the last.

Shape suffixes: N pictures, C classes, A features.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.batches import View, in_order
from training.data.datasets import LongTailed
from training.data.splits import SMALL_FOR_A_WHILE
from training.errors import Interrupted
from training.network.feature_cache import FeatureCache
from training.recipes import OwnPictures
from training.report.page import report_of_run
from training.run import checkpoints, loop
from training.run.evaluation import evaluate
from training.run.run_folder import write_model
from training.run.stages import data_of_stage, view_of
from training.run.state import State, check_input_size, start
from zoo.architectures import classifier_name
from zoo.files import write_atomically
from zoo.labels import assign_groups
from zoo.model_folder import ModelFolder

# Weight decays of the last layer that are tried, and the one that is taken where under FEW pictures are held out.
PENALTIES, USUAL_PENALTY = (0.1, 0.03, 0.01, 0.003), 0.03
FEW = 30
FIT_STEPS = 60
# Held-out pictures that are turned over to see which flips matter, and the accuracy that may be lost by a flip. What
# lies on its side may look new to the start where it has no up all the same: by a quarter more may be lost.
TURNED, FLIP_LOSS, QUARTER_LOSS = 400, 0.04, 0.12


@dataclass
class Scores:
    """Mean accuracy over classes on held-out pictures, kept in the run folder.

    frozen   of the first answer; fine_tuned: at the last test before those pictures are trained on; best: of both
    """

    frozen: float | None = None
    fine_tuned: float | None = None
    best: float | None = None

    @classmethod
    def load(cls, folder: Path) -> "Scores":
        path = folder / "scores.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, folder: Path) -> None:
        write_atomically(folder / "scores.json", (json.dumps(dataclasses.asdict(self)) + "\n").encode())


class OwnPicturesRun:
    """The whole run; see `train`.

    name      of the model          how   what `loop.run` takes beside recipe, data, folder and device
    """

    def __init__(self, recipe: OwnPictures, data: LongTailed, folder: Path, device: torch.device, name: str,
                 how: Mapping[str, Any]):
        self.recipe, self.data, self.folder, self.device, self.name = recipe, data, folder, device, name
        self.how = {**how, "evaluate_every": max(1, recipe.epochs // 5)}
        self.model = folder / "model"

    def train(self) -> dict:
        """Leaves the best model in `folder`/model, from the first answer on; returns its test results.

        Where the run is resumed, the first answer is there already.
        """
        last_layer = None
        newest = checkpoints.load_newest(self.folder / "checkpoints")
        if newest is None:
            self.scores = Scores()
            last_layer = self.answer_first()
        else:
            self.scores = Scores.load(self.folder)
            self.recipe = self.recipe.with_choices(newest[1]["recipe"])
        self.held_out, self.final = self.data.held_out, data_of_stage(self.recipe, self.data, 2)
        if len(self.held_out) < FEW:
            print(f"Only {len(self.held_out)} pictures are held out, too few to tell whether fine-tuning makes it "
                  f"better: the first answer is the model. With {SMALL_FOR_A_WHILE} training pictures in most classes, "
                  "or with --meta, it would be tried.")
            return ModelFolder(self.model).results or {}
        try:
            loop.run(self.recipe, self.data, self.folder, self.device, on_test=self.on_test, last_layer=last_layer,
                     **self.how)
        except Interrupted as interrupted:
            interrupted.model = self.model
            raise
        self.say_which()
        return ModelFolder(self.model).results or {}

    def answer_first(self) -> dict[str, Tensor]:
        """Leave the first model, complete; returns the last layer that fine-tuning begins with."""
        began = time.monotonic()
        first = FirstAnswer(self.recipe, self.data, self.folder, self.device, self.how.get("workers", 0),
                            self.how.get("features"))
        self.recipe = first.with_flips()
        results, predicted_N = first.on_all()
        self.scores = Scores(first.score, None, first.score)
        self.scores.save(self.folder)
        first.state.seconds = time.monotonic() - began
        self.leave(as_fitted(self.recipe), first.joined, first.state, results, predicted_N,
                   f"A last layer on the frozen features of the {self.recipe.start} start")
        self.export()
        print(f"{self.model}: first answer after {(time.monotonic() - began) / 60:.1f} minutes, macro error "
              f"{results['macro_error']:.1%}, ready to use."
              + (f" Fine-tuning follows, {self.recipe.epochs} epochs; Ctrl-C keeps the best model so far."
                 if len(self.data.held_out) >= FEW else ""))
        return first.last_layer

    def on_test(self, state: State, results: dict, predicted_N: np.ndarray) -> None:
        """Keep the model if it is the best so far; while it trains on the meta set, if it was before."""
        scores = self.scores
        if self.recipe.meta_in_training != "stage2" or state.epoch < self.recipe.stage2_epoch:
            score = mean_recall(_logits(state.module, self.held_out, view_of(self.recipe, self.data), self.device),
                                self.held_out.labels)
            scores.fine_tuned = score
            ahead = scores.best is None or score >= scores.best
            scores.best = score if ahead else scores.best
        else:
            ahead = scores.fine_tuned is None or scores.frozen is None or scores.fine_tuned >= scores.frozen
        scores.save(self.folder)
        if ahead:
            self.leave(self.recipe, self.final, state, {"split": "test", "epoch": state.epoch + 1, **results},
                       predicted_N, None)

    def leave(self, recipe: OwnPictures, data: LongTailed, state: State, results: dict, predicted_N: np.ndarray,
              schedule: str | None) -> None:
        """Write model and report. schedule: in words; None: the recipe's."""
        write_model(self.model, self.name, recipe, data, state, results, schedule=schedule)
        report_of_run(self.folder, results)

    def export(self) -> None:
        """ONNX and card, in a process of its own, since training does not know how models are exported."""
        done = subprocess.run([sys.executable, "-m", "export", str(self.model)], check=False, capture_output=True,
                              text=True)
        if done.returncode:
            print(f"{self.model} has no ONNX yet: {done.stderr.strip()[-300:]} `metasaug export {self.model}` adds it.")

    def say_which(self) -> None:
        frozen, tuned = self.scores.frozen, self.scores.fine_tuned
        if frozen is not None and tuned is not None:
            better = "fine-tuned model" if tuned >= frozen else "first answer"
            print(f"Mean accuracy over classes on held-out pictures: first answer {frozen:.1%}, fine-tuned {tuned:.1%} "
                  f"before it trained on them. The {better} is kept.")


class FirstAnswer:
    """A last layer on the start's features. `score` is of held-out pictures, None without any."""

    def __init__(self, recipe: OwnPictures, data: LongTailed, folder: Path, device: torch.device, workers: int,
                 features: Path | None):
        self.recipe, self.data, self.folder, self.device = recipe, data, folder, device
        self.state = start(dataclasses.replace(recipe, augment="none"), data, device)
        self.module = self.state.module.eval()
        self.view = view_of(recipe, data)
        check_input_size(self.module, recipe, self.view, device)
        self.cache = FeatureCache(features or folder / "features", 1, self.view, recipe.seed, device, workers)
        # The training pictures first, then those of the meta set that are not among them.
        self.joined = data.with_meta_in_training()
        self.features_NA = torch.from_numpy(self.cache.of("test", self.joined.train, self.module)[0].copy())
        self.labels_N = torch.from_numpy(self.joined.train.labels)
        self.last_layer, self.score = self._fit()

    def _fit(self) -> tuple[dict[str, Tensor], float | None]:
        """The last layer of the training pictures alone, where fine-tuning begins, by the best of PENALTIES."""
        n, C = len(self.data.train), len(self.data.label_names)
        balanced = self.recipe.balances
        held_NA, held_N = self.features_NA[n:], self.labels_N[n:].numpy()
        self.penalty, best, layer = USUAL_PENALTY, None, None
        for penalty in PENALTIES if len(held_N) >= FEW else [USUAL_PENALTY]:
            weight, bias = fit_last_layer(self.features_NA[:n], self.labels_N[:n], C, penalty, balanced)
            score = mean_recall(F.linear(held_NA, weight, bias).numpy(), held_N) if len(held_N) else None
            if layer is None or (score is not None and best is not None and score > best):
                self.penalty, best, layer = penalty, score, (weight, bias)
        assert layer is not None
        return self._named(*layer), best

    def _named(self, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        name = classifier_name(self.module)
        return {f"{name}.weight": weight.to(self.device), f"{name}.bias": bias.to(self.device)}

    def with_flips(self) -> OwnPictures:
        """The recipe with --flips chosen."""
        if self.recipe.flips == "auto":
            self.module.load_state_dict(self.last_layer, strict=False)
            flips, why = self._flips()
            self.recipe = dataclasses.replace(self.recipe, flips=flips)  # type: ignore[arg-type]
            print(f"--flips {flips}: {why}")
        return self.recipe

    def on_all(self) -> tuple[dict, np.ndarray]:
        """Train on the meta set as well; returns the test results and the predictions (N,)."""
        weight, bias = fit_last_layer(self.features_NA, self.labels_N, len(self.data.label_names), self.penalty,
                                      self.recipe.balances)
        self.module.load_state_dict(self._named(weight, bias), strict=False)
        groups, _ = assign_groups(self.joined.class_counts)
        predicted: list[np.ndarray] = []
        prior = as_fitted(self.recipe).implicit_prior(self.joined.class_counts)
        results = evaluate(self.module, self.joined, self.view, groups, self.device, prior=prior,
                           features_KNA=self.cache.of("test", self.data.test, self.module), predicted=predicted)
        return {"split": "test", "epoch": 0, **results}, np.concatenate(predicted)

    def _flips(self) -> tuple[str, str]:
        """What may be turned over: the accuracy on held-out pictures, each way round."""
        held = self.data.held_out
        if len(held) < FEW:
            return "mirror", "too few pictures are held out to see whether they have an up"
        some = held.at(np.linspace(0, len(held) - 1, min(len(held), TURNED)).astype(int))
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "upright": lambda x: x, "mirrored": lambda x: x.flip(3), "upside down": lambda x: x.flip(2),
            "turned": lambda x: x.rot90(1, (2, 3))}
        right = {way: float((_logits(self.module, some, self.view, self.device, turn).argmax(1) == some.labels).mean())
                 for way, turn in ways.items()}
        lost = {way: right["upright"] - share for way, share in right.items()}
        flips = ("none" if lost["mirrored"] > FLIP_LOSS else
                 "all" if lost["upside down"] <= FLIP_LOSS and lost["turned"] <= QUARTER_LOSS else "mirror")
        return flips, "the first answer gets " + ", ".join(f"{share:.0%} {way}" for way, share in right.items())


def fit_last_layer(
    features_NA: Tensor, labels_N: Tensor, C: int, penalty: float, balanced: bool
) -> tuple[Tensor, Tensor]:
    """Weight (C, A) and bias (C,) that minimise, by L-BFGS from 0, on features of mean 0 and variance 1,

        mean cross entropy(logits + log prior, labels) + penalty / 2 * sum weight^2

    balanced   with the log prior of the classes, as logit adjustment has it; else without
    """
    mean_A, std_A = features_NA.mean(0), features_NA.std(0).clamp_min(1e-4)
    x_NA = (features_NA - mean_A) / std_A
    counts_C = torch.bincount(labels_N, minlength=C).clamp_min(1).float()
    shift_C = (counts_C / counts_C.sum()).log() if balanced else torch.zeros(C)
    weight, bias = torch.zeros(C, x_NA.shape[1], requires_grad=True), torch.zeros(C, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=FIT_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x_NA, weight, bias) + shift_C, labels_N) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        scaled = weight / std_A
        return scaled, bias - scaled @ mean_A


def mean_recall(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean over the classes that there are of the share of their pictures that are right."""
    right_N = logits_NC.argmax(1) == labels_N
    return float(np.mean([right_N[labels_N == c].mean() for c in np.unique(labels_N)]))


@torch.no_grad()
def _logits(module: nn.Module, pictures, view: View, device: torch.device,
            turn: Callable[[Tensor], Tensor] = lambda x: x) -> np.ndarray:
    training = module.training
    module.eval()
    rows = [module(turn(batch)).float().cpu().numpy() for batch, _ in in_order(pictures, view, device)]
    module.train(training)
    return np.concatenate(rows)


def as_fitted(recipe: OwnPictures) -> OwnPictures:
    """The recipe by which `fit_last_layer` trains: with the log prior in place of class weights and augmentation."""
    return dataclasses.replace(recipe, augment="none", class_weights="none",
                               loss="balanced-softmax" if recipe.balances else recipe.loss)
