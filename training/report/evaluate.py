"""`metasaug evaluate`: the accuracy of any model on labelled pictures. Needs no torch."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

import zoo
from training.data.datasets import listed
from training.data.tables import SPLIT_NAMES, Problem, left_out_in_words, list_folder, list_table, refuse
from training.errors import DataError, TrainingError
from training.report.metrics import Tally, results_table
from training.report.page import page, write_text
from training.report.sentences import summary
from zoo.files import printable, same_text
from zoo.pixels import LOCAL, Reading, Remarks
from zoo.predictor import Predictor, Prior
from zoo.tables import USUAL, Columns

BATCH = 256  # pictures whose logits are kept at a time


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
    leaf_folders: bool = False,
    table: Path | None = None,
    columns: Annotated[Columns, tyro.conf.arg(name="")] = USUAL,
    reading: Annotated[Reading, tyro.conf.arg(name="")] = LOCAL,
    out: Path | None = None,
    report: Path | None = None,
    predictions: Path | None = None,
) -> dict:
    """Measure a model on labelled pictures: overall, per group and per class.

    Groups (head, medium, tail) are by the model's own training set. A class without pictures here counts in no average.
    A label that the model does not know is an error. docs/metrics.md explains each figure.

    Args:
        model: A name from `metasaug list`, or a model folder.
        data: Folder of class folders, DATA/CLASS/picture.jpg, or a table (CSV, COCO JSON) with path and label of each
            picture. Its paths are relative to the table. If there are splits, only test pictures are measured.
        table: The table, if --data is the folder that its paths start from.
        backend: ONNX Runtime, or torch.
        device: auto uses CUDA if there is one.
        precision: int8 uses the quantised ONNX file, if the model has one; CPU only.
        prior: Class frequencies to assume. uniform: all equal; train: as in training.
        per_class: Also print a line for each class.
        skip_bad: Leave out unreadable pictures and classes that the model does not know, and name them, instead of
            stopping.
        leaf_folders: Make every folder that contains pictures a class, at any depth. By default only the outermost
            folders are classes.
        out: Write the results to this JSON file.
        report: Write a report with figures to this HTML file. It needs no other file.
        predictions: Write a row for each picture to this CSV file: label, answer and probability.
    """
    for path in (out, report, predictions):
        if path is not None and path.is_dir():
            raise TrainingError(f"{path} is a folder: name a file to write.")
    predictor = zoo.load(model, backend=backend, device=device, precision=precision)
    predictor.reading = reading.over(predictor.reading.to_dict())
    paths, labels = labelled_pictures(data, predictor, model, skip_bad, leaf_folders, table, columns)
    results, rows = measure(predictor, paths, labels, prior, skip_bad)
    results = {"split": str(data), **({"prior": prior} if prior else {}), **results}
    print(results_table(results))
    print("\n" + "\n".join(summary(predictor.folder.config, results)))
    if per_class:
        print(per_class_table(results))
    written = io.StringIO()
    csv.writer(written).writerows([["path", "label", "answer", "probability", "error"], *rows])
    for path, text in ((out, lambda: json.dumps(results, indent=1) + "\n"),
                       (report, lambda: page(predictor.folder.config, results)), (predictions, written.getvalue)):
        if path is not None:
            write_text(path, text())
            print(f"{path} written")
    return results


def labelled_pictures(
    data: Path, predictor: Predictor, model: str, skip_bad: bool = False, leaf_folders: bool = False,
    table: Path | None = None, columns: Columns = USUAL,
) -> tuple[list[Path], np.ndarray]:
    """Paths of the pictures, and the class index of each in the model. Raises DataError."""
    listing = (list_table(table, data, columns) if table else list_table(data, None, columns) if data.is_file()
               else list_folder(data, leaf_folders=leaf_folders))
    notes = list(listing.notes)
    if listing.empty:
        notes.append(f"Class folders without pictures are not measured: {listed(listing.empty, ', ')}.")
    keep = np.array([split == "test" for split in listing.splits], bool)
    if keep.any() and not keep.all():
        notes.append(f"{data}: the {keep.sum():,} pictures whose split is test, of {len(keep):,}")
        listing = listing.at(np.flatnonzero(keep))
    place = {same_text(name): c for c, name in enumerate(predictor.labels)}
    classes = np.array([place.get(name, -1) for name in listing.label_names], np.int64)[listing.labels]
    unknown = Counter(listing.label_names[c] for c in listing.labels[classes < 0])
    splits = [name for name in unknown if name.casefold() in SPLIT_NAMES]
    hint = (f" Did you mean --data {data / splits[-1]}?" if splits and data.is_dir() else
            " Did you mean --leaf-folders?" if listing.inner else "")
    refused = Problem(f"class{'es' if len(unknown) > 1 else ''} of {printable(str(data))} unknown to {model}",
                      tuple(f"{name}: {n:,} pictures." for name, n in sorted(unknown.items())),
                      f"Its classes: {listed(predictor.labels, ', ')}.{hint} Rename or remove them")
    left_out = refuse([*listing.problems, refused], skip_bad and unknown.total() < len(classes))
    if not len(classes):
        raise DataError(f"{printable(str(data))} holds no pictures to measure on. {' '.join(notes)}".strip())
    print("\n".join([*notes, *left_out_in_words(left_out)]), end="\n" if notes or left_out else "")
    return [listing.root / name for name in listing.at(np.flatnonzero(classes >= 0)).names], classes[classes >= 0]


def measure(
    predictor: Predictor, paths: Sequence[Path], labels_N: np.ndarray, prior: Prior | None, skip_bad: bool
) -> tuple[dict, list[list]]:
    """Test results, and a row for each picture: path, label, answer, its probability, the file's error if any."""
    own: Any = prior if prior is not None else predictor.folder.config["metasaug"].get("prior")
    tally = Tally(predictor.labels, predictor.class_counts, predictor.groups, own)
    shift_C = predictor.prior_shift(prior)
    logits: list[np.ndarray] = []
    places: list[int] = []
    rows: list[list] = []
    bad: list[str] = []

    def flush() -> None:
        if places:
            logits_NC = np.stack(logits)
            tally.add(predictor.scores(logits_NC, shift_C), labels_N[places])
            logits.clear()
            places.clear()

    remarks = Remarks()
    each = remarks.noted(predictor.predict_each(paths, top_k=1, prior=prior))
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
    print("\n".join(remarks.in_words(predictor.reading)), end="\n" if remarks.in_words(predictor.reading) else "")
    return tally.results(), rows


def per_class_table(results: dict) -> str:
    """One line per class, in the model's order."""
    width = max(len(row["label"]) for row in results["per_class"])
    lines = [f"  {'class':<{width}} {'trained on':>10} {'correct':>7} {'of':>6}"]
    for row in results["per_class"]:
        trained = "?" if row["train_images"] is None else f"{row['train_images']:,}"
        lines.append(f"  {row['label']:<{width}} {trained:>10} {row['correct']:>7,} {row['test_images']:>6,}")
    return "\n".join(lines)
