"""`metasaug list`, `info` and `predict`."""

import csv
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

import zoo
from zoo.errors import ZooError
from zoo.files import passed_over_in_words, printable
from zoo.hub import OWNER, own_copies
from zoo.listing import pictures_of
from zoo.loading import open_folder
from zoo.model_folder import CARD
from zoo.pixels import LOCAL, Reading, Remarks
from zoo.predictor import Prediction
from zoo.registry import PAPER
from zoo.rows import cells, header
from zoo.tables import USUAL, Columns, pictures_in_table


def list_table(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """The models of the zoo: data set, method, where the weights are, test error.

    Args:
        as_json: One JSON array instead of the table.
    """
    rows: list[dict[str, Any]] = [
        {"name": e.name, "aliases": e.aliases, "dataset": e.dataset, "imbalance": e.imbalance, "method": e.method,
         "loss": e.loss, "classes": e.classes, "weights": e.weights,
         "error": e.measured_error, "published_error": e.published_error, "published_source": e.published_source,
         "summary": e.summary, "command": e.command, "hub": None if e.hub is None else f"{e.hub.repo}@{e.hub.revision}"}
        for e in zoo.list_models()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    width = max(len(row["name"]) for row in rows)
    print(f"{'name':<{width}}  {'data set':<11} {'imbalance':>9}  {'weights':<11} {'error':>7} {'paper':>7}")
    for row in rows:
        imbalance = "-" if row["imbalance"] is None else format(row["imbalance"], "g")
        print(f"{row['name']:<{width}}  {row['dataset']:<11} {imbalance:>9}  {row['weights']:<11} "
              f"{_percent(row['error']):>7} {_percent(row['published_error']):>7}")
    print("\nerror: ours, last epoch, on the data below; "
          "paper: the published cell (CIFAR: original pictures, 200 epochs).")
    for row in rows:
        if row["published_source"] not in (None, PAPER):
            print(f"{row['name']}, paper: {row['published_source']}")
    for row in rows:
        if row["weights"] != "unpublished":
            print(f"{row['name']}: {row['summary']}")
    if owner := own_copies():
        print(f"{OWNER}={owner}: what is not bundled loads from hf:{owner}/NAME.")


def info(model: tyro.conf.Positional[str]) -> None:
    """The card of a model: how it was trained, what it gets right per group and class, its limits.

    Args:
        model: A name from `metasaug list`, hf:owner/repo[@revision] on the Hub, or a model folder.
    """
    print(open_folder(model, [CARD]).card)


def predict(
    model: tyro.conf.Positional[str],
    paths: tyro.conf.Positional[list[Path]],
    out: Path | None = None,
    top_k: int = 5,
    prior: Literal["uniform", "train"] | None = None,
    backend: Literal["onnx", "torch"] = "onnx",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["fp32", "int8"] = "fp32",
    table: Path | None = None,
    columns: Annotated[Columns, tyro.conf.arg(name="")] = USUAL,
    reading: Annotated[Reading, tyro.conf.arg(name="")] = LOCAL,
) -> int:
    """Classify pictures. Exit code 0: all read; 1: some could not be, each with its reason; 2: nothing was done.

    Args:
        model: A name from `metasaug list`, hf:owner/repo[@revision] on the Hub, or a model folder.
        paths: Pictures, folders of them, zip files of them, which are read without unpacking, or tables (CSV, COCO
            JSON) that name them by paths from the table's own folder.
        table: A table, where the one PATH is the folder that its paths start from.
        out: Write rows here as CSV instead of printing; - is standard output.
        top_k: Classes shown for each picture.
        prior: Answer for pictures whose classes are equally frequent, or as frequent as in training.
        backend: ONNX Runtime, or torch.
        device: auto takes CUDA where there is one.
        precision: int8 is the quantised ONNX file, where the model has one; on the CPU.
    """
    if not paths:
        raise ZooError("name at least one picture or folder.")
    missing = [str(path) for path in paths if not os.path.exists(path)]
    if len(missing) == len(paths):
        raise ZooError(f"{', '.join(missing)}: no such file or folder.")
    if table is not None and len(paths) != 1:
        raise ZooError("--table goes with one path: the folder that the table's paths start from.")
    predictor = zoo.load(model, backend=backend, device=device, precision=precision)
    predictor.reading = reading.over(predictor.reading.to_dict())
    passed_over: Counter[str] = Counter()
    remarks = Remarks()
    pictures = pictures_in_table(table, paths[0], columns) if table else pictures_of(paths, passed_over, columns)
    rows = remarks.noted(predictor.predict_each(pictures, top_k, prior))
    rows = itertools.chain([next(rows)], rows)  # a flag that makes no sense is told before a file is opened
    if out is None or str(out) == "-":
        code = _count_bad(_printed(rows) if out is None else _written(rows, sys.stdout, top_k))
    else:
        try:
            with open(out, "w", newline="", encoding="utf-8") as file:
                code = _count_bad(_written(rows, file, top_k))
        except OSError as error:
            raise ZooError(f"--out {out} cannot be written: {error.strerror or error}.") from error
        print(f"{out} written", file=sys.stderr)
    for remark in (*remarks.in_words(predictor.reading), passed_over_in_words(passed_over)):
        if remark:
            print(remark, file=sys.stderr)
    return code


def _printed(rows: Iterator[Prediction]) -> Iterator[Prediction]:
    for row in rows:
        print(printable(str(row)))
        yield row


def _written(rows: Iterator[Prediction], file: TextIO, top_k: int) -> Iterator[Prediction]:
    writer = csv.writer(file)
    writer.writerow(header(top_k))
    for row in rows:
        writer.writerow(cells(row, top_k))
        yield row


def _count_bad(rows: Iterator[Prediction]) -> int:
    bad = total = 0
    for row in rows:
        total += 1
        bad += row.error is not None
    if bad:
        print(f"{bad} of {total} could not be read; their rows say why.", file=sys.stderr)
    return 1 if bad else 0


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
