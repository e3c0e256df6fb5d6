"""Help of `metasaug train`: the flags that most people need first, the others in named groups."""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.command_line import JOBS, Job
from training.recipes import OwnPictures

GROUPS = {
    "Most people need only these": (
        "data", "table", "download", "imbalance", "out", "minutes", "start", "loss", "augment", "epochs", "resume",
        "device", "dry_run"),
    "Data: which pictures are in which split": (
        "test", "meta", "leaf_folders", "path_column", "label_column", "split_column", "group_column", "encoding",
        "test_share", "lists", "subset", "meta_per_class", "meta_in_training", "skip_bad", "subset_seed"),
    "Reading picture files": ("page", "white", "most_missing", "max_megapixels"),
    "Network": ("architecture", "pretrained", "backbone", "last_layer", "cache_features", "features"),
    "Input: how pictures are resized, normalised and varied": (
        "input_size", "train_size", "mean", "std", "interpolation", "crop_mode", "crop_pct", "crops", "crop_area",
        "flips", "sampling", "color_jitter"),
    "Schedule": ("batch_size", "lr", "lr_drop", "schedule", "momentum", "weight_decay", "seed"),
    "Stage 1 and stage 2": (
        "stage1", "stage1_loss", "stage2_epochs", "stage2_lr", "stage2_batch_size", "stage2_trains", "freeze"),
    "Method: class weights and augmentation": (
        "class_weights", "beta", "strength", "covariance", "meta_rate", "lookahead", "fidelity"),
    "Method: losses": ("gamma", "max_margin", "scale", "tau"),
    "Speed and memory": ("workers", "in_memory", "precision", "accumulate", "compile", "deterministic"),
    "Log and checkpoints": ("name", "evaluate_every", "save_minutes", "tensorboard"),
}

OVERVIEW = """usage: metasaug train DATA_SET [flags]      metasaug train DATA_SET --help

Train a model on long-tailed pictures. The run ends with report.html and a model folder.

Your own pictures:
  metasaug train folder --data pictures/            pictures/CLASS/picture.jpg
  metasaug train table --table rows.csv             columns path and label

Benchmarks:
  metasaug train cifar10-lt --data DIR --imbalance 100 --augment metasaug

"""


class Flag(NamedTuple):
    name: str
    value: str  # what follows the flag, empty for a switch
    help: str
    default: Any


def help_of(arguments: Sequence[str]) -> str:
    """What `metasaug train ARGUMENTS` prints if the arguments ask for help."""
    jobs = {job.recipe.dataset: job for job in JOBS}
    job = next((jobs[word] for word in arguments if word in jobs), None)
    return OVERVIEW + _data_sets() if job is None else _help(job)


def help_of_check(arguments: Sequence[str]) -> str:
    """What `metasaug data check ARGUMENTS` prints if the arguments ask for help."""
    from training.data.check import check

    about, _, texts = (inspect.getdoc(check) or "").partition("\n\nArgs:\n")
    flags = [Flag(name, "PATH" if name == "write_table" else "", " ".join(text.split()), None)
             for name, text in re.findall(r"^    (\w+): (.*(?:\n      .*)*)", texts, re.MULTILINE)]
    return "\n\n".join([
        "usage: metasaug data check DATA_SET [flags]", about,
        "\n".join(["Flags:", *(_entry(flag._replace(name=flag.name.removeprefix("as_")), _width()) for flag in flags)]),
        "Every flag of `metasaug train DATA_SET` works here too: see `metasaug train DATA_SET --help`.", _data_sets()])


def _data_sets() -> str:
    """One line per data set, your own pictures first."""
    recipes = sorted((job.recipe for job in JOBS), key=lambda recipe: not isinstance(recipe, OwnPictures))
    return "\n".join(["Data sets:", *(f"  {recipe.dataset:<12} {(inspect.getdoc(type(recipe)) or '').splitlines()[0]}"
                                      for recipe in recipes)])


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 120)


def _help(job: Job) -> str:
    width = _width()
    flags = {flag.name: flag for flag in flags_of(job)}
    parts = [f"usage: metasaug train {job.recipe.dataset} [flags]"]
    for paragraph in inspect.cleandoc(type(job.recipe).__doc__ or "").replace("\nCost:", "\n\nCost:").split("\n\n"):
        parts.append(textwrap.fill(" ".join(paragraph.split()), width))
    for title, names in GROUPS.items():
        if shown := [_entry(flags.pop(name), width) for name in names if name in flags]:
            parts.append("\n".join([f"{title}:", *shown]))
    if flags:
        parts.append("\n".join(["Others:", *(_entry(flag, width) for flag in flags.values())]))
    return "\n\n".join(parts)


def _entry(flag: Flag, width: int) -> str:
    dashes = "--no-" if flag.default is True else "--"
    left = f"  {dashes}{flag.name.replace('_', '-')} {flag.value}".rstrip()
    text = flag.help if flag.default is None or isinstance(flag.default, bool) else f"{flag.help} [{flag.default}]"
    indent = 24
    lines = textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
    if len(left) + 2 <= indent:
        return "\n".join([left.ljust(indent) + lines[0].lstrip(), *lines[1:]])
    return "\n".join([left, *lines])


def flags_of(holder: Any) -> Iterator[Flag]:
    """The flags of a job and of the dataclasses in it: recipe, run options, columns of a table."""
    kind = type(holder)
    hints, texts = typing.get_type_hints(kind), _field_texts(kind)
    for field in dataclasses.fields(kind):
        value = getattr(holder, field.name)
        if dataclasses.is_dataclass(value):
            yield from flags_of(value)
        else:
            yield Flag(field.name, _value(hints[field.name]), texts[field.name], value)


def _value(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(typing.get_args(hint))
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) is tuple:
        return "R G B"
    if options:
        return "|".join(map(_value, options))
    return {bool: "", Path: "PATH", str: "NAME", int: "N", float: "X"}[hint]


def _field_texts(kind: type) -> dict[str, str]:
    """The docstring under each field; a subclass's replaces the one that it overrides."""
    texts: dict[str, str] = {}
    for owner in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts
