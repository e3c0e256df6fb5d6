"""The training loop: stage 1 plain, stage 2 re-weighted and augmented; read it top to bottom.

Nothing random lives outside (seed, epoch, step): order, crops and meta batches are computed from them, so a run
that was stopped anywhere goes on to the same bits.
"""

import dataclasses
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from training.data.batches import Batches, View, at_once, fits_in_memory, hold, in_order
from training.data.datasets import LongTailed, PictureFiles, Split, listed
from training.errors import DivergenceError, Interrupted, TrainingError
from training.method.closed_form import SUPPORTED_LOSSES, frozen_head_step
from training.method.covariance import LearnedCovariance, RunningCovariance
from training.method.heldout import HeldOut, heldout_step
from training.method.losses import HeadLoss, class_balanced_weights
from training.method.metasaug import StepResult, check_finite, isda_step, metasaug_step, plain_step
from training.network.derivatives import BatchFeatures, Compute, GradientScale
from training.network.distributed import ALONE, Processes
from training.network.feature_cache import CachedBatches, FeatureCache, Head
from training.network.start_weights import find_backbone, load_backbone, load_pretrained
from training.recipes import Loss, Recipe
from training.report.metrics import DETAILS, Tally
from training.run import checkpoints
from training.run.tensorboard_log import TensorBoardLog
from zoo.architectures import classifier_name, create
from zoo.labels import assign_groups

# ---- state ----


