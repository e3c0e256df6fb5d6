"""What a release would do: the cells by their names, what each costs, and the table that tells it beforehand."""

import dataclasses
import difflib
import functools
import math
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from export.errors import ExportError
from training.command_line import AnyJob, Job
from training.data.check import passes, run_bytes, second_step, size_in_words
from training.data.cifar import CIFAR, long_tail_counts
from training.data.imagenet_inat import IMAGENET_LT, INAT
from training.recipes import Cifar10LT, OwnPictures, Recipe
from training.run.defaults import CPU_SECONDS
from zoo.errors import UnknownModelError
from zoo.registry import ENTRIES, Entry, find

# Folder of each data set under --root.
FOLDERS = {"cifar10-lt": "cifar10", "cifar100-lt": "cifar100", "imagenet-lt": "imagenet-lt", "inat17": "inat17",
           "inat18": "inat18", "plankton": "plankton"}

MEASURED_ON_CPU = "measured on 2 CPU cores (docstring of the recipe); a GPU was not measured and is faster"
RECKONED = "reckoned, not measured: ResNet-50 at 224 in TF32 on one A100 (docstring of the recipe)"
AS_GIVEN = "as given"
# Pictures a second of plain training, and where that figure is from.
RATES = {"cifar10-lt": (690.0, MEASURED_ON_CPU), "cifar100-lt": (670.0, MEASURED_ON_CPU),
         "imagenet-lt": (800.0, RECKONED), "inat17": (800.0, RECKONED), "inat18": (800.0, RECKONED)}


# ---- which cells ----


@dataclass(frozen=True)
class Cell:
    """An entry of the registry, and how it is trained here."""

    entry: Entry
    job: Job
    words: tuple[str, ...]  # what follows `metasaug`

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    def with_recipe(self, recipe: Recipe) -> "Cell":
        return dataclasses.replace(self, job=dataclasses.replace(self.job, recipe=recipe))

    @property
    def run(self) -> Path:
        assert self.job.options.out is not None
        return self.job.options.out


def entries_named(words: Sequence[str]) -> list[Entry]:
    """Entries by their names, aliases, data sets or `all`, each once, in the registry's order.

    words   each may hold several, parted by commas. Raises UnknownModelError, with the nearest names.
    """
    asked = [word for each in words for word in each.replace(",", " ").split()]
    found: set[str] = set()
    unknown = []
    for word in asked:
        entry = find(word)
        named = [entry] if entry else [e for e in ENTRIES if word in (e.dataset, "all")]
        found |= {each.name for each in named}
        if not named:
            unknown.append(word)
    if unknown:
        known = ["all", *FOLDERS, *(name for e in ENTRIES for name in (e.name, *e.aliases))]
        lines = [f"No cell or data set is called {word!r}." + (
            f" Did you mean {' or '.join(near)}?" if (near := difflib.get_close_matches(word.lower(), known)) else "")
            for word in unknown]
        raise UnknownModelError("\n".join([*lines, f"Data sets: {', '.join(FOLDERS)}. `metasaug list` shows all "
                                           "cells; --cells all takes every one."]))
    if not asked:
        raise UnknownModelError("--cells: which? Names from `metasaug list`, data sets, or all.")
    return [entry for entry in ENTRIES if entry.name in found]


def cell_of(entry: Entry, data: Path, out: Path, flags: Sequence[str]) -> Cell:
    """The entry's own command, with where the pictures are and where the run goes.

    flags   of `metasaug train`, after those of the command. Raises ExportError where it does not take them.
    """
    words = shlex.split(entry.command)[2:]  # after "metasaug train"
    words[words.index("--data") + 1] = str(data)
    words += flags
    try:
        job = tyro.cli(AnyJob, args=words, prog="metasaug train")
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ExportError(f"What follows -- goes to `metasaug train {words[0]}`, and {entry.name} does not take "
                          f"{shlex.join(flags)}: see above.") from None
    ours = dataclasses.replace(job.options, data=data, out=None, name=None, stage1=None, resume=False, dry_run=False)
    if job.options != ours:
        raise ExportError("After --, no --data, --out, --name, --stage1, --resume or --dry-run: release sets them "
                          "itself (--root, --data and --out before the --).")
    out = out / entry.name
    job = dataclasses.replace(job, options=dataclasses.replace(ours, out=out, name=entry.name, resume=True))
    if job.recipe.cache_features and ours.features is None:  # those of one backbone are of use to all its cells
        words += ["--features", str(out.parent / "features")]
    return Cell(entry, job, ("train", *words, "--out", str(out), "--name", entry.name, "--resume"))


def by_data_set(words: Sequence[str], flag: str, allow_bare: bool = False) -> dict[str, str]:
    """{"inat18": "DIR"} of ["inat18=DIR"]; a value without a name, where allowed, is under every name."""
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals and allow_bare:
            given |= dict.fromkeys(FOLDERS, word)
        elif name in FOLDERS and value:
            given[name] = value
        else:
            raise ExportError(f"--{flag} {word}: DATASET=VALUE, where DATASET is one of {', '.join(FOLDERS)}.")
    return given


