"""`metasaug evaluate`: the accuracy of any model on labelled pictures. Needs no torch."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

import zoo
from training.data.datasets import list_class_folders, listed
from training.data.tables import SPLIT_NAMES, list_table
from training.errors import DataError, TrainingError
from training.report.metrics import Tally, results_table
from training.report.page import page, write_text
from training.report.sentences import summary
from zoo.files import printable
from zoo.predictor import Predictor, Prior

BATCH = 256  # logits that are kept at a time


def evaluate(
    model: str,
    /,
    data: Path,
    backend: Literal["onnx", "torch"] = "onnx",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["fp32", "int8"] = "fp32",
    prior: Literal["uniform", "train"] | None = None,
    per_class: bool = False,
    skip_bad: bool = False,
    out: Path | None = None,
    report: Path | None = None,
    predictions: Path | None = None,
) -> dict:
    """Measure a model on labelled pictures: overall, per group and per class.

    The groups are those of the model's own training set. A class of the model without pictures here counts in no
    average; a label that is no class of the model is an error. docs/metrics.md says how each figure is made.

    Args:
        model: A name from `metasaug list`, or a model folder.
        data: Folder of class folders, DATA/CLASS/picture.jpg; or a CSV table with a row a picture, its path from the
            table's own folder and its label. Of a table with splits the rows of test.
        backend: ONNX Runtime, or torch.
        device: auto takes CUDA where there is one.
        precision: int8 is the quantised ONNX file, where the model has one; on the CPU.
        prior: Answer for pictures whose classes are equally frequent, or as frequent as in training.
        per_class: Print a line for each class as well.
        skip_bad: Leave unreadable pictures out (they are named) instead of stopping.
        out: Write the results as JSON here.
        report: Write a page with figures here: one HTML file that needs no other.
        predictions: Write a row for each picture here, as CSV: its label, the answer and how sure the model was.
    """
    for path in (out, report, predictions):
        if path is not None and path.is_dir():
            raise TrainingError(f"{path} is a folder: name a file to write.")
    predictor = zoo.load(model, backend=backend, device=device, precision=precision)
    paths, labels = labelled_pictures(data, predictor, model)
    results, rows = measure(predictor, paths, labels, prior, skip_bad)
    results = {"split": str(data), **({"prior": prior} if prior else {}), **results}
    print(results_table(results))
    print("\n" + "\n".join(summary(predictor.folder.config, results)))
    if per_class:
        print(per_class_table(results))
    table = io.StringIO()
    csv.writer(table).writerows([["path", "label", "answer", "probability", "error"], *rows])
    for path, text in ((out, lambda: json.dumps(results, indent=1) + "\n"),
                       (report, lambda: page(predictor.folder.config, results)), (predictions, table.getvalue)):
        if path is not None:
            write_text(path, text())
            print(f"{path} written")
    return results


def labelled_pictures(data: Path, predictor: Predictor, model: str) -> tuple[list[Path], np.ndarray]:
    """Paths of the pictures, and for each the place of its label among the model's classes. Raises DataError."""
    if data.is_file():
        listing = list_table(data)
        keep = np.array([split == "test" for split in listing.splits])
        if keep.any() and not keep.all():
            print(f"{data}: the {keep.sum():,} rows whose split is test, of {len(keep):,}")
            listing = listing.at(np.flatnonzero(keep))
        paths, labels, names = [listing.root / name for name in listing.names], listing.labels, listing.label_names
    else:
        paths, labels, names = list_class_folders(data)
    place = {name: c for c, name in enumerate(predictor.labels)}
    unknown = sorted({names[c] for c in np.unique(labels)} - set(place))
    if unknown:
        splits = [name for name in unknown if name.casefold() in SPLIT_NAMES]
        hint = f" Did you mean --data {data / splits[-1]}?" if splits and data.is_dir() else ""
        raise DataError(f"{printable(str(data))} has classes that {model} does not know: {listed(unknown, ', ')}.{hint}"
                        f" Its classes: {listed(predictor.labels, ', ')}.")
    return paths, np.array([place.get(name, -1) for name in names])[labels]


def measure(
    predictor: Predictor, paths: Sequence[Path], labels_N: np.ndarray, prior: Prior | None, skip_bad: bool
) -> tuple[dict, list[list]]:
    """Test results, and for each picture a row: path, label, answer, its probability, what was wrong with the file."""
    own = prior if prior is not None else predictor.folder.config["metasaug"].get("prior")
    tally = Tally(predictor.labels, predictor.class_counts, predictor.groups, own)
    shift_C = predictor.prior_shift(prior)
    logits: list[np.ndarray] = []
    places: list[int] = []
    rows: list[list] = []
    bad: list[str] = []

    def flush() -> None:
        if places:
            logits_NC = np.stack(logits)
            tally.add(logits_NC if shift_C is None else logits_NC + shift_C, labels_N[places])
            logits.clear()
            places.clear()

    each = predictor.predict_each(paths, top_k=1, prior=prior)
    for i, answer in enumerate(tqdm(each, total=len(paths), unit="picture", disable=None, dynamic_ncols=True)):
        label = predictor.labels[labels_N[i]]
        if answer.logits is None:
            bad.append(str(answer.error))  # it names the file
            rows.append([answer.source, label, "", "", answer.error])
            continue
        logits.append(answer.logits)
        places.append(i)
        rows.append([answer.source, label, answer.top[0].label, f"{answer.top[0].probability:.6f}", ""])
        if len(places) == BATCH:
            flush()
    flush()
    if bad:
        few = printable(listed(bad, "\n  "))
        if not skip_bad or len(bad) == len(paths):
            raise DataError(f"{len(bad)} of {len(paths)} pictures cannot be read (--skip-bad leaves them out):\n"
                            f"  {few}")
        print(f"left out, unreadable:\n  {few}")
    return tally.results(), rows


def per_class_table(results: dict) -> str:
    """A line a class, in the model's order."""
    width = max(len(row["label"]) for row in results["per_class"])
    lines = [f"  {'class':<{width}} {'trained on':>10} {'right':>7} {'of':>6}"]
    for row in results["per_class"]:
        trained = "?" if row["train_images"] is None else f"{row['train_images']:,}"
        lines.append(f"  {row['label']:<{width}} {trained:>10} {row['correct']:>7,} {row['test_images']:>6,}")
    return "\n".join(lines)