@dataclass
class State:
    """All that a run carries from one step to the next."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    covariance: RunningCovariance
    learned: LearnedCovariance | HeldOut
    scale: GradientScale = field(default_factory=GradientScale)  # of float16's gradients
    epoch: int = 0  # the epoch that is running, from 0
    step: int = 0  # the next step in it
    seconds: float = 0.0
    log_bytes: int = 0  # length of the log when the state was saved
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch, for its log line

    def check(self) -> None:
        """DivergenceError where a number that a checkpoint would keep is NaN or infinite."""
        momenta = _floats(one.get("momentum_buffer") for one in self.optimizer.state.values())
        covariances = [*self.covariance.state_dict().values(), *self.learned.state_dict().values()]
        try:
            check_finite(weight=_floats(self.module.state_dict().values()), covariance=_floats(covariances))
            if momenta:
                check_finite(momentum=momenta)
        except DivergenceError as error:
            raise DivergenceError(f"epoch {self.epoch + 1}, step {self.step}: {error} Not saved; the last checkpoint "
                                  "is good. Try a smaller --lr or --strength.") from error

    def level(self, processes: Processes) -> None:
        """The same bits in every process; on GPUs, what each computed alike may differ in the last ones."""
        momenta = _floats(one.get("momentum_buffer") for one in self.optimizer.state.values())
        processes.follow([*self.module.state_dict().values(), *momenta, *self.covariance.state_dict().values(),
                          *self.learned.state_dict().values()])

    def to_dict(self, recipe: Recipe, data: LongTailed) -> dict:
        return {
            "format": 1, "recipe": recipe.to_dict(), "stage1_key": recipe.stage1_key(), "data": data.identity(),
            "module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(),
            "covariance": self.covariance.state_dict(), "learned": self.learned.state_dict(),
            "scale": self.scale.state_dict(), "epoch": self.epoch, "step": self.step, "seconds": self.seconds,
            "log_bytes": self.log_bytes,
            "sums": dict(self.sums),
        }

    def load_dict(self, saved: dict) -> None:
        self.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.covariance.load_state_dict(saved["covariance"])
        self.learned.load_state_dict(saved["learned"])
        self.scale.load_state_dict(saved.get("scale", self.scale.state_dict()))  # of before there was one
        for name in ("epoch", "step", "seconds", "log_bytes", "sums"):
            setattr(self, name, saved[name])


def _floats(values: Iterable[Any]) -> list[torch.Tensor]:
    return [v for v in values if torch.is_tensor(v) and v.is_floating_point()]


def start(recipe: Recipe, data: LongTailed, device: torch.device) -> State:
    """data   of stage 2"""
    torch.manual_seed(recipe.seed)
    num_classes = len(data.label_names)
    module = create(recipe.architecture, num_classes, recipe.cosine_scale).to(device)
    if recipe.pretrained is not None:
        load_pretrained(module, recipe.pretrained)
    if recipe.backbone is not None:
        load_backbone(module, find_backbone(recipe.backbone), recipe.last_layer == "ready")
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), recipe.lr, recipe.momentum, nesterov=recipe.momentum > 0,
                                weight_decay=recipe.weight_decay)
    width: int = module.get_classifier().in_features  # type: ignore[operator, union-attr]
    kind = recipe.covariance if recipe.augment != "none" else "diagonal"  # not used then: the smaller one
    covariance = RunningCovariance(num_classes, width, kind, device=device)
    if recipe.augment == "heldout":
        held = np.bincount(data.meta.labels, minlength=num_classes).tolist()
        return State(module, optimizer, covariance, HeldOut(covariance, held))
    return State(module, optimizer, covariance, LearnedCovariance(covariance))


# ---- the loop ----


@dataclass(frozen=True)
class Stage:
    """What one of the two stages trains on and against."""

    batches: Batches
    meta: Batches
    loss: HeadLoss
    weights: torch.Tensor | None
    head: Head | None = None  # what is trained where the batches are of features


def data_of_stage(recipe: Recipe, data: LongTailed, stage: Literal[1, 2]) -> LongTailed:
    """What the stage trains on; its meta pictures are those that S is learned from."""
    joined = {"never": (), "stage2": (2,), "always": (1, 2)}[recipe.meta_in_training]
    if recipe.augment == "heldout":
        data = data.with_most_of_meta_in_training() if stage in joined else data
        return dataclasses.replace(data, meta=data.held_out)
    return data.with_meta_in_training() if stage in joined else data


def view_of(recipe: Recipe, data: LongTailed) -> View:
    """How the recipe shows the network these pictures."""
    if recipe.input_size is not None:
        size = (recipe.input_size, recipe.input_size)
    elif isinstance(data.train, Split):
        size = data.train.pictures.shape[1:3]
    else:
        raise TrainingError("--input-size is needed: these pictures are of many sizes.")
    return View(size, recipe.mean or data.mean, recipe.std or data.std, recipe.crop_mode, recipe.crop_pct,
                recipe.crops, recipe.flips, recipe.color_jitter, recipe.interpolation)


def _stages(
    recipe: Recipe, data: LongTailed, view: View, device: torch.device, workers: int, processes: Processes
) -> tuple[Stage, Stage]:
    """What both stages train on; pictures that fit are read into memory, once."""
    cached = recipe.cache_features and recipe.stands_still(in_stage2=False)
    in_memory = not cached and fits_in_memory(view, len(data.train) + len(data.meta))
    first, second = (data_of_stage(recipe, data, number) for number in (1, 2))
    train, meta, second_train = first.train, second.meta, second.train
    if in_memory:
        train, meta = (hold(pictures, view, workers) for pictures in (first.train, second.meta))
        second_train = train if second.train is first.train else hold(second.train, view, workers)

    def stage(pictures: Split | PictureFiles, counts: tuple[int, ...], loss: Loss, size: int, weighted: bool) -> Stage:
        return Stage(
            Batches(pictures, view, recipe.seed, size, device, workers, processes),
            Batches(meta, view, recipe.seed, size, device, workers, processes),
            HeadLoss(loss, counts, gamma=recipe.gamma, max_margin=recipe.max_margin, scale=recipe.scale,
                     tau=recipe.tau),
            _placed(class_balanced_weights(counts, recipe.beta), device) if weighted else None)

    return (stage(train, first.class_counts, recipe.first_loss, recipe.batch_size, False),
            stage(second_train, second.class_counts, recipe.loss, recipe.stage2_batch_size or recipe.batch_size,
                  recipe.weighted))


def _placed(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, where MPS has no float64."""
    return (values.float() if device.type == "mps" else values).to(device)


