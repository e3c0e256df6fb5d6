"""A run on your own pictures from a pretrained start: a first answer in minutes, fine-tuning, the better of the two.

1. The start is frozen. Features of the pictures are computed once, and a last layer is fitted to them: the first
   model, with its report. If there are many pictures, a sample comes before the rest, for an answer in minutes.
2. training.run.loop fine-tunes the network from there. Each test may leave a better model.
3. The better model stays, judged on pictures of the meta set that neither was trained on. These pictures are trained
   on last.

If too few pictures are held out to compare the two, or with --freeze all, the first model is the result.

Shape suffix: N pictures.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data.datasets import LongTailed
from training.data.splits import SMALL_FOR_A_WHILE
from training.errors import Interrupted
from training.recipes import OwnPictures
from training.report.calibrated import measured
from training.report.page import report_of_run
from training.run import checkpoints, loop
from training.run.first_answer import FEW, FirstAnswer, as_fitted, logits_of, mean_recall
from training.run.review import confused, review, write_review
from training.run.run_folder import write_model
from training.run.stages import data_of_stage, view_of
from training.run.state import State
from zoo.calibration import Calibration, fit_calibration
from zoo.files import write_atomically
from zoo.labels import assign_groups
from zoo.model_folder import ModelFolder
from zoo.predictor import Classes

# Pictures times epochs. Above, fine-tuning takes minutes, so the first answer gets its ONNX and card at once.
LONG = 10_000


@dataclass
class Scores:
    """Mean accuracy over classes on held-out pictures, kept in the run folder.

    frozen       of the first answer; fine_tuned: at the last test before these pictures are trained on
    best, kept   the best of all tests, and the epoch of the model that is kept; None: the first answer
    calibration  of the fine-tuned model, fitted to these pictures at the same test
    """

    frozen: float | None = None
    fine_tuned: float | None = None
    best: float | None = None
    kept: int | None = None
    calibration: dict[str, Any] | None = None

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
        self.model, self.held_out = folder / "model", data.held_out

    def train(self) -> dict:
        """Keep the best model so far in `folder`/model; returns its test results.

        A resumed run has its first answer already.
        """
        last_layer = None
        newest = checkpoints.load_newest(self.folder / "checkpoints")
        if newest is None:
            self.scores = Scores()
            last_layer = self.answer_first()
        else:
            self.scores = Scores.load(self.folder)
            self.recipe = self.recipe.with_choices(newest[1]["recipe"])
        self.final = data_of_stage(self.recipe, self.data, 2)
        if self.recipe.freeze == "all":
            return ModelFolder(self.model).results or {}
        if not self.fine_tunes:
            print(f"Only {len(self.held_out)} pictures are held out, too few to tell whether fine-tuning improves the "
                  "model, so the first answer is the model. For fine-tuning, collect at least "
                  f"{SMALL_FOR_A_WHILE} training pictures in most classes, or give --meta.")
            return ModelFolder(self.model).results or {}
        try:
            loop.run(self.recipe, self.data, self.folder, self.device, on_test=self.on_test, last_layer=last_layer,
                     **self.how)
        except Interrupted as interrupted:
            interrupted.model = self.model
            raise
        self.say_which()
        return ModelFolder(self.model).results or {}

    @property
    def fine_tunes(self) -> bool:
        return self.recipe.freeze != "all" and len(self.held_out) >= FEW

    def answer_first(self) -> dict[str, Tensor]:
        """Write the complete first model; returns the last layer that fine-tuning begins with."""
        began = time.monotonic()
        first = FirstAnswer(self.recipe, self.data, self.folder, self.device, self.how.get("workers", 0),
                            self.how.get("features"), sample=self.fine_tunes and self.recipe.balances)
        self.recipe = first.with_flips()
        follows = (f" Fine-tuning follows, {self.recipe.epochs} epochs; Ctrl-C keeps the best model so far."
                   if self.fine_tunes else "")
        sampled = len(first.rest) > 0
        results = self.leave_first(first, began)
        if sampled:
            report_of_run(self.folder, results)
            print(f"{self.model}: first answer after {minutes_since(began)}, macro error {results['macro_error']:.1%}, "
                  f"ready to use. It has seen {len(first.seen_N):,} of {len(first.joined.train):,} pictures; the "
                  "others follow.")
            try:
                first.see_rest()
                results = self.leave_first(first, began)
            except KeyboardInterrupt:
                stopped = Interrupted("Stopped before fine-tuning. The same command with --resume continues.", 130)
                stopped.model = self.model
                raise stopped from None
        write_review(self.folder, review(first.features_NA, first.joined, first.fitted))
        report_of_run(self.folder, results)
        print(f"{self.model}: {'the same from all pictures' if sampled else 'first answer'} after "
              f"{minutes_since(began)}, macro error {results['macro_error']:.1%}, ready to use.{follows}")
        return first.last_layer

    def leave_first(self, first: FirstAnswer, began: float) -> dict[str, Any]:
        """Write the model of the first answer as it is now, ONNX included if fine-tuning takes long."""
        results, logits_NC = first.on_all()
        self.scores = Scores(first.score, None, first.score)
        self.scores.save(self.folder)
        first.state.seconds = time.monotonic() - began
        fitted = as_fitted(self.recipe)
        of = f" of {len(first.seen_N):,} training pictures" if len(first.rest) else ""
        self.leave(fitted, first.joined, first.state, results, logits_NC, self.calibration(fitted, first.held_NC),
                   f"A last layer on the frozen features{of} of the {self.recipe.start} start")
        if self.fine_tunes and self.recipe.epochs * len(self.data.train) > LONG:
            self.export()
        return results

    def on_test(self, state: State, results: dict, logits_NC: np.ndarray) -> None:
        """Keep the model if it is the best so far; once it trains on the meta set, if it was the best before that."""
        scores = self.scores
        if self.recipe.meta_in_training != "stage2" or state.epoch < self.recipe.stage2_epoch:
            held_NC = logits_of(state.module, self.held_out, view_of(self.recipe, self.data), self.device)
            scores.fine_tuned = score = mean_recall(held_NC, self.held_out.labels)
            scores.calibration = self.calibration(self.recipe, held_NC)
            ahead = scores.best is None or score >= scores.best
            scores.best = score if ahead else scores.best
        else:
            ahead = scores.fine_tuned is None or scores.frozen is None or scores.fine_tuned >= scores.frozen
        scores.kept = state.epoch + 1 if ahead else scores.kept
        scores.save(self.folder)
        if ahead:
            self.leave(self.recipe, self.final, state, {"split": "test", "epoch": state.epoch + 1, **results},
                       logits_NC, scores.calibration)
            report_of_run(self.folder, results)

    def leave(self, recipe: OwnPictures, data: LongTailed, state: State, results: dict, logits_NC: np.ndarray,
              calibration: dict[str, Any] | None, schedule: str | None = None) -> None:
        """Write the model and its confusions. logits_NC: of the test set; schedule: in words; None: the recipe's."""
        if calibration is not None:
            groups, _ = assign_groups(data.class_counts)
            fitted = Calibration.fitted(calibration, groups)
            classes = Classes(data.label_names, groups, data.class_counts, np.ones(len(groups), bool),
                              np.array(recipe.implicit_prior(data.class_counts)), fitted)
            calibration = {**calibration, "measured": measured(classes, logits_NC, data.test.labels)}
        write_model(self.model, self.name, recipe, data, state, results, schedule=schedule, calibration=calibration)
        write_review(self.folder, {"confused": confused(self.data.test, logits_NC.argmax(1), data.label_names)})

    def calibration(self, recipe: OwnPictures, held_NC: np.ndarray) -> dict[str, Any] | None:
        """Fitted to the logits of the held-out pictures; None if they are too few."""
        labels_N = self.held_out.labels
        if len(labels_N) < FEW or len(np.unique(labels_N)) < 2:
            return None
        return fit_calibration(held_NC, labels_N, np.array(recipe.implicit_prior(self.data.class_counts)),
                               f"{self.data.source}: held-out pictures, before the model was trained on them too")

    def export(self) -> None:
        """Add ONNX and card, in a separate process: training does not import export."""
        done = subprocess.run([sys.executable, "-m", "export", str(self.model)], check=False, capture_output=True,
                              text=True)
        if done.returncode:
            print(f"{self.model} has no ONNX yet: {done.stderr.strip()[-300:]} `metasaug export {self.model}` adds it.")

    def say_which(self) -> None:
        frozen, tuned = self.scores.frozen, self.scores.fine_tuned
        if frozen is not None and tuned is not None:
            kept = "first answer" if self.scores.kept is None else f"fine-tuned model of epoch {self.scores.kept}"
            print(f"Mean accuracy over classes on held-out pictures: first answer {frozen:.1%}, fine-tuned {tuned:.1%} "
                  f"before it trained on them. The {kept} is kept.")


def minutes_since(began: float) -> str:
    return f"{(time.monotonic() - began) / 60:.1f} minutes"