def rates_from(words: Sequence[str]) -> dict[str, tuple[float, str]]:
    """Pictures a second and where the figure is from, by data set."""
    rates = dict(RATES)
    for name, value in by_data_set(words, "pictures-per-second", allow_bare=True).items():
        try:
            rate = float(value)
        except ValueError:
            rate = 0
        if not 0 < rate < math.inf:
            raise ExportError(f"--pictures-per-second {value}: a number above 0, or DATASET=NUMBER.")
        rates[name] = (rate, AS_GIVEN)
    return rates


# ---- what they cost ----


@dataclass(frozen=True)
class Work:
    """A run's two stages. steps: of both, None where the recipe is chosen from pictures that are not there; first:
    share of the steps that is stage 1; seconds: of each stage, reckoned."""

    steps: int | None
    first: float
    seconds: tuple[float, float]

    def done(self, share: float) -> float:
        """Seconds' worth of work after this share of the steps."""
        in_second = max(0.0, share - self.first) / (1 - self.first)
        in_first = min(share / self.first, 1.0) if self.first else 0.0
        return self.seconds[0] * in_first + self.seconds[1] * in_second

    @property
    def total(self) -> float:
        return sum(self.seconds)


def work_of(recipe: Recipe, pictures: int | None, rate: float | None) -> Work:
    """What a run takes.

    pictures   for training; None: as published      rate   pictures a second of plain training; None: `choices`' limit
    """
    count = pictures or published_pictures(recipe)
    epochs = recipe.stage2_epoch, recipe.epochs - recipe.stage2_epoch
    if not count or not recipe.epochs:
        return Work(None, 0.8, (CPU_SECONDS * 0.8, CPU_SECONDS * 0.2 * second_step(recipe)))
    steps = [n * math.ceil(count / size) for n, size in
             zip(epochs, (recipe.batch_size, recipe.stage2_batch_size or recipe.batch_size), strict=True)]
    a_pass = count / rate if rate else CPU_SECONDS / recipe.epochs
    first, second = passes(recipe)
    return Work(sum(steps), steps[0] / sum(steps), (first * a_pass, second * a_pass))


def published_pictures(recipe: Recipe) -> int | None:
    """Training pictures of the benchmark as it is published; None of pictures that have no number of their own."""
    if isinstance(recipe, OwnPictures):
        return None
    if isinstance(recipe, Cifar10LT):
        about = CIFAR[recipe.dataset]
        largest = max(about.class_size - recipe.meta_per_class, 1)
        return sum(long_tail_counts(largest, about.num_classes, recipe.imbalance))
    return (IMAGENET_LT if recipe.dataset == "imagenet-lt" else INAT[recipe.dataset]).train_pictures


def classes_of(recipe: Recipe) -> int | None:
    if isinstance(recipe, OwnPictures):
        return None
    if recipe.dataset in CIFAR:
        return CIFAR[recipe.dataset].num_classes
    return (IMAGENET_LT if recipe.dataset == "imagenet-lt" else INAT[recipe.dataset]).classes


def disk_of(recipe: Recipe, pictures: int | None, classes: int | None) -> int | None:
    """Bytes of a run folder; None where the network is chosen from the pictures."""
    if classes is None or recipe.architecture == "auto" or recipe.covariance not in ("full", "diagonal"):
        return None
    weights, width = _size_of(recipe.architecture, classes, recipe.cosine_scale)
    covariances = classes * (width**2 if recipe.covariance == "full" else width) * 4 if recipe.augment != "none" else 0
    features = recipe.cache_features * (pictures or published_pictures(recipe) or 0) * width * 2
    return run_bytes(weights, covariances) + features


@functools.cache
def _size_of(architecture: str, classes: int, cosine_scale: float | None) -> tuple[int, int]:
    """Bytes of the weights, and the width of the last layer's input; no memory is taken for them."""
    import torch

    from zoo.architectures import create

    with torch.device("meta"):
        module = create(architecture, classes, cosine_scale)
    return sum(p.numel() for p in module.parameters()) * 4, module.get_classifier().in_features


# ---- in words ----

# out: by the registry; published: under OWNER; trained: whole, in its run; otherwise: there, by another recipe.
Standing = Literal["out", "published", "trained", "begun", "new", "otherwise"]


@dataclass(frozen=True)
class Planned:
    """A cell, how far it is, and what is left of it."""

    cell: Cell
    standing: Standing
    work: Work
    stage1_from: str | None  # the cell whose first stage it takes; None: its own
    steps: int | None  # that are left
    seconds: float  # that are left, reckoned
    disk: int | None  # bytes of the run when it ends