def _on_features(
    stage: Stage, cache: FeatureCache, data: LongTailed, module: nn.Module, before_each: Callable[[], None]
) -> Stage:
    """The same stage on cached features, which are computed first where they are not there yet.

    data   of the stage: its pictures as they lie on the disk, which are not held in memory for it
    """
    last: nn.Linear = module.get_classifier()  # type: ignore[operator, assignment]

    def cached(kind: Literal["train", "meta"], pictures: Split | PictureFiles, batches: Batches) -> Batches:
        return CachedBatches(pictures, cache.of(kind, pictures, module, before_each), batches.view, batches.seed,
                             batches.batch_size, batches.device, last.weight.dtype, batches.processes)

    return dataclasses.replace(stage, batches=cached("train", data.train, stage.batches),
                               meta=cached("meta", data.meta, stage.meta), head=Head(last))


def check(recipe: Recipe, data: LongTailed) -> None:
    """TrainingError for data that this recipe cannot train on, naming the classes."""
    counts = np.array(data.class_counts)

    def named(classes: np.ndarray) -> str:
        return listed([data.label_names[c] for c in classes], ", ")

    if len(counts) < 2:
        raise TrainingError("There is one class only: nothing to tell apart.")
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise TrainingError(f"{len(empty)} classes have no training picture: {named(empty)}.")
    lacking = np.setdiff1d(np.arange(len(counts)), data.meta.labels)
    if recipe.augment == "metasaug" and len(lacking):
        raise TrainingError(f"{len(lacking)} classes have no picture in the meta set, which MetaSAug learns from: "
                            f"{named(lacking)}. Give each one at least, or train with --augment isda or none.")
    if recipe.augment == "heldout" and len(data_of_stage(recipe, data, 2).meta) < 2:  # batch norm needs two
        raise TrainingError("Hardly a class can spare a picture from training, and --augment heldout measures on such: "
                            "train with --augment metasaug, isda or none.")


