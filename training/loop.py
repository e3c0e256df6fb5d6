"""The training loop: stage 1 plain, stage 2 re-weighted and augmented; read it top to bottom.

Nothing random lives outside (seed, epoch, step): order, crops and meta batches are computed from them, so a run
that was stopped anywhere goes on to the same bits.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from training import checkpoints
from training.covariance import LearnedCovariance, RunningCovariance
from training.datasets import LongTailed, Split
from training.errors import DivergenceError, Interrupted, TrainingError
from training.losses import HeadLoss, class_balanced_weights
from training.meta import StepResult, isda_step, metasaug_step, plain_step
from training.metrics import DETAILS, Tally
from training.recipes import Recipe
from training.tensorboard_log import TensorBoardLog
from zoo.architectures import create
from zoo.labels import assign_groups

# Streams of randomness; each draw is np.random.default_rng([seed, epoch, STREAM, ...]).
ORDER, CROPS, META = 0, 1, 2


# ---- batches ----


class Batches:
    """Augmented, normalised batches of a split that is in memory, as functions of (seed, epoch, step).

    Augmentation is that of the CIFAR papers: reflect-pad by an eighth, random crop, random mirror.
    """

    def __init__(self, split: Split, data: LongTailed, seed: int, batch_size: int, device: torch.device):
        height = split.pictures.shape[1]
        self.padding = height // 8
        pad = (self.padding, self.padding)
        self.padded = np.pad(split.pictures, ((0, 0), pad, pad, (0, 0)), mode="reflect")
        self.size = split.pictures.shape[1:3]
        self.labels = split.labels
        self.seed, self.device = seed, device
        self.batch_size = min(batch_size, len(split))
        self.mean, self.std = _as_channels(data.mean, device), _as_channels(data.std, device)
        # A last batch of one picture has no batch statistics: it is left out.
        self.steps = len(split) // self.batch_size + (len(split) % self.batch_size > 1)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each picture once, in an order of its own; `first_step` on."""
        order = np.random.default_rng([self.seed, epoch, ORDER]).permutation(len(self.labels))
        crops = self._draw_crops(np.random.default_rng([self.seed, epoch, CROPS]), len(self.labels))
        for step in range(first_step, self.steps):
            at = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield self._batch(at, crops[at])

    def meta_batch(self, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole batches only, the set gone through in a new order each time it is used up."""
        turns = len(self.labels) // self.batch_size
        turn, part = divmod(step, turns)
        rng = np.random.default_rng([self.seed, epoch, META, turn])
        at = rng.permutation(len(self.labels))[part * self.batch_size : (part + 1) * self.batch_size]
        crops = self._draw_crops(rng, len(self.labels))
        return self._batch(at, crops[at])

    def _draw_crops(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """(n, 3): top, left, mirrored."""
        return np.stack([rng.integers(0, 2 * self.padding + 1, n), rng.integers(0, 2 * self.padding + 1, n),
                         rng.integers(0, 2, n)], axis=1)

    def _batch(self, at: np.ndarray, crops: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = self.size
        cut = [
            self.padded[i, top : top + height, left : left + width][:, :: -1 if mirrored else 1]
            for i, (top, left, mirrored) in zip(at, crops, strict=True)
        ]
        pictures = _normalised(np.stack(cut), self.mean, self.std, self.device)
        return pictures, torch.from_numpy(self.labels[at]).to(self.device)


def _as_channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def _normalised(pictures: np.ndarray, mean: torch.Tensor, std: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W), channels last in memory: 1.6 x faster on a CPU."""
    nchw = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2)
    return ((nchw.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def evaluate(
    module: nn.Module, split: Split, data: LongTailed, groups: tuple[str, ...], device: torch.device,
    prior: str | None = None,
) -> dict:
    """Test results of the module as it stands; see training.metrics.Tally."""
    mean, std = _as_channels(data.mean, device), _as_channels(data.std, device)
    module.eval()
    tally = Tally(data.label_names, data.class_counts, groups, prior)
    with torch.no_grad():
        for i in range(0, len(split), 500):
            logits = module(_normalised(split.pictures[i : i + 500], mean, std, device))
            tally.add(logits.float().cpu().numpy(), split.labels[i : i + 500])
    module.train()
    return tally.results()


# ---- state ----


@dataclass
class State:
    """All that a run carries from one step to the next."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    covariance: RunningCovariance
    learned: LearnedCovariance
    epoch: int = 0  # the epoch that is running, from 0
    step: int = 0  # the next step in it
    seconds: float = 0.0
    log_bytes: int = 0  # length of the log when the state was saved
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch, for its log line

    def to_dict(self, recipe: Recipe) -> dict:
        return {
            "format": 1, "recipe": recipe.to_dict(), "stage1_key": recipe.stage1_key(),
            "module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(),
            "covariance": self.covariance.state_dict(), "learned": self.learned.state_dict(),
            "epoch": self.epoch, "step": self.step, "seconds": self.seconds, "log_bytes": self.log_bytes,
            "sums": dict(self.sums),
        }

    def load_dict(self, saved: dict) -> None:
        self.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.covariance.load_state_dict(saved["covariance"])
        self.learned.load_state_dict(saved["learned"])
        for name in ("epoch", "step", "seconds", "log_bytes", "sums"):
            setattr(self, name, saved[name])


def start(recipe: Recipe, num_classes: int, device: torch.device) -> State:
    torch.manual_seed(recipe.seed)
    module = create(recipe.architecture, num_classes, recipe.cosine_scale).to(device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), recipe.lr, recipe.momentum, nesterov=recipe.momentum > 0,
                                weight_decay=recipe.weight_decay)
    width: int = module.get_classifier().in_features  # type: ignore[operator, union-attr]
    covariance = RunningCovariance(num_classes, width, recipe.covariance, device=device)
    return State(module, optimizer, covariance, LearnedCovariance(covariance))


# ---- the loop ----


@dataclass(frozen=True)
class Stage:
    """What one of the two stages trains on and against."""

    batches: Batches
    loss: HeadLoss
    weights: torch.Tensor | None


def data_of_stage(recipe: Recipe, data: LongTailed, stage: Literal[1, 2]) -> LongTailed:
    joined = {"never": (), "stage2": (2,), "always": (1, 2)}[recipe.meta_in_training]
    return data.with_meta_in_training() if stage in joined else data


def _stage(recipe: Recipe, data: LongTailed, number: Literal[1, 2], device: torch.device) -> Stage:
    data = data_of_stage(recipe, data, number)
    loss = HeadLoss(recipe.first_loss if number == 1 else recipe.loss, data.class_counts, gamma=recipe.gamma,
                    max_margin=recipe.max_margin, scale=recipe.scale, tau=recipe.tau)
    weighted = number == 2 and recipe.weighted
    return Stage(Batches(data.train, data, recipe.seed, recipe.batch_size, device), loss,  # type: ignore[arg-type]
                 class_balanced_weights(data.class_counts, recipe.beta).to(device) if weighted else None)


def run(
    recipe: Recipe,
    data: LongTailed,
    folder: Path,
    device: torch.device,
    resume: bool = False,
    stage1: Path | None = None,
    evaluate_every: int = 10,
    save_every: int = 1,
    tensorboard: bool = False,
    on_progress: Callable[[State], None] | None = None,
) -> tuple[State, dict]:
    """Train from the newest checkpoint in `folder` (resume), from a shared stage 1, or from nothing.

    folder          run folder: log.jsonl, checkpoints/, stage1/
    evaluate_every  epochs between looks at the test set, for the log only; the last epoch is always looked at
    save_every      epochs between checkpoints; SIGINT and SIGTERM save at once
    tensorboard     keep the log in `folder`/tensorboard as well
    Returns the state after the last epoch and its test results. Raises TrainingError, DivergenceError before an
    update that would spread NaN, Interrupted once the state is saved.
    """
    final = data_of_stage(recipe, data, 2)
    groups, _ = assign_groups(final.class_counts)
    state = start(recipe, len(data.label_names), device)
    _find_start(recipe, state, folder, device, resume, stage1)
    stages = {number: _stage(recipe, data, number, device) for number in (1, 2)}
    steps = [stages[1 + (epoch >= recipe.stage2_epoch)].batches.steps for epoch in range(recipe.epochs)]
    meta_batches = Batches(data.meta, data, recipe.seed, recipe.batch_size, device)  # type: ignore[arg-type]
    results: dict = {}

    def save_state() -> None:
        checkpoints.save(folder / "checkpoints", state.to_dict(recipe), state.epoch, state.step)

    with (
        _stop_signals() as stopped,
        Log(folder / "log.jsonl", state.log_bytes, folder / "tensorboard" if tensorboard else None) as log,
        tqdm(total=sum(steps), initial=sum(steps[: state.epoch]) + state.step, unit="step", dynamic_ncols=True) as bar,
    ):
        while state.epoch < recipe.epochs:
            in_stage2 = state.epoch >= recipe.stage2_epoch
            stage = stages[1 + in_stage2]
            for group in state.optimizer.param_groups:
                group["lr"] = recipe.lr_at(state.epoch)
            for pictures, labels in stage.batches.epoch(state.epoch, state.step):
                began = time.monotonic()
                strength = recipe.strength_at(state.epoch)
                try:
                    if in_stage2 and recipe.augment == "metasaug":
                        result = metasaug_step(
                            state.module, pictures, labels, *meta_batches.meta_batch(state.epoch, state.step),
                            state.learned, stage.loss, strength=strength, inner_rate=_inner_rate(recipe, state.epoch),
                            meta_rate=recipe.meta_rate, lookahead=recipe.lookahead, fidelity=recipe.fidelity,
                            class_weights=stage.weights,
                        )
                    elif in_stage2 and recipe.augment == "isda":
                        result = isda_step(state.module, pictures, labels, state.covariance, stage.loss, strength,
                                           stage.weights)
                    else:
                        result = plain_step(state.module, pictures, labels, stage.loss, stage.weights)
                except DivergenceError as error:
                    where = f"epoch {state.epoch + 1}, step {state.step + 1}"
                    raise DivergenceError(f"{where}: {error} Stopped before the update; the last checkpoint is good. "
                                          "Try a smaller --lr or --strength.") from error
                state.optimizer.step()
                state.step += 1
                state.seconds += time.monotonic() - began
                _add(state.sums, _figures(result, labels), len(labels))
                bar.update()
                seen = state.sums["pictures"]
                bar.set_postfix_str(f"epoch {state.epoch + 1}/{recipe.epochs} loss {state.sums['loss'] / seen:.3f} "
                                    f"error {state.sums['wrong'] / seen:.1%}", refresh=False)
                if on_progress is not None:
                    on_progress(state)
                if stopped and state.step < stage.batches.steps:
                    save_state()
                    raise Interrupted(f"stopped in epoch {state.epoch + 1}, after step {state.step} of "
                                      f"{stage.batches.steps}; nothing is lost: the same command with --resume goes "
                                      "on.", 128 + stopped[0])
            line = _log_line(recipe, state)
            state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
            if state.epoch % evaluate_every == 0 or state.epoch == recipe.epochs:
                results = evaluate(state.module, data.test, final, groups, device, recipe.implicit_prior)  # type: ignore[arg-type]
                line["test"] = {k: v for k, v in results.items() if k not in DETAILS}
            state.log_bytes = log.write(line)
            if state.epoch == recipe.stage2_epoch:
                checkpoints.save(folder / "stage1", state.to_dict(recipe), state.epoch, 0, keep=1)
            if state.epoch % save_every == 0 or state.epoch == recipe.epochs or stopped:
                save_state()
            if stopped and state.epoch < recipe.epochs:
                raise Interrupted(f"stopped after epoch {state.epoch} of {recipe.epochs}; nothing is lost: the same "
                                  "command with --resume goes on.", 128 + stopped[0])
    if not results:  # resumed after the last epoch
        results = evaluate(state.module, data.test, final, groups, device, recipe.implicit_prior)  # type: ignore[arg-type]
    return state, {"split": "test", "epoch": state.epoch, **results}


def _figures(result: StepResult, labels: torch.Tensor) -> dict[str, float]:
    """What a step says for the log. `shift` is |S' - S| / |S|, `effect` what that change did to the loss."""
    figures = {"loss": result.loss.item(), "wrong": (result.logits_NC.argmax(1) != labels).sum().item()}
    if result.meta_loss is not None and result.loss_before is not None and result.shift is not None:
        figures |= {"meta_loss": result.meta_loss.item(), "shift": result.shift.item(),
                    "effect": (result.loss - result.loss_before).item()}
    return figures


def _inner_rate(recipe: Recipe, epoch: int) -> float:
    """Alpha is the current learning rate; in the authors' code it lags the schedule by one epoch."""
    return recipe.lr_at(max(epoch - 1, 0) if recipe.fidelity == "reference" else epoch)


def _add(sums: dict[str, float], figures: dict[str, float], pictures: int) -> None:
    """Sums over the epoch; every figure but the count of wrong ones is a mean over the batch."""
    sums["pictures"] = sums.get("pictures", 0) + pictures
    for name, value in figures.items():
        sums[name] = sums.get(name, 0) + (value if name == "wrong" else value * pictures)


def _log_line(recipe: Recipe, state: State) -> dict:
    seen = state.sums["pictures"]
    means = {name: value / seen for name, value in state.sums.items() if name not in ("pictures", "wrong")}
    return {"epoch": state.epoch + 1, "stage": 2 if state.epoch >= recipe.stage2_epoch else 1,
            "lr": recipe.lr_at(state.epoch), **means, "train_error": state.sums["wrong"] / seen,
            "seconds": round(state.seconds, 1)}


def _find_start(
    recipe: Recipe, state: State, folder: Path, device: torch.device, resume: bool, stage1: Path | None
) -> None:
    found = checkpoints.load_newest(folder / "checkpoints", device)
    if found is not None:
        path, saved = found
        if not resume:
            raise TrainingError(f"{folder} already holds a run (epoch {saved['epoch']}). Go on with --resume, or "
                                "choose another --out.")
        differing = sorted(k for k, v in recipe.to_dict().items() if saved["recipe"].get(k) != v)
        if differing:
            raise TrainingError(f"{folder} was trained with other settings: "
                                + ", ".join(f"{k} {saved['recipe'].get(k)}" for k in differing)
                                + ". Resume with those, or choose another --out.")
        state.load_dict(saved)
    elif stage1 is not None:
        newest = (stage1, checkpoints.load(stage1, device)) if stage1.is_file() else checkpoints.load_newest(
            stage1 / "stage1" if (stage1 / "stage1").is_dir() else stage1, device)
        if newest is None:
            raise TrainingError(f"--stage1 {stage1}: no stage-1 checkpoint there. Name a run folder whose stage 1 "
                                "has ended.")
        path, saved = newest
        if saved["stage1_key"] != recipe.stage1_key() or saved["epoch"] != recipe.stage2_epoch or saved["step"] != 0:
            ours, theirs = json.loads(recipe.stage1_key()), json.loads(saved["stage1_key"])
            differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            raise TrainingError(f"--stage1 {path}: another stage 1 than this recipe's ("
                                + (", ".join(f"{k} {theirs.get(k)}, not {ours.get(k)}" for k in differing)
                                   or f"saved at epoch {saved['epoch']}") + ").")
        # Only what stage 1 made is taken over; estimates of stage 2 and the log start empty.
        state.module.load_state_dict(saved["module"])
        state.optimizer.load_state_dict(saved["optimizer"])
        state.epoch, state.seconds = saved["epoch"], saved["seconds"]


class Log:
    """JSON lines; on resume the lines that the checkpoint does not know are cut off, so none is there twice.

    tensorboard   a folder where TensorBoard finds the same numbers, or None
    """

    def __init__(self, path: Path, length: int, tensorboard: Path | None = None):
        self.path, self.length, self.tensorboard = path, length, tensorboard
        self.board: TensorBoardLog | None = None

    def __enter__(self) -> "Log":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        os.truncate(self.path, min(self.length, self.path.stat().st_size))
        if self.tensorboard is not None:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.board = TensorBoardLog(self.tensorboard, map(json.loads, lines))
        return self

    def __exit__(self, *_) -> None:
        if self.board is not None:
            self.board.close()

    def write(self, line: dict) -> int:
        """Append a line; returns the length of the log with it."""
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            self.board.write(line)
        return self.path.stat().st_size


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; the second one has its usual effect at once."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def note(number, _frame):
        received.append(number)
        for each, usual in previous.items():
            signal.signal(each, usual)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: there is nobody to press Ctrl-C
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
