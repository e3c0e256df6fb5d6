"""`metasaug train`: from pictures to a finished model folder."""

import fcntl
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tyro

from training.errors import TrainingError
from training.metrics import results_table
from training.recipes import Cifar10LT, Cifar100LT, Recipe
from training.report import report_of_run


@dataclass(frozen=True)
class RunOptions:
    """Where from, where to, on what. None of it changes the weights."""

    data: Path | None = None
    """Folder of the pictures; without it ./data, and the error says which layout is expected."""

    out: Path | None = None
    """Run folder; without it runs/NAME, the name made from the recipe."""

    name: str | None = None
    """What the model is called in its card; without it the name made from the recipe."""

    resume: bool = False
    """Go on from the newest good checkpoint in the run folder (from the start where there is none)."""

    stage1: Path | None = None
    """Run folder (or checkpoint file) whose stage 1 is to be used; its recipe must agree up to there."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda where there is one, else cpu."""

    download: bool = False
    """Fetch the original data set into --data first, where its owners allow that."""

    evaluate_every: int = 10
    """Epochs between looks at the test set for the log; the result is always that of the last epoch."""

    save_every: int = 1
    """Epochs between checkpoints. SIGINT (exit code 130) and SIGTERM (143) save at once."""

    tensorboard: bool = False
    """Keep the log in RUN/tensorboard as well, for `tensorboard --logdir runs`."""

    dry_run: bool = False
    """Print the resolved recipe and the data's counts, train nothing."""


Options = Annotated[RunOptions, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class TrainCifar10:
    """CIFAR-10-LT: 10 classes, exponential long tail, ResNet-32."""

    recipe: Annotated[Cifar10LT, tyro.conf.arg(name="")] = field(default_factory=Cifar10LT)
    options: Options = field(default_factory=RunOptions)


@dataclass(frozen=True)
class TrainCifar100:
    """CIFAR-100-LT: 100 classes, exponential long tail, ResNet-32."""

    recipe: Annotated[Cifar100LT, tyro.conf.arg(name="")] = field(default_factory=Cifar100LT)
    options: Options = field(default_factory=RunOptions)


LOSSES_IN_WORDS = {"ce": "cross entropy", "focal": "focal loss", "ldam": "LDAM (margins only)",
                   "ldam-published": "LDAM as published", "balanced-softmax": "balanced softmax",
                   "logit-adjustment": "logit adjustment"}

Job = (
    Annotated[TrainCifar10, tyro.conf.subcommand("cifar10-lt", default=TrainCifar10())]
    | Annotated[TrainCifar100, tyro.conf.subcommand("cifar100-lt", default=TrainCifar100())]
)


def train(job: Annotated[Job, tyro.conf.arg(name="")]) -> Path | None:
    """Train a model on long-tailed pictures; ends with a model folder in RUN/model.

    The result is that of the last epoch, overall, per group and per class, on the test set.
    """
    recipe, options = job.recipe, job.options
    data = load_data(recipe, options)
    folder = options.out or Path("runs") / run_name(recipe)
    counts = data.class_counts
    print(f"{data.source}: {sum(counts):,} training pictures in {len(counts)} classes ({max(counts):,} to "
          f"{min(counts):,}), {len(data.meta):,} meta, {len(data.test):,} test")
    if options.dry_run:
        print(json.dumps({**recipe.to_dict(), "run": str(folder), "class_counts": counts}, indent=1))
        return None

    from training import loop  # torch, only from here on

    device = choose_device(options.device)
    print(f"{run_name(recipe)} on {device}, into {folder}")
    with _alone_in(folder):
        state, results = loop.run(recipe, data, folder, device, options.resume, options.stage1,
                                  options.evaluate_every, options.save_every, options.tensorboard)
        model = folder / "model"
        write_model(model, options.name or run_name(recipe), recipe, loop.data_of_stage(recipe, data, 2), state,
                    results)
    print(results_table(results))
    print(report_of_run(folder, results))
    return model


def load_data(recipe: Cifar10LT, options: RunOptions):
    from training.cifar import load_cifar

    return load_cifar(recipe.dataset, options.data, recipe.imbalance, recipe.meta_per_class, recipe.subset_seed,
                      options.download, recipe.subset)


def run_name(recipe: Recipe) -> str:
    """Method, data set and every flag that differs from the recipe's defaults."""
    flags = recipe.to_dict()
    defaults = type(recipe)().to_dict()
    shown = {"method": recipe.method, "dataset": flags.pop("dataset")}
    parts = [f"{name.replace('_', '-')}-{value}" for name, value in flags.items()
             if name not in ("augment", "imbalance") and value != defaults[name]
             and not (name == "loss" and recipe.augment == "none")]
    if "imbalance" in flags:
        parts.insert(0, f"imbalance-{flags['imbalance']:g}")
    return "_".join([f"{shown['method']}-{shown['dataset']}", *parts])


def choose_device(asked: str):
    import torch

    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here[asked]:
        raise TrainingError(f"--device {asked}: torch {torch.__version__} finds none here. Use --device cpu, or "
                            "install a torch build and a driver for it.")
    return torch.device(asked)


def write_model(model: Path, name: str, recipe: Recipe, data, state, results: dict) -> None:
    """The finished model folder, without ONNX: `metasaug train` adds that next, `metasaug export` at any time."""
    import torch

    from zoo.labels import assign_groups
    from zoo.model_folder import write_model_folder
    from zoo.registry import find

    entry = find(name)
    counts = data.class_counts
    groups, groups_by = assign_groups(counts)
    height, width = data.train.pictures.shape[1:3]
    config = {
        "architecture": recipe.architecture,
        "num_classes": len(data.label_names),
        "num_features": state.module.num_features,
        "label_names": list(data.label_names),
        "pretrained_cfg": {
            "input_size": [3, height, width], "mean": list(data.mean), "std": list(data.std),
            "interpolation": "bilinear", "crop_pct": 1.0, "num_classes": len(data.label_names), "classifier": "fc",
        },
        "metasaug": {
            "format": 1,
            "name": name,
            "method": recipe.method,
            "loss": recipe.loss,
            "augment": recipe.augment,
            "prior": recipe.implicit_prior,
            "cosine_scale": recipe.cosine_scale,
            "recipe": recipe.to_dict(),
            "dataset": data.source,
            # As asked for: 100 on CIFAR-10-LT, where the counts, rounded down, make it 4990 / 49.
            "imbalance": recipe.to_dict().get("imbalance", max(counts) / min(counts)),
            "class_counts": list(counts),
            "groups": list(groups),
            "groups_by": groups_by,
            "group_accuracy": {group: figures["accuracy"] for group, figures in results["groups"].items()},
            "seed": recipe.seed,
            "schedule": schedule_in_words(recipe),
            "command": command_in_words(),
            "code_version": code_version(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0],
                         "numpy": version("numpy")},
            "hardware": hardware(next(state.module.parameters()).device),
            "seconds": round(state.seconds),
            "published_error": entry.published_error if entry else None,
            "results": results,
        },
    }
    weights = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in state.module.state_dict().items()}
    covariance = None
    if recipe.augment != "none":
        covariance = {name: tensor.cpu().contiguous().numpy() for name, tensor in
                      {"running": state.covariance.covariance, "learned": state.learned.delta}.items()}
    write_model_folder(model, config, weights, covariance)


