"""`metasaug data check`: report splits, the long tail, problems and cost of a data set before you train on it."""

import dataclasses
import json
import math
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from training.command_line import AnyJob, Job, choose_device, settle
from training.data.datasets import LongTailed, PictureFiles, Split, content_key, listed, size_in_words
from training.data.tables import left_out_in_words
from training.errors import DataError
from training.recipes import Recipe
from training.report.metrics import wilson_interval
from zoo.files import printable
from zoo.images import decode
from zoo.labels import GROUPS, TAIL_BELOW, assign_groups, meaning_of
from zoo.machine import cores
from zoo.pixels import Reading

# Steps of stage 2 against plain ones (docs/method.md): the look-ahead through the network costs most.
STAGE2_STEP = {"none": 1.0, "isda": 1.1, "auto": 1.1, "heldout": 1.5, "classifier": 1.4, "network": 3.8}
FORWARD = 1 / 3  # of a plain step, by counting passes: cost of a picture if only the last layer trains


def passes(recipe: Recipe) -> tuple[float, float]:
    """Cost of each stage, in plain passes over the training pictures. Steps on cached features count as 0."""
    still = recipe.stands_still(in_stage2=False)
    stages = (recipe.stage2_epoch * (FORWARD if still else 1),
              (recipe.epochs - recipe.stage2_epoch) * second_step(recipe))
    if not recipe.cache_features:
        return stages
    views = recipe.cache_features * FORWARD
    return (views, 0.0) if still and recipe.stage2_epoch else (stages[0], views)


def second_step(recipe: Recipe) -> float:
    """Cost of a picture in stage 2, in plain steps."""
    if recipe.stands_still(in_stage2=True):
        return FORWARD * (2 if recipe.looks_at_meta else 1)  # the meta batch is as large
    return STAGE2_STEP[recipe.lookahead if recipe.augment == "metasaug" else recipe.augment]


@tyro.conf.configure(tyro.conf.CascadeSubcommandArgs)  # allow flags after the data set's name
def check(
    job: AnyJob,
    quick: bool = False,
    per_class: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    write_table: Path | None = None,
) -> int:
    """Check a data set before training: missing and damaged pictures, splits, the long tail, the expected cost.

    Exit code 0: ready; 1: training would stop at bad pictures, unless you add --skip-bad; 2: no data set.

    Args:
        quick: Do not decode pictures. Damaged pictures, copies and sizes remain unknown.
        per_class: Also print one line per class.
        as_json: Print everything as JSON.
        write_table: Write pictures and splits to this CSV file. `metasaug train table` then keeps the splits.
    """
    stops = not getattr(job.recipe, "skip_bad", False)
    data = _tolerant(job).load(look=not quick)
    findings = look(data)
    findings["expected"] = None if quick else expect(job, data)
    if write_table is not None:
        write_cut(write_table, data)
    print(json.dumps(findings, indent=1) if as_json else in_words(findings, per_class))
    return int(stops and bool(data.left_out))


def _tolerant(job: Job) -> Job:
    """The same job with --skip-bad, so that the check names all problems."""
    if not hasattr(job.recipe, "skip_bad"):
        return job
    return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, skip_bad=True))


# ---- what is there ----


def look(data: LongTailed) -> dict[str, Any]:
    """Counts, groups, sizes and copies, as plain values."""
    classes = len(data.label_names)
    counts = data.class_counts
    tested, meta = (np.bincount(split.labels, minlength=classes).tolist() for split in (data.test, data.meta))
    groups, groups_by = assign_groups(counts)
    by_group = {}
    for group in GROUPS:
        members = [c for c in range(classes) if groups[c] == group]
        if members:
            of_members = [counts[c] for c in members]
            pictures = sum(tested[c] for c in members)
            by_group[group] = {
                "classes": len(members), "training": sum(of_members), "smallest": min(of_members),
                "largest": max(of_members), "test": pictures, "meta": sum(meta[c] for c in members),
                "known_to": _known_to(pictures), "test_of_a_class": int(np.median([tested[c] for c in members])),
            }
    return {
        "source": data.source, "classes": classes, "training": len(data.train), "meta": len(data.meta),
        "test": len(data.test), "largest": max(counts), "smallest": min(counts),
        "imbalance": max(counts) / min(counts), "groups_by": groups_by, "groups": by_group,
        "untested_classes": [data.label_names[c] for c in data.untested_classes],
        "shared_meta_classes": len(data.shared_meta_classes), "sizes": _sizes(data),
        "copies": _copies_in_memory(data),
        "notes": [printable(note) for note in data.notes if note not in left_out_in_words(data.left_out)],
        "left_out": [printable(reason) for reason in data.left_out],
        "per_class": [{"label": name, "training": counts[c], "meta": meta[c], "test": tested[c], "group": groups[c],
                       "meta_is_shared": c in data.shared_meta_classes} for c, name in enumerate(data.label_names)],
    }


