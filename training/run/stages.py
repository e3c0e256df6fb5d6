"""The two stages of a run: what each trains on, with which loss and class weights."""

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from training.data.batches import Batches, View, fits_in_memory, hold
from training.data.datasets import LongTailed, PictureFiles, Split, listed, size_in_words
from training.errors import TrainingError
from training.method.losses import HeadLoss, class_balanced_weights
from training.network.distributed import Processes
from training.network.feature_cache import CachedBatches, FeatureCache, Head
from training.recipes import Loss, Recipe
from training.run.state import State


@dataclass(frozen=True)
class Stage:
    """Data, loss and class weights of one of the two stages."""

    batches: Batches
    meta: Batches
    loss: HeadLoss
    weights: torch.Tensor | None
    head: Head | None = None  # the network to train if the batches are features


def data_of_stage(recipe: Recipe, data: LongTailed, stage: Literal[1, 2]) -> LongTailed:
    """The data of the stage; its meta pictures are those that S is learned from."""
    joined = {"never": (), "stage2": (2,), "always": (1, 2)}[recipe.meta_in_training]
    if recipe.augment == "heldout":
        data = data.with_most_of_meta_in_training() if stage in joined else data
        return dataclasses.replace(data, meta=data.held_out)
    return data.with_meta_in_training() if stage in joined else data


def view_of(recipe: Recipe, data: LongTailed) -> View:
    """How these pictures become the network's input."""
    if recipe.input_size is not None:
        size = (recipe.input_size, recipe.input_size)
    elif isinstance(data.train, Split):
        size = data.train.pictures.shape[1:3]
    else:
        raise TrainingError("Give --input-size: these pictures have many sizes.")
    return View(size, recipe.mean or data.mean, recipe.std or data.std, recipe.crop_mode, recipe.crop_pct,
                recipe.crops, recipe.flips, recipe.color_jitter, recipe.interpolation, recipe.crop_area,
                reading=data.reading)


def make_stages(
    recipe: Recipe, data: LongTailed, view: View, device: torch.device, workers: int, processes: Processes,
    in_memory: bool = True,
) -> tuple[Stage, Stage]:
    """Both stages; pictures that fit into memory are read once."""
    view = view if recipe.train_size is None else dataclasses.replace(view, size=(recipe.train_size,) * 2)
    cached = recipe.cache_features and recipe.stands_still(in_stage2=False)
    in_memory = in_memory and not cached and fits_in_memory(view, len(data.train) + len(data.meta))
    first, second = (data_of_stage(recipe, data, number) for number in (1, 2))
    train, meta = second.train, second.meta
    if in_memory:
        train, meta = (hold(pictures, view, workers) for pictures in (train, meta))

    def stage(counts: tuple[int, ...], loss: Loss, size: int, weighted: bool) -> Stage:
        # Meta pictures that join in stage 2 come after those of stage 1, so both stages share one copy.
        shown = recipe.shown_counts(counts)
        return Stage(
            Batches(train, view, recipe.seed, size, device, workers, processes, sum(counts), shown),
            Batches(meta, view, recipe.seed, size, device, workers, processes),
            HeadLoss(loss, shown, gamma=recipe.gamma, max_margin=recipe.max_margin, scale=recipe.scale,
                     tau=recipe.tau),
            _placed(class_balanced_weights(shown, recipe.beta), device) if weighted else None)

    return (stage(first.class_counts, recipe.first_loss, recipe.batch_size, False),
            stage(second.class_counts, recipe.loss, recipe.stage2_batch_size or recipe.batch_size,
                  recipe.weighted))


def _placed(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; in float32 on MPS, which has no float64."""
    return (values.float() if device.type == "mps" else values).to(device)


def on_features(
    stage: Stage, cache: FeatureCache, data: LongTailed, module: nn.Module, before_each: Callable[[], None]
) -> Stage:
    """The same stage on cached features, computed now if they are not there yet.

    data   of the stage, with its pictures on disk: they are not held in memory for this
    """
    last: nn.Linear = module.get_classifier()  # type: ignore[operator, assignment]

    def cached(kind: Literal["train", "meta"], pictures: Split | PictureFiles, batches: Batches) -> Batches:
        return CachedBatches(pictures, cache.of(kind, pictures, module, before_each), batches.view, batches.seed,
                             batches.batch_size, batches.device, last.weight.dtype, batches.processes,
                             batches.each_C)

    return dataclasses.replace(stage, batches=cached("train", data.train, stage.batches),
                               meta=cached("meta", data.meta, stage.meta), head=Head(last))


def check(recipe: Recipe, data: LongTailed) -> None:
    """Raise TrainingError for data that this recipe cannot train on, naming the classes."""
    counts = np.array(data.class_counts)

    def named(classes: np.ndarray) -> str:
        return listed([data.label_names[c] for c in classes], ", ")

    if len(counts) < 2:
        raise TrainingError("There is only one class: training needs at least two.")
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise TrainingError(f"{len(empty)} classes have no training picture: {named(empty)}.")
    lacking = np.setdiff1d(np.arange(len(counts)), data.meta.labels)
    if recipe.augment == "metasaug" and len(lacking):
        raise TrainingError(f"{len(lacking)} classes have no picture in the meta set, which MetaSAug learns from: "
                            f"{named(lacking)}. Give each class at least one, or train with --augment isda or none.")
    if recipe.augment == "heldout" and len(data_of_stage(recipe, data, 2).meta) < 2:  # batch norm needs two
        raise TrainingError("--augment heldout measures on held-out pictures, but almost no class has enough to hold "
                            "any out. Train with --augment metasaug, isda or none.")


def check_disk(recipe: Recipe, data: LongTailed, cache: FeatureCache, state: State) -> None:
    """Raise TrainingError, before anything is trained, if the features will not fit onto the disk."""
    from_start = recipe.stands_still(in_stage2=False)
    second = data_of_stage(recipe, data, 2)
    trained_on = [second.train]
    if from_start and recipe.stage2_epoch and recipe.meta_in_training == "stage2":
        trained_on.append(data.train)
    cache.check_disk([*(("train", one) for one in trained_on), ("meta", second.meta), ("test", data.test)],
                     state.module, recipe.stands_still(state.epoch >= recipe.stage2_epoch))


def check_room(folder: Path, state: State) -> None:
    """Raise TrainingError, before anything is trained, if the disk has no room for the run."""
    weights, covariances = (sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())
                            for parts in ([state.module], [state.covariance, state.learned]))
    needed = run_bytes(weights, covariances // 2)
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if free < needed and not (folder / "checkpoints").exists():
        raise TrainingError(f"The run will write {size_in_words(needed)} into {folder}, where {size_in_words(free)} "
                            "are free. Make room, or choose another --out.")


def run_bytes(weights: int, covariance: int) -> int:
    """Bytes of a run on disk: three checkpoints and the model folder.

    A checkpoint has weights, momentum and two covariances; the model folder has the weights twice, once as ONNX.
    """
    return 4 * (2 * weights + 2 * covariance)


def meta_batches(recipe: Recipe, stage: Stage, state: State, last: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A meta batch for each step of the epoch; the authors' code for large sets takes the same one every time."""
    if recipe.fidelity == "reference" and recipe.stage2_trains == "classifier":
        return itertools.repeat(next(stage.meta.meta(0, 0, 1)))
    return stage.meta.meta(state.epoch, state.step, last)