def run(
    recipe: Recipe,
    data: LongTailed,
    folder: Path,
    device: torch.device,
    resume: bool = False,
    stage1: Path | None = None,
    evaluate_every: int = 10,
    save_every: int = 1,
    save_minutes: float = 10,
    workers: int = 0,
    tensorboard: bool = False,
    deterministic: bool = True,
    features: Path | None = None,
    on_progress: Callable[[State], None] | None = None,
    processes: Processes = ALONE,
) -> tuple[State, dict]:
    """Train from the newest checkpoint in `folder` (resume), from a shared stage 1, or from nothing.

    folder          run folder: log.jsonl, checkpoints/, stage1/
    evaluate_every  epochs between looks at the test set, for the log only; the last epoch is always looked at
    save_every      epochs between checkpoints; SIGINT, SIGTERM and SIGHUP save at once
    save_minutes    minutes after which a checkpoint is written within an epoch; 0: only at its end
    workers         processes that decode pictures; their number changes no bit of the result
    tensorboard     keep the log in `folder`/tensorboard as well
    deterministic   on CUDA: only kernels that give the same bits each time, else a resumed run differs in the last ones
    features        folder of cached features (--cache-features), which several runs may share; `folder`/features
    processes       those that train together: rank 0 writes, all return the same
    Returns the state after the last epoch and its test results. Raises TrainingError, DivergenceError before an
    update that would spread NaN, Interrupted once the state is saved.
    """
    if deterministic and device.type == "cuda":
        _same_bits_each_time()
    final = data_of_stage(recipe, data, 2)
    groups, _ = assign_groups(final.class_counts)
    state = start(recipe, final, device)
    compute = Compute(processes, recipe.precision, recipe.accumulate, recipe.compile, state.scale)
    _find_start(recipe, data, state, folder, resume, stage1, processes)
    view = view_of(recipe, data)
    _try(state.module, recipe, view, device)
    stages = _stages(recipe, data, view, device, workers, processes)
    processes.wait()
    steps = [stages[epoch >= recipe.stage2_epoch].batches.steps for epoch in range(recipe.epochs)]
    cache = None
    if recipe.cache_features:
        cache = FeatureCache(features or folder / "features", recipe.cache_features, view, recipe.seed, device, workers,
                             compute)
        _check_disk(recipe, data, cache, state)
    on_features: dict[bool, Stage] = {}
    results: dict = {}

    saved_at = time.monotonic()

    def save_state(in_step: bool = True) -> None:
        nonlocal saved_at
        if in_step:
            state.level(processes)
        state.check()
        if processes.first:
            checkpoints.save(folder / "checkpoints", state.to_dict(recipe, data), state.epoch, state.step)
        if in_step:
            processes.wait()  # a large state may take longer than a process may hang
        saved_at = time.monotonic()

    def leave_if_stopped(in_step: bool = True) -> None:
        """in_step: all processes are here; else each decides for itself, between epochs, where all have the same."""
        number = stopped[0] if stopped else 0
        if in_step:
            number = processes.any(number)
        if number:
            save_state(in_step)
            raise Interrupted(f"stopped in epoch {state.epoch + 1}, after step {state.step}; nothing is lost: the same "
                              "command with --resume goes on.", 128 + number)

    def stage_of_epoch(in_stage2: bool) -> Stage:
        if cache is None or not recipe.stands_still(in_stage2):
            return stages[in_stage2]
        if in_stage2 not in on_features:
            began, of_stage = time.monotonic(), data_of_stage(recipe, data, 2 if in_stage2 else 1)
            on_features[in_stage2] = _on_features(stages[in_stage2], cache, of_stage, state.module,
                                                  lambda: leave_if_stopped(False))
            processes.wait()
            state.seconds += time.monotonic() - began
        return on_features[in_stage2]

    def test() -> dict:
        cached = None
        if cache is not None and recipe.stands_still(state.epoch >= recipe.stage2_epoch):
            cached = cache.of("test", final.test, state.module, lambda: leave_if_stopped(False))
            processes.wait()
        return evaluate(state.module, final, view, groups, device, workers, recipe.implicit_prior, leave_if_stopped,
                        cached, processes)

    with (
        _stop_signals() as stopped,
        _death_of_a_worker_told(),
        Log(folder / "log.jsonl" if processes.first else None, state.log_bytes,
            folder / "tensorboard" if tensorboard else None) as log,
        tqdm(total=sum(steps), initial=sum(steps[: state.epoch]) + state.step, unit="step", dynamic_ncols=True,
             disable=not processes.first) as bar,
    ):
        while state.epoch < recipe.epochs:
            leave_if_stopped()
            in_stage2 = state.epoch >= recipe.stage2_epoch
            _set_trained(state.module, recipe, in_stage2)
            stage, last = stage_of_epoch(in_stage2), steps[state.epoch]
            for group in state.optimizer.param_groups:
                group["lr"] = recipe.lr_at(state.epoch)
            with_meta = in_stage2 and recipe.looks_at_meta
            meta = _meta_batches(recipe, stage, state, last) if with_meta else itertools.repeat(None)
            began = time.monotonic()
            for (pictures, labels), meta_batch in zip(stage.batches.epoch(state.epoch, state.step), meta, strict=False):
                torch.manual_seed(_seed_of_step(recipe, state, processes.rank))
                try:
                    result = _step(recipe, state, stage, pictures, labels, meta_batch, compute)
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                        raise
                    raise TrainingError(f"A step of {len(labels)} pictures of {view.size[1]} x {view.size[0]} does not "
                                        f"fit into the memory of {device}: a smaller --batch-size or --input-size, or "
                                        "another --architecture.") from error
                except DivergenceError as error:
                    where = f"epoch {state.epoch + 1}, step {state.step + 1}"
                    raise DivergenceError(f"{where}: {error} Stopped before the update; the last checkpoint is good. "
                                          "Try a smaller --lr or --strength.") from error
                figures = _figures(result, labels)  # before the optimizer's step, which a GPU then takes meanwhile
                state.optimizer.step()
                processes.level(state.module.buffers())
                state.step += 1
                _add(state.sums, figures, len(labels))
                state.seconds, began = state.seconds + time.monotonic() - began, time.monotonic()
                bar.update()
                seen = state.sums["pictures"]
                bar.set_postfix_str(f"epoch {state.epoch + 1}/{recipe.epochs} loss {state.sums['loss'] / seen:.3f} "
                                    f"error {state.sums['wrong'] / seen:.1%}", refresh=False)
                if on_progress is not None:
                    on_progress(state)
                leave_if_stopped()
                due = 0 < save_minutes * 60 <= time.monotonic() - saved_at
                if processes.any(due) and state.step < last:
                    save_state()
            line = _log_line(recipe, state)
            if (state.epoch + 1) % evaluate_every == 0 or state.epoch + 1 == recipe.epochs:
                results = test()
                line["test"] = {k: v for k, v in results.items() if k not in DETAILS}
            state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
            state.log_bytes = log.write(line)
            if state.epoch == recipe.stage2_epoch and processes.first:
                checkpoints.save(folder / "stage1", state.to_dict(recipe, data), state.epoch, 0, keep=1)
            if state.epoch % save_every == 0 or state.epoch == recipe.epochs:
                save_state()
    if not results:  # resumed after the last epoch
        results = test()
    return state, {"split": "test", "epoch": state.epoch, **results}


