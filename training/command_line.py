"""`metasaug train`: from pictures to a finished model folder."""

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, Union

import tyro

from training.data.datasets import LongTailed
from training.data.splits import SMALL_CLASS, SMALL_FOR_A_WHILE
from training.errors import TrainingError
from training.recipes import (
    Cifar10LT,
    Cifar100LT,
    Folder,
    ImageNetLT,
    INat17,
    INat18,
    LargeSet,
    OwnPictures,
    Recipe,
    Table,
)
from training.report.metrics import results_table
from training.report.page import report_of_run
from training.run.run_folder import alone_in, write_model
from zoo.machine import cores, keep_freed_memory
from zoo.tables import USUAL, Columns

if TYPE_CHECKING:
    from training.network.distributed import Processes


@dataclass(frozen=True)
class RunOptions:
    """Where the pictures are, where the run goes, and the device. Nothing here changes the weights."""

    data: Annotated[Path | None, tyro.conf.arg(aliases=["--root"])] = None
    """Folder of the pictures. By default ./data for benchmarks."""

    out: Path | None = None
    """Run folder. By default runs/NAME, named after the data set and the flags."""

    name: str | None = None
    """Name of the model in its card. By default made from the data set and the flags."""

    resume: bool = False
    """Continue from the newest good checkpoint in the run folder, or start if there is none."""

    stage1: Path | None = None
    """Run folder or checkpoint file whose stage 1 this run reuses. The flags of stage 1 must be the same."""

    features: Path | None = None
    """Folder for the features of --cache-features; several runs may share it. By default RUN/features."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on. auto: cuda if there is one, else cpu."""

    evaluate_every: int = 10
    """Epochs between tests, for the log. The result is always that of the last epoch."""

    save_minutes: float = 10
    """Minutes between checkpoints within an epoch. 0: at the end of each epoch only. Ctrl-C (exit code 130), SIGTERM
    (143) and SIGHUP (129) save at once."""

    tensorboard: bool = False
    """Also write the log to RUN/tensorboard, for `tensorboard --logdir runs`."""

    deterministic: bool = True
    """On CUDA, use only kernels that give the same bits every time. With --no-deterministic a run may be faster, but a
    resumed run may differ in the last bits."""

    workers: int | None = None
    """Processes that decode pictures, if these do not fit into memory. By default one per core."""

    in_memory: bool = True
    """Keep the pictures in memory if they take at most half of it. --no-in-memory always reads them from disk: slower,
    but it leaves the memory to other programs."""

    dry_run: bool = False
    """Print the chosen flags and the class counts, and stop."""

    def __post_init__(self):
        for flag, least in (("evaluate_every", 1), ("save_minutes", 0), ("workers", 0)):
            value = getattr(self, flag)
            if value is not None and not least <= value < math.inf:
                raise TrainingError(f"--{flag.replace('_', '-')} {value}: must be a number, at least {least}.")

    def of_the_loop(self) -> dict[str, Any]:
        """The options of training.run.loop.run."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine
        return {"evaluate_every": self.evaluate_every, "save_minutes": self.save_minutes,
                "workers": max(1, cores() // here) if self.workers is None else self.workers,
                "tensorboard": self.tensorboard, "deterministic": self.deterministic, "features": self.features,
                "in_memory": self.in_memory}


Options = Annotated[RunOptions, tyro.conf.arg(name="")]


R = TypeVar("R", bound=Recipe)
C = TypeVar("C", bound=Cifar10LT)
L = TypeVar("L", bound=LargeSet)


@dataclass(frozen=True)
class Job(Generic[R]):
    """A recipe, and where its pictures are."""

    recipe: Annotated[R, tyro.conf.arg(name="")]
    options: Options = field(default_factory=RunOptions)

    def load(self, look: bool | None = None) -> LongTailed:
        """Read the data set. look: whether to decode every picture first; None: as the data set needs."""
        raise NotImplementedError


@dataclass(frozen=True)
class TrainCifar(Job[C]):
    download: bool = False
    """Download the original data set into --data first."""

    def load(self, look: bool | None = None) -> LongTailed:
        from training.data.cifar import load_cifar

        recipe = self.recipe
        return load_cifar(recipe.dataset, self.options.data, recipe.imbalance, recipe.meta_per_class,
                          recipe.subset_seed, self.download, recipe.subset)


@dataclass(frozen=True)
class TrainLargeSet(Job[L]):
    lists: Path | None = None
    """Folder of the list or JSON files. By default --data."""

    def load(self, look: bool | None = None) -> LongTailed:
        from training.data.imagenet_inat import load_imagenet_lt, load_inat

        load = load_imagenet_lt if self.recipe.dataset == "imagenet-lt" else partial(load_inat, self.recipe.dataset)
        return load(self.options.data, lists=self.lists, meta_per_class=self.recipe.meta_per_class,
                    subset_seed=self.recipe.subset_seed, subset=self.recipe.subset, skip_bad=self.recipe.skip_bad,
                    look=bool(look))


@dataclass(frozen=True)
class TrainFolder(Job[Folder]):
    test: Path | None = None
    """Class folders of a test set. By default DATA/test, or a part of each class."""

    meta: Path | None = None
    """Class folders of a meta set. By default DATA/meta or DATA/val, or a part of each class."""

    leaf_folders: bool = False
    """Make every folder that contains pictures a class, at any depth (order/species/picture.jpg). By default only the
    outermost folders are classes."""

    def load(self, look: bool | None = None) -> LongTailed:
        from training.data.own_pictures import load_folder

        if self.options.data is None:
            raise TrainingError("Where are the pictures? Give --data DIR, where DIR has one folder per class.")
        return load_folder(self.options.data, test=self.test, meta=self.meta, look=look is not False,
                           leaf_folders=self.leaf_folders, **_cutting(self.recipe))


@dataclass(frozen=True)
class TrainTable(Job[Table]):
    table: Path | None = None
    """CSV file with one row per picture: path, label and, if you have them, split (train, val, test, meta) and group
    (an animal, a track, a camera). Its paths are relative to --data, or to the table."""

    columns: Annotated[Columns, tyro.conf.arg(name="")] = USUAL

    def load(self, look: bool | None = None) -> LongTailed:
        from training.data.own_pictures import load_table

        table, root = (self.table, self.options.data) if self.table else (self.options.data, None)
        if table is None:
            raise TrainingError("Which table? Give --table TABLE.csv, with the columns path and label.")
        return load_table(table, root, columns=self.columns, look=look is not False, **_cutting(self.recipe))


def _cutting(recipe: OwnPictures) -> dict[str, Any]:
    return {"meta_per_class": recipe.meta_per_class, "test_share": recipe.test_share,
            "subset_seed": recipe.subset_seed, "skip_bad": recipe.skip_bad, "reading": recipe.reading,
            "small_class": SMALL_FOR_A_WHILE if recipe.may_end_with_meta else SMALL_CLASS}


JOBS: tuple[Job, ...] = (
    TrainCifar(Cifar10LT()), TrainCifar(Cifar100LT()), TrainLargeSet(ImageNetLT()), TrainLargeSet(INat17()),
    TrainLargeSet(INat18()), TrainFolder(Folder()), TrainTable(Table()))


def _kind(job: Job) -> Any:
    kind: Any = type(job)
    return kind[type(job.recipe)] if kind in (TrainCifar, TrainLargeSet) else kind


def _sub_command(job: Job) -> Any:
    """For tyro: the name, the defaults, and the recipe's docstring as help."""
    description = inspect.cleandoc(type(job.recipe).__doc__ or "")
    return Annotated[_kind(job), tyro.conf.subcommand(job.recipe.dataset, default=job, description=description)]