def command_in_words() -> str:
    """The command as another person would type it: without where this machine keeps things."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("--data", "--out", "--stage1", "--name"):
            value or next(words, None)
            kept += ["--data", "DIR"] if flag == "--data" else []
        elif flag != "--resume":
            kept.append(word)
    return " ".join(["metasaug", *(kept if kept[:1] == ["train"] else ["train", *kept])])


def schedule_in_words(recipe: Recipe) -> str:
    """How long it was trained on what, for people who read a card: "60 epochs: 48 of plain cross entropy, then …"."""
    weights = " with class-balanced weights" if recipe.weighted else ""
    first, second = (LOSSES_IN_WORDS[loss] for loss in (recipe.first_loss, recipe.loss))
    if recipe.augment == "isda":
        second = f"ISDA ({recipe.covariance} covariances)"
    elif recipe.augment == "metasaug":
        second = (f"MetaSAug ({recipe.covariance} covariances, look-ahead through the {recipe.lookahead}"
                  + (", quirks of the authors' code" if recipe.fidelity == "reference" else "") + ")")
    meta = {"never": "", "stage2": ", the meta pictures among those trained on"}
    second = f"{'the same' if first == second else second}{weights}{meta.get(recipe.meta_in_training, '')}"
    epochs = f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}"
    if second == "the same":
        return f"{epochs} of plain {first}"
    before = f"{recipe.stage2_epoch} of plain {first}, then " if recipe.stage2_epoch else ""
    return f"{epochs}: {before}{recipe.epochs - recipe.stage2_epoch} of {second}"


def code_version() -> str:
    """The distribution's version and, in a checkout, its commit; "+" where files differ from that commit."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return version("metasaug")
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True,
                                text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version("metasaug")
    return f"{version('metasaug')} ({commit})"


def hardware(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two runs in one folder would tear each other's state: the second one is told, and leaves."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise TrainingError(f"--out {folder} cannot be written: {error.strerror or error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(f"{folder} is in use by another run; choose another --out.") from None
        yield