def _same_bits_each_time() -> None:
    """What CUDA otherwise leaves to chance: the order of atomic additions, cuDNN's and cuBLAS's choice of kernel."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    # Fused attention sums its gradient in any order, unless the line below were to raise instead of warn.
    for fused in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(False)
    torch.use_deterministic_algorithms(True, warn_only=True)  # a network may hold what has no such kernel: it says so
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _check_disk(recipe: Recipe, data: LongTailed, cache: FeatureCache, state: State) -> None:
    """TrainingError, before anything is trained, where the features will not fit onto the disk."""
    from_start = recipe.stands_still(in_stage2=False)
    second = data_of_stage(recipe, data, 2)
    trained_on = [second.train]
    if from_start and recipe.stage2_epoch and recipe.meta_in_training == "stage2":
        trained_on.append(data.train)
    cache.check_disk([*(("train", one) for one in trained_on), ("meta", second.meta), ("test", data.test)],
                     state.module, recipe.stands_still(state.epoch >= recipe.stage2_epoch))


def _meta_batches(recipe: Recipe, stage: Stage, state: State, last: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A meta batch for each step of the epoch; the authors' code for large sets takes the same one every time."""
    if recipe.fidelity == "reference" and recipe.stage2_trains == "classifier":
        return itertools.repeat(next(stage.meta.meta(0, 0, 1)))
    return stage.meta.meta(state.epoch, state.step, last)


def _seed_of_step(recipe: Recipe, state: State, rank: int) -> int:
    """For what torch itself draws in a step (dropout, stochastic depth)."""
    of_rank = [rank] if rank else []
    sequence = np.random.SeedSequence([recipe.seed, state.epoch, state.step, *of_rank])
    return int(sequence.generate_state(1, np.uint64)[0])


def _step(
    recipe: Recipe, state: State, stage: Stage, pictures: torch.Tensor, labels: torch.Tensor,
    meta_batch: tuple[torch.Tensor, torch.Tensor] | None, compute: Compute,
) -> StepResult:
    """One step but for the optimizer's: its gradients are left in `.grad`."""
    module = stage.head or state.module
    in_stage2, strength = state.epoch >= recipe.stage2_epoch, recipe.strength_at(state.epoch)
    if in_stage2 and recipe.augment == "isda":
        return isda_step(module, pictures, labels, state.covariance, stage.loss, strength, stage.weights, compute)
    if meta_batch is None:
        return plain_step(module, pictures, labels, stage.loss, stage.weights, compute)
    if isinstance(state.learned, HeldOut):
        return heldout_step(module, pictures, labels, *meta_batch, state.learned, stage.loss, strength, stage.weights,
                            compute)
    how: dict[str, Any] = {"strength": strength, "inner_rate": _inner_rate(recipe, state.epoch),
                           "meta_rate": recipe.meta_rate, "fidelity": recipe.fidelity, "class_weights": stage.weights}
    if _in_closed_form(recipe):
        features, meta_features = (BatchFeatures(module, x, len(y), compute, graph=False).whole_NA
                                   for x, y in ((pictures, labels), meta_batch))
        return frozen_head_step(module.get_classifier(), features, labels,  # type: ignore[operator]
                                meta_features, meta_batch[1], state.learned, stage.loss, **how)
    return metasaug_step(module, pictures, labels, *meta_batch, state.learned, stage.loss,
                         lookahead=recipe.lookahead, compute=compute, **how)


def _in_closed_form(recipe: Recipe) -> bool:
    return (recipe.stands_still(in_stage2=True) and recipe.covariance == "diagonal"
            and recipe.loss in SUPPORTED_LOSSES)