if TYPE_CHECKING:
    AnyJob = Job
else:
    AnyJob = Annotated[Union[tuple(map(_sub_command, JOBS))], tyro.conf.arg(name="")]  # noqa: UP007


def job_of(words: Sequence[str]) -> Job:
    """The job of `metasaug train WORDS`. Raises SystemExit for flags that it does not take."""
    job = next(job for job in JOBS if job.recipe.dataset == words[0])
    return tyro.cli(_kind(job), args=words[1:], default=job, prog=f"metasaug train {words[0]}")


def train(job: AnyJob) -> Path | None:
    """Train a model on long-tailed pictures. The run ends with a model folder in RUN/model.

    The test results are those of the last epoch: overall, per group and per class.
    """
    from training.network.distributed import joined

    keep_freed_memory()
    with joined(choose_device(job.options.device).type) as processes:
        if not processes.first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- only the first process prints
        return _train(job, processes)


def _train(job: Job, processes) -> Path | None:
    options = job.options
    data = job.load()
    title = run_name(job.recipe, data.source)
    folder = options.out or Path("runs") / title
    recipe, reasons = processes.from_first(
        settle(job.recipe, data, processes.device, folder if options.resume else None) if processes.first else None)
    counts = data.class_counts
    print("\n".join([*data.notes, *reasons,
                     f"{data.source}: {sum(counts):,} training pictures in {len(counts)} classes ({max(counts):,} to "
                     f"{min(counts):,}), {len(data.meta):,} meta, {len(data.test):,} test"]))
    if options.dry_run:
        if recipe.pretrained is not None:
            from training.network.start_weights import load_pretrained
            from zoo.architectures import create

            load_pretrained(create(recipe.architecture, len(counts), recipe.cosine_scale), recipe.pretrained)
        print(json.dumps({**recipe.to_dict(), "run": str(folder), "class_counts": counts}, indent=1))
        return None

    from training.run.stages import check

    check(recipe, data)
    print(f"{title} on {processes.device}"
          + (f" and {processes.count - 1} more" if processes.count > 1 else "") + f", into {folder}")
    with alone_in(folder) if processes.first else nullcontext():
        return run_to_model(recipe, data, folder, options.name or title, processes,
                            resume=options.resume, stage1=options.stage1, **options.of_the_loop())