def plan_table(plan: Sequence[Planned], price: float | None, processes: int,
               rates: Mapping[str, tuple[float, str]]) -> str:
    """The cells that are to do, a line each, their sum, and where the hours are from."""
    names = ["cell", "epochs", "steps", "stage 1", "state", "hours", "cost", "disk"]
    rows = [[row.cell.name, _epochs(row.cell.recipe), "chosen" if row.steps is None else f"{row.steps:,}",
             row.stage1_from or ("its own" if row.work.first else "none"),
             row.standing if row.standing != "new" else "", _hours(row.seconds), _money(row.seconds, price),
             "?" if row.disk is None else size_in_words(row.disk)] for row in plan]
    seconds = sum(row.seconds for row in plan)
    rows.append([in_cells(len(plan)), "", "", "", "", _hours(seconds), _money(seconds, price),
                 size_in_words(sum(row.disk or 0 for row in plan)) if any(row.disk for row in plan) else "?"])
    shown = [k for k, name in enumerate(names) if name not in ("state", "cost") or any(row[k] for row in rows)]
    widths = [max(len(row[k]) for row in (names, *rows)) for k in range(len(names))]
    lines = ["  ".join(row[k].ljust(widths[k]) if names[k] in ("cell", "stage 1", "state") else row[k].rjust(widths[k])
                       for k in shown).rstrip() for row in (names, *rows)]
    return "\n".join([*lines, "", *_sources(plan, price, processes, rates)])


def _epochs(recipe: Recipe) -> str:
    return f"{recipe.stage2_epoch} + {recipe.epochs - recipe.stage2_epoch}" if recipe.epochs else "chosen"


def _money(seconds: float, price: float | None) -> str:
    return "" if price is None else f"{seconds / 3600 * price:,.2f}"


def _sources(plan: Sequence[Planned], price: float | None, processes: int,
             rates: Mapping[str, tuple[float, str]]) -> list[str]:
    """What the columns mean, and the figures that hours are reckoned from."""
    lines = ["Epochs: plain ones + those of the second stage. Steps and hours: what is left. Hours are reckoned from "
             "the pictures a second of plain training, and corrected once a few minutes of a cell were measured:"]
    said: dict[str, list[str]] = {}
    for name in dict.fromkeys(row.cell.entry.dataset for row in plan):
        rate, source = rates.get(name, (0, ""))
        said.setdefault(f"{rate:,.0f} a second, {source}" if rate else "network and length are chosen from the "
                        "pictures, for at most about an hour on a CPU", []).append(name)
    lines += [f"- {', '.join(names)}: {figure}" for figure, names in said.items()]
    counted = dict.fromkeys(filter(None, (_second_stage(row.cell.recipe) for row in plan)))
    if any(row.cell.recipe.cache_features for row in plan):
        lines.append("Where features are cached, that is all that is counted: the views of each picture, once, each a "
                     "third of a plain one.")
    if counted:
        lines.append("A picture in the second stage is counted as " + ", ".join(counted) + ": measured "
                     "(docs/method.md), but for the last layer alone, where forward passes are counted.")
    if processes > 1:
        lines.append(f"{processes} processes are taken to be {processes} times as fast, which was not measured.")
    if price is not None:
        lines.append(f"Cost: hours times {price:g}.")
    return [textwrap.fill(line, 110, subsequent_indent="  " if line[0] == "-" else "") for line in lines]


def _second_stage(recipe: Recipe) -> str | None:
    cost = second_step(recipe)
    where = (", only the last layer trained" if recipe.stands_still(in_stage2=True) else
             f", look-ahead through the {recipe.lookahead}" if recipe.augment == "metasaug" else "")
    return None if cost == 1 or recipe.cache_features else f"{cost:.2g} plain ones ({recipe.method}{where})"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f}" if hours >= 0.05 or not seconds else "< 0.1"


def in_cells(n: int) -> str:
    return f"{n} cell{'s' if n != 1 else ''}"


def results_by_cell(rows: Sequence[tuple[Entry, Mapping | None]], error_of: Callable[[Entry], float | None]) -> str:
    """Our errors beside the published ones, whose sources are named below the table."""
    width = max(len("cell"), *(len(entry.name) for entry, _ in rows))
    marks: dict[str, str] = {}
    lines = [f"{'cell':<{width}} {'error':>8} {'macro':>8} {'worst':>8}  {'head':>7} {'medium':>7} {'tail':>7}  "
             f"{'published':>9}"]

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.2%}"

    for entry, results in rows:
        groups = (results or {}).get("groups", {})
        shares = [groups.get(group, {}).get("accuracy") for group in ("head", "medium", "tail")]
        published, mark = percent(entry.published_error), ""
        if entry.published_source:
            mark = " " + marks.setdefault(entry.published_source, chr(ord("a") + len(marks)))
        figures = [results[key] for key in ("error", "macro_error", "worst_class_error")] if results else [
            error_of(entry), None, None]
        lines.append(f"{entry.name:<{width}} " + " ".join(f"{percent(value):>8}" for value in figures) + "  "
                     + " ".join(f"{percent(value):>7}" for value in shares) + f"  {published:>9}{mark}")
    lines += ["error, macro, worst: wrong share of the test pictures, of a class on average, of the worst class, after "
              "the last epoch;", "head, medium, tail: right share."]
    return "\n".join([*lines, *(f"published, {mark}: {source}" for source, mark in marks.items())])