def _known_to(pictures: int) -> float:
    """Largest half-width of the 95 % interval of a share that is measured on this many pictures."""
    low, high = wilson_interval(pictures // 2, pictures)
    return (high - low) / 2


def _sizes(data: LongTailed) -> dict[str, list[int]] | None:
    """Width and height of the smallest, the median and the largest picture, by area."""
    splits = (data.train, data.meta, data.test)
    if isinstance(data.train, Split):
        height, width = data.train.pictures.shape[1:3]
        return {"smallest": [width, height], "median": [width, height], "largest": [width, height]}
    known = [split.sizes for split in splits if isinstance(split, PictureFiles) and split.sizes is not None]
    if not known:
        return None
    sizes = np.concatenate(known)
    by_area = sizes[np.argsort(sizes.prod(1, dtype=np.int64), kind="stable")]
    return {"smallest": by_area[0].tolist(), "median": by_area[len(by_area) // 2].tolist(),
            "largest": by_area[-1].tolist()}


def _copies_in_memory(data: LongTailed) -> int | None:
    """Test pictures that are also in training or meta, by content. For files, the notes name them instead."""
    if not (isinstance(data.train, Split) and isinstance(data.meta, Split) and isinstance(data.test, Split)):
        return None
    learned = {content_key(picture.tobytes()) for split in (data.train, data.meta) for picture in split.pictures}
    return sum(content_key(picture.tobytes()) in learned for picture in data.test.pictures)


def write_cut(path: Path, data: LongTailed) -> None:
    """Write a table that training.data.tables.list_table reads back into the same splits.

    Meta pictures that are also in training are written as training pictures; the same ones are picked again.
    """
    import csv

    if not all(isinstance(split, PictureFiles) for split in (data.train, data.meta, data.test)):
        raise DataError("--write-table: this data set is held in memory and has no file names to write.")
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "split"])
            training = set(data.train.names)  # type: ignore[union-attr]
            for split in ("train", "meta", "test"):
                files = getattr(data, split)
                writer.writerows([name, data.label_names[c], split]
                                 for name, c in zip(files.names, files.labels.tolist(), strict=True)
                                 if split != "meta" or name not in training)
    except (OSError, UnicodeEncodeError) as error:
        raise DataError(f"--write-table {path} cannot be written: {error}.") from error


# ---- what it will take ----