def run_to_model(recipe: Recipe, data: LongTailed, folder: Path, name: str, processes: "Processes",
                 **how: Any) -> Path | None:
    """Train in the run folder, write the model folder and the report there; None except in the first process.

    how   arguments of training.run.loop.run
    """
    from training.run import loop, stages

    model, how = folder / "model", {**how, "processes": processes}
    if isinstance(recipe, OwnPictures) and recipe.starts_pretrained and processes.count == 1:
        from training.run.own_pictures_run import OwnPicturesRun

        results = OwnPicturesRun(recipe, data, folder, processes.device, name, how).train()
    else:
        state, results = loop.run(recipe, data, folder, processes.device, **how)
        if not processes.first:
            return None
        write_model(model, name, recipe, stages.data_of_stage(recipe, data, 2), state, results, processes.count)
    print(results_table(results))
    print(report_of_run(folder, results))
    return model


def settle(recipe: Recipe, data: LongTailed, device, resumed: Path | None) -> tuple[Recipe, list[str]]:
    """The recipe with every choice made, and the reasons. A resumed run keeps its choices."""
    from training.run.defaults import choose, on_backbone

    reasons: list[str] = []
    if recipe.backbone is not None:
        recipe, reasons = on_backbone(recipe, data)
    if isinstance(recipe, OwnPictures):
        from training.run.checkpoints import load_newest

        newest = load_newest(resumed / "checkpoints") if resumed is not None else None
        if newest is not None:
            recipe, _ = choose(recipe.with_choices(newest[1]["recipe"]), data, device.type, cores())
            reasons = [f"{resumed} continues with the flags that were chosen at its start."]
        else:
            recipe, chosen = choose(recipe, data, device.type, cores())
            reasons += chosen
    if recipe.last_layer == "ready":
        recipe = replace(recipe, stage2_epochs=recipe.epochs)
    from zoo.architectures import ARCHITECTURES

    small = f"{recipe.architecture}-small"
    may_choose = recipe.backbone is None and small in ARCHITECTURES
    if may_choose and recipe.input_size is not None and recipe.input_size <= 64:
        reasons.append(f"{recipe.architecture} is coarse at {recipe.input_size} pixels; --architecture {small} is made "
                       "for this size.")
    return recipe, reasons


def run_name(recipe: Recipe, source: str) -> str:
    """Method, data set and every flag that differs from the recipe's defaults.

    source   the data set in words; runs on own pictures are named after it, without the part in brackets
    """
    flags = recipe.to_dict()
    defaults = type(recipe)().to_dict()
    dataset, method = flags.pop("dataset"), recipe.method
    if isinstance(recipe, OwnPictures):
        dataset = re.sub(r"[^\w.-]+", "-", source.rpartition(" (")[0]).strip("-.") or dataset
    parts = [f"{name.replace('_', '-')}-{value}" for name, value in flags.items()
             if name not in ("augment", "imbalance") and value != defaults[name]
             and not (name == "loss" and recipe.augment == "none")]
    if "imbalance" in flags:
        parts.insert(0, f"imbalance-{flags['imbalance']:g}")
    # Names such as timm:NAME have characters that a folder's name must not have.
    parts.insert(0, dataset if method == "auto" else f"{method}-{dataset}")
    return "_".join(parts).translate(str.maketrans("/:", "--"))


def choose_device(asked: str):
    import torch

    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here[asked]:
        raise TrainingError(f"--device {asked}: torch {torch.__version__} finds no such device. Use --device cpu, or "
                            "install a torch build and a driver for it.")
    return torch.device(asked)