def _set_trained(module: nn.Module, recipe: Recipe, in_stage2: bool) -> None:
    """Train mode; where only the last layer trains, the rest stands still in eval mode."""
    module.train()
    if recipe.stands_still(in_stage2):
        module.eval().requires_grad_(False)
        module.get_classifier().requires_grad_()  # type: ignore[operator, union-attr]
        module.zero_grad()  # the optimizer passes over what has no gradient


def evaluate(
    module: nn.Module, data: LongTailed, view: View, groups: tuple[str, ...], device: torch.device, workers: int = 0,
    prior: str | None = None, before_each: Callable[[], None] = lambda: None, features_KNA: np.ndarray | None = None,
    processes: Processes = ALONE,
) -> dict:
    """Test results of the module as it stands; see training.report.metrics.Tally. `before_each` batch may end it.

    features_KNA   of the test pictures, where they are cached: the same results without looking at pictures
    processes      each sees its part of every batch, and all return the same results
    """
    was_training = module.training
    module.eval()
    tally, seen = Tally(data.label_names, data.class_counts, groups, prior), 0
    with torch.no_grad():
        net, looks = module, in_order(data.test, view, device, workers, processes)
        if features_KNA is not None:
            net, size = Head(module.get_classifier()), at_once(view)  # type: ignore[operator]
            batches = (features_KNA[0, i : i + size] for i in range(0, len(features_KNA[0]), size))
            looks = ((torch.from_numpy(rows[processes.part(len(rows))].copy()).to(device), len(rows))
                     for rows in batches)
        for pictures, total in looks:
            before_each()
            logits = net(pictures) if len(pictures) else torch.empty(0, len(data.label_names), device=device)
            logits = processes.gather(logits.float(), total)
            tally.add(logits.cpu().numpy(), data.test.labels[seen : seen + total])
            seen += total
    module.train(was_training)
    return tally.results()


def _figures(result: StepResult, labels: torch.Tensor) -> dict[str, float]:
    """What a step says for the log. `shift` is |S' - S| / |S|, `effect` what that change did to the loss."""
    figures = {"loss": result.loss, "wrong": (result.logits_NC.argmax(1) != labels).sum()}
    if result.meta_loss is not None:
        figures["meta_loss"] = result.meta_loss
    if result.loss_before is not None and result.shift is not None:
        figures |= {"shift": result.shift, "effect": result.loss - result.loss_before}
    values = torch.stack([value.to(result.loss.dtype) for value in figures.values()]).tolist()  # one look at the device
    return dict(zip(figures, values, strict=True))


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