def expect(job: Job, data: LongTailed) -> dict[str, Any] | None:
    """Time, memory and disk of this job's run, estimated from two steps and a few pictures. None without torch."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return None
    device = choose_device(job.options.device)
    recipe, reasons = settle(job.recipe, data, device, None)
    return {"chosen": reasons, **measured(recipe, data, device)}


def measured(recipe: Recipe, data: LongTailed, device) -> dict[str, Any]:
    import torch

    from training.network.prepared import prepared
    from training.run.stages import run_bytes
    from zoo.architectures import create

    own_size = data.train.pictures.shape[1] if isinstance(data.train, Split) else 224
    size = recipe.train_size or recipe.input_size or own_size
    torch.manual_seed(0)
    module = prepared(create(recipe.architecture, len(data.label_names)), device).train()
    pictures = min(recipe.batch_size, 16)
    batch = torch.rand(pictures, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(pictures, device=device) % len(data.label_names)
    activations = {}

    def note(tensor):
        activations[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step() -> float:
        """Seconds of a step; on a CPU processor time per core, so other programs do not count."""
        began = clock()
        torch.nn.functional.cross_entropy(module(batch), labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (clock() - began) / threads

    threads = torch.get_num_threads() if device.type == "cpu" else 1
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    batch_bytes = sum(activations.values()) / pictures * recipe.batch_size
    a_picture = min(step(), step()) / pictures
    weights = sum(p.numel() for p in module.parameters()) * 4
    width: int = module.get_classifier().in_features  # type: ignore[operator, union-attr]
    covariance = len(data.label_names) * (width**2 if recipe.covariance == "full" else width) * 4
    reading = 0.0 if isinstance(data.train, Split) else _seconds_to_read(data.train, data.reading)
    shown = sum(recipe.shown_counts(data.class_counts))
    features = (recipe.cache_features * (len(data.train) + len(data.meta)) * 2 + len(data.test) * 4) * width
    return {
        "architecture": recipe.architecture, "input_size": recipe.input_size or own_size, "epochs": recipe.epochs,
        "device": str(device),
        "seconds": shown * a_picture * sum(passes(recipe)),
        "seconds_to_read_an_epoch": reading * shown / cores(),
        "memory": {"network_and_batch": round(3 * weights + batch_bytes), "covariances": 2 * covariance,
                   "pictures_at_input_size": (len(data.train) + len(data.meta) + len(data.test)) * size * size * 3},
        "disk_of_the_run": run_bytes(weights, covariance) + (features if recipe.cache_features else 0),
        "disk_of_the_pictures": None if isinstance(data.train, Split) else _disk(data),
    }


def _seconds_to_read(files: PictureFiles, reading: Reading) -> float:
    """Seconds per picture on one core."""
    sample = _spread(files.names, 40)
    began = time.process_time()
    for name in sample:
        decode(files.root / name, reading=reading)
    return (time.process_time() - began) / len(sample)


def _disk(data: LongTailed) -> int:
    names = list(dict.fromkeys(name for files in (data.train, data.meta, data.test) for name in _files(files).names))
    sample = _spread(names, 400)
    return round(sum((_files(data.train).root / name).stat().st_size for name in sample) / len(sample) * len(names))


def _files(split: Split | PictureFiles) -> PictureFiles:
    assert isinstance(split, PictureFiles)
    return split


def _spread(names: Sequence[str], most: int) -> list[str]:
    return [names[i] for i in np.linspace(0, len(names) - 1, min(most, len(names))).astype(int)]


# ---- in words ----


def in_words(found: dict[str, Any], per_class: bool = False) -> str:
    """The findings for a terminal."""
    lines = [found["source"],
             f"  {found['training']:,} training, {found['meta']:,} meta and {found['test']:,} test pictures in "
             f"{found['classes']:,} classes",
             f"  training: {found['largest']:,} pictures in the largest class, {found['smallest']:,} in the smallest, "
             f"imbalance {found['imbalance']:.3g}"]
    if found["sizes"]:
        small, median, large = (f"{w} x {h}" for w, h in found["sizes"].values())
        lines.append(f"  sizes (width x height): {small} to {large}, median {median}" if small != large else
                     f"  every picture {small}")
    if found["copies"] is not None:
        lines.append(f"  test pictures that are also in training or meta, by content: {found['copies']:,}")
    lines += ["", *_problems(found["left_out"]), *_group_table(found), "", "What to expect:"]
    lines += [_wrapped(sentence) for sentence in _expectations(found)]
    if found["notes"]:
        lines += ["", "Notes:", *(_wrapped(note) for note in found["notes"])]
    if per_class:
        lines += ["", *_class_table(found["per_class"])]
    return "\n".join([*lines, "", *_cost_in_words(found["expected"])])


def _wrapped(sentence: str) -> str:
    return textwrap.fill(sentence, 110, initial_indent="  ", subsequent_indent="    ", break_long_words=False,
                         break_on_hyphens=False)


def _problems(bad: Sequence[str]) -> list[str]:
    if not bad:
        return []
    return [f"{len(bad):,} cannot be used. Training stops because of them, or leaves them out with --skip-bad:",
            *(f"  {reason}" for reason in bad[:20]),
            *([f"  … and {len(bad) - 20:,} more (--json has all)"] if len(bad) > 20 else []), ""]


def _group_table(found: dict[str, Any]) -> list[str]:
    """One line per group; the last columns say how exactly its test pictures can measure accuracy."""
    lines = [f"{'group':<24}{'classes':>8}{'training':>10}{'meta':>8}{'test':>8}{'a class':>16}   accuracy known to",
             f"{'':<58}{'in training':>16}   group    a class"]
    for group, g in found["groups"].items():
        title = f"{group} ({meaning_of(group, found['groups_by'], unit='')})"
        lines.append(f"{title:<24}{g['classes']:>8,}{g['training']:>10,}{g['meta']:>8,}{g['test']:>8,}"
                     f"{_range([g['smallest'], g['largest']]):>16}   ± {100 * g['known_to']:<6.1f} "
                     f"± {100 * _known_to(g['test_of_a_class']):.0f} points")
    return lines


def _class_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    width = max(len(row["label"]) for row in rows)
    return [f"{'class':<{width}} {'training':>9} {'meta':>6} {'test':>6}  group",
            *(f"{row['label']:<{width}} {row['training']:>9,} {row['meta']:>5,}{'*' if row['meta_is_shared'] else ' '} "
              f"{row['test']:>6,}  {row['group']}" for row in sorted(rows, key=lambda row: -row["training"])),
            "* these meta pictures are also training pictures"]


def _expectations(found: dict[str, Any]) -> list[str]:
    """What to expect in the tail, and how exactly the test will measure it."""
    small = [row for row in found["per_class"] if row["training"] < TAIL_BELOW]
    if small:
        tested = [row["test"] for row in small]
        fewest = sorted(small, key=lambda row: row["training"])[:5]
        sentences = [
            f"{_classes(len(small))} under {TAIL_BELOW} training pictures. The accuracy of one class, on "
            f"{_range(tested)} test pictures, is known to ± {100 * _known_to(int(np.median(tested))):.0f} points only; "
            f"that of all together, on {sum(tested):,}, to ± {100 * _known_to(sum(tested)):.0f}.",
            "The smallest: " + ", ".join(f"{row['label']} ({row['training']:,})" for row in fewest)
            + ". More pictures of these, for training and for the test, help more than any method."]
    else:
        sentences = [f"No class has under {TAIL_BELOW} training pictures."]
    if found["imbalance"] < 3:
        sentences.append("The classes have nearly the same size, so a long-tail method can gain little.")
    else:
        sentences.append(f"Plain training sees the largest class {found['imbalance']:,.0f} times as often as the "
                         "smallest and prefers it: the overall error looks good while rare classes are missed. Read "
                         "the lines of medium and tail, and compare with --augment none.")
    if found["untested_classes"]:
        sentences.append(f"{_classes(len(found['untested_classes']))} no test picture, so their accuracy will not be "
                         f"known: {listed(found['untested_classes'], ', ')}.")
    return sentences


def _classes(n: int) -> str:
    return f"{n:,} class{'es have' if n != 1 else ' has'}"


def _range(values: Sequence[int]) -> str:
    return f"{min(values):,} to {max(values):,}" if min(values) != max(values) else f"{values[0]:,}"


def _cost_in_words(cost: dict[str, Any] | None) -> list[str]:
    if cost is None:
        return ["Time, memory and disk were not estimated (--quick, or no torch here)."]
    memory, reading, pictures = cost["memory"], cost["seconds_to_read_an_epoch"], cost["disk_of_the_pictures"]
    alone = " with nothing else running" if cost["device"] == "cpu" else ""
    return [
        *(["Chosen for these pictures on this machine:", *map(_wrapped, cost["chosen"])] if cost["chosen"] else []),
        f"Estimates, from two steps measured here: {cost['architecture']} at {cost['input_size']} x "
        f"{cost['input_size']}, {cost['epochs']} epochs on {cost['device']}{alone}",
        f"  time     {duration_in_words(cost['seconds'])}"
        + (f"; reading the pictures once, {duration_in_words(reading)} on {cores()} cores" if reading else ""),
        f"  memory   {size_in_words(memory['network_and_batch'])} for the network and a batch, "
        f"{size_in_words(memory['covariances'])} for covariances, "
        f"{size_in_words(memory['pictures_at_input_size'])} if all pictures are kept in memory",
        f"  disk     {size_in_words(cost['disk_of_the_run'])} for the run"
        + (f"; the pictures themselves are {size_in_words(pictures)}" if pictures else ""),
    ]


def duration_in_words(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}" if seconds > 10 * length else f"{seconds / length:.1f} {unit}"
    return f"{math.ceil(seconds)} seconds" if seconds > 1 else "a second"
