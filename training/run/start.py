"""Where a run starts: at its newest checkpoint, at another run's stage 1, or at the beginning."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from training.data.datasets import LongTailed, listed
from training.errors import TrainingError
from training.network.distributed import Processes
from training.recipes import Recipe
from training.run import checkpoints
from training.run.state import State
from zoo.architectures import classifier_name


def find_start(
    recipe: Recipe, data: LongTailed, state: State, folder: Path, resume: bool, stage1: Path | None,
    processes: Processes,
) -> None:
    found = processes.from_first(checkpoints.load_newest(folder / "checkpoints") if processes.first else None)
    if found is not None:
        path, saved = found
        if not resume:
            raise TrainingError(f"{folder} already holds a run (epoch {saved['epoch']}). Continue it with --resume, or "
                                "choose another --out.")
        theirs = recipe.completed(saved["recipe"])
        differing = sorted(k for k, v in recipe.to_dict().items() if theirs[k] != v)
        if differing:
            raise TrainingError(f"{folder} was trained with other settings: "
                                + ", ".join(f"{k} {theirs[k]}" for k in differing)
                                + ". Resume with these, or choose another --out.")
        _check_data(data, saved, f"{folder} cannot continue")
        with _fitting(path, recipe):
            state.load_dict(saved)
    elif stage1 is not None:
        newest = processes.from_first(_load_stage1(stage1) if processes.first else None)
        if newest is None:
            raise TrainingError(f"--stage1 {stage1} holds no stage-1 checkpoint. Name a run folder whose stage 1 is "
                                "finished.")
        path, saved = newest
        ours, theirs = json.loads(recipe.stage1_key()), recipe.completed_key(saved["stage1_key"])
        differing = sorted(k for k in ours if ours[k] != theirs.get(k))
        if differing or saved["epoch"] != recipe.stage2_epoch or saved["step"] != 0:
            raise TrainingError(f"--stage1 {path}: another stage 1 than this recipe's ("
                                + (", ".join(f"{k} {theirs.get(k)}, not {ours[k]}" for k in differing)
                                   or f"saved at epoch {saved['epoch']}") + ").")
        _check_data(data, saved, f"--stage1 {path} cannot be used")
        _check_backbone(recipe, state.module, saved["module"], path)
        # Take only what stage 1 trained; the covariances of stage 2 and the log start empty.
        with _fitting(path, recipe):
            state.module.load_state_dict(saved["module"])
            state.load_momenta(saved["optimizer"])
            state.scale.load_state_dict(saved.get("scale", state.scale.state_dict()))
        state.epoch, state.seconds = saved["epoch"], saved["seconds"]


def _check_backbone(recipe: Recipe, module: nn.Module, saved: dict[str, torch.Tensor], path: Path) -> None:
    """TrainingError if stage 1 was trained on another backbone of the same name."""
    last = f"{classifier_name(module)}."
    ours = {name: tensor.cpu() for name, tensor in module.state_dict().items() if not name.startswith(last)}
    if recipe.backbone is not None and not all(name in saved and torch.equal(tensor, saved[name])
                                               for name, tensor in ours.items()):
        raise TrainingError(f"--stage1 {path} was trained on another --backbone of the same name.")


def _load_stage1(stage1: Path) -> tuple[Path, dict] | None:
    if stage1.is_file():
        return stage1, checkpoints.load(stage1)
    return checkpoints.load_newest(stage1 / "stage1" if (stage1 / "stage1").is_dir() else stage1)


@contextmanager
def _fitting(path: Path, recipe: Recipe) -> Iterator[None]:
    """Explain a checkpoint that does not fit: another version may build another network under the same name."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} does not fit {recipe.architecture} as the libraries here build it: "
                            f"{' '.join(str(error).split())[:300]}. Install the versions that it was trained with, or "
                            "start again with another --out.") from error


def _check_data(data: LongTailed, saved: dict, what: str) -> None:
    """TrainingError if the checkpoint comes from other pictures; old ones do not record them and always pass."""
    ours, theirs = data.identity(), saved.get("data")
    if theirs is None or ours == theirs:
        return
    now, then = (dict(zip(one["label_names"], one["class_counts"], strict=True)) for one in (ours, theirs))
    differing = [f"{name} had {then.get(name, 'no')} training pictures and has {now.get(name, 'none')}"
                 for name in sorted(now.keys() | then.keys()) if now.get(name) != then.get(name)]
    reason = listed(differing, ", ") or "as many in each class, but not the same ones"
    raise TrainingError(f"{what}: it was trained on other pictures ({reason}). Restore them, or start again with "
                        "another --out.")