@torch.no_grad()
def _try(module: nn.Module, recipe: Recipe, view: View, device: torch.device) -> None:
    """TrainingError where the network does not take pictures of this size."""
    module.eval()
    try:
        module(torch.zeros(2, 3, *view.size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise TrainingError(f"{recipe.architecture} does not take pictures of {view.size[0]} x {view.size[1]}: "
                            f"{str(error).splitlines()[0]} Give another --input-size or --architecture.") from error


def _find_start(
    recipe: Recipe, data: LongTailed, state: State, folder: Path, resume: bool, stage1: Path | None,
    processes: Processes,
) -> None:
    found = processes.from_first(checkpoints.load_newest(folder / "checkpoints") if processes.first else None)
    if found is not None:
        path, saved = found
        if not resume:
            raise TrainingError(f"{folder} already holds a run (epoch {saved['epoch']}). Go on with --resume, or "
                                "choose another --out.")
        theirs = recipe.completed(saved["recipe"])
        differing = sorted(k for k, v in recipe.to_dict().items() if theirs[k] != v)
        if differing:
            raise TrainingError(f"{folder} was trained with other settings: "
                                + ", ".join(f"{k} {theirs[k]}" for k in differing)
                                + ". Resume with those, or choose another --out.")
        _check_data(data, saved, f"{folder} cannot go on")
        with _fitting(path, recipe):
            state.load_dict(saved)
    elif stage1 is not None:
        newest = processes.from_first(_load_stage1(stage1) if processes.first else None)
        if newest is None:
            raise TrainingError(f"--stage1 {stage1}: no stage-1 checkpoint there. Name a run folder whose stage 1 "
                                "has ended.")
        path, saved = newest
        ours, theirs = json.loads(recipe.stage1_key()), recipe.completed_key(saved["stage1_key"])
        differing = sorted(k for k in ours if ours[k] != theirs.get(k))
        if differing or saved["epoch"] != recipe.stage2_epoch or saved["step"] != 0:
            raise TrainingError(f"--stage1 {path}: another stage 1 than this recipe's ("
                                + (", ".join(f"{k} {theirs.get(k)}, not {ours[k]}" for k in differing)
                                   or f"saved at epoch {saved['epoch']}") + ").")
        _check_data(data, saved, f"--stage1 {path} does not serve")
        _check_backbone(recipe, state.module, saved["module"], path)
        # Only what stage 1 made is taken over; estimates of stage 2 and the log start empty.
        with _fitting(path, recipe):
            state.module.load_state_dict(saved["module"])
            state.optimizer.load_state_dict(saved["optimizer"])
            state.scale.load_state_dict(saved.get("scale", state.scale.state_dict()))
        state.epoch, state.seconds = saved["epoch"], saved["seconds"]


def _check_backbone(recipe: Recipe, module: nn.Module, saved: dict[str, torch.Tensor], path: Path) -> None:
    """TrainingError where a stage 1 was trained on another backbone that goes by the same name."""
    last = f"{classifier_name(module)}."
    if recipe.backbone is not None and not all(name.startswith(last) or torch.equal(tensor, saved.get(name, tensor[:0]))
                                               for name, tensor in module.state_dict().items()):
        raise TrainingError(f"--stage1 {path}: trained on another --backbone of this name.")


def _load_stage1(stage1: Path) -> tuple[Path, dict] | None:
    if stage1.is_file():
        return stage1, checkpoints.load(stage1)
    return checkpoints.load_newest(stage1 / "stage1" if (stage1 / "stage1").is_dir() else stage1)


@contextmanager
def _fitting(path: Path, recipe: Recipe) -> Iterator[None]:
    """Another version of timm, torchvision or this code may build another network under the same name."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} does not fit {recipe.architecture} as it is built here: "
                            f"{' '.join(str(error).split())[:300]}. Take the versions that it was trained with, or "
                            "begin anew with another --out.") from error


def _check_data(data: LongTailed, saved: dict, what: str) -> None:
    """TrainingError where the state was made on other pictures; states of before this was kept are taken on trust."""
    ours, theirs = data.identity(), saved.get("data")
    if theirs is None or ours == theirs:
        return
    now, then = (dict(zip(one["label_names"], one["class_counts"], strict=True)) for one in (ours, theirs))
    differing = [f"{name} had {then.get(name, 'no')} training pictures and has {now.get(name, 'none')}"
                 for name in sorted(now.keys() | then.keys()) if now.get(name) != then.get(name)]
    reason = listed(differing, ", ") or "as many of each class, but not the same"
    raise TrainingError(f"{what}: it was trained on other pictures ({reason}). Put those back, or begin anew with "
                        "another --out.")


class Log:
    """JSON lines; on resume the lines that the checkpoint does not know are cut off, so none is there twice.

    path          None: of a process that does not write
    tensorboard   a folder where TensorBoard finds the same numbers, or None
    """

    def __init__(self, path: Path | None, length: int, tensorboard: Path | None = None):
        self.path, self.length, self.tensorboard = path, length, tensorboard
        self.board: TensorBoardLog | None = None

    def __enter__(self) -> "Log":
        if self.path is None:
            return self
        with self._writing():
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
        if self.path is None:
            return self.length
        with self._writing(), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            self.board.write(line)
        return self.path.stat().st_size

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(f"{self.path} could not be written ({error.strerror or error}). Make room, then go on "
                                "with --resume.") from error


@contextmanager
def _death_of_a_worker_told() -> Iterator[None]:
    """torch raises it wherever the main process just is."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError("A process that decodes pictures was ended from outside, as where memory runs out. Go on "
                            "from the last checkpoint with --resume and fewer --workers.") from error


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGINT, SIGTERM or SIGHUP (the terminal is gone); the second one has its usual
    effect at once. What is ignored stays so: nohup's SIGHUP, SIGINT in the background of a script."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def note(number, _frame):
        received.append(number)
        for each, usual in previous.items():
            signal.signal(each, usual)

    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: there is nobody to press Ctrl-C
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
