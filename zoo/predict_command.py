"""`metasaug predict`: pictures in, answers on the screen or rows in a file."""

import csv
import itertools
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

import zoo
from zoo import on_ray
from zoo.calibration import UNFAMILIAR
from zoo.errors import Interrupted, ZooError
from zoo.files import passed_over_in_words, printable, same_text
from zoo.listing import expanded, number_of_pictures, paths_in_list, pictures_of
from zoo.pixels import LOCAL, Reading, Remarks
from zoo.predictor import Prediction, Predictor
from zoo.review import Review
from zoo.rows import Layout, as_cells
from zoo.rows_file import RowsFile, earlier_setting, refuse_out
from zoo.signals import stop_signals
from zoo.tables import USUAL, Columns, pictures_in_table

ESTIMATED_FROM = 5_000  # at most, for --prior estimate


def predict(
    model: tyro.conf.Positional[str],
    paths: tyro.conf.Positional[list[Path]] = [],  # noqa: B006  (tyro shows it)
    out: Path | None = None,
    paths_from: Annotated[Path | None, tyro.conf.arg(name="list")] = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Literal["auto", "on", "off"] = "auto",
    copy_to: Path | None = None,
    link_to: Path | None = None,
    top_k: int = 5,
    threshold: float | None = None,
    coverage: float | None = None,
    classes: Path | None = None,
    exclude: tyro.conf.UseAppendAction[list[str]] = [],  # noqa: B006
    prior: Literal["uniform", "train", "estimate"] | Path | None = None,
    batch: int = 64,
    workers: int | None = None,
    ray: bool = False,
    backend: Literal["onnx", "torch"] = "onnx",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["fp32", "int8"] = "fp32",
    reduced: bool = True,
    table: Path | None = None,
    columns: Annotated[Columns, tyro.conf.arg(name="")] = USUAL,
    reading: Annotated[Reading, tyro.conf.arg(name="")] = LOCAL,
) -> int:
    """Classify pictures.

    Exit code 0: every picture was read; 1: some could not be read, and their rows say why; 2: an error ended the run;
    130, 143 or 129: Ctrl-C, SIGTERM or SIGHUP ended it. The rows so far stay in --out.

    Args:
        model: A name from `metasaug list`, hf:owner/repo[@revision] on the Hub, or a model folder.
        paths: Pictures, folders (links are followed), zip files, quoted patterns such as "*/*.jpg", or tables (CSV,
            COCO JSON) with paths relative to the table's folder; - reads a list of all these from standard input.
        out: Write rows to this .csv, .jsonl or .parquet file instead of printing; - prints CSV. With --out FILE the
            run can be continued.
        paths_from: A file that lists pictures, folders and zip files, one per line.
        resume: Continue --out where an earlier run ended; start it if there is none.
        overwrite: Replace --out if it exists.
        progress: Show a bar with rate and time left; auto shows it if standard error is a terminal.
        copy_to: Copy each picture to COPY-TO/CLASS/PROBABILITY NAME, for review by hand. In each folder the least sure
            answers come first.
        link_to: Like --copy-to, with links, which take no space.
        top_k: Classes shown for each picture.
        threshold: Mark an answer as unsure if its probability is lower.
        coverage: Give each picture a set of classes that holds the true one with this probability, such as 0.9. The
            model needs a calibration.
        classes: A file with the classes that can occur, one per line. Other classes are never answers.
        exclude: A class that cannot occur; repeat the flag for more classes.
        prior: How frequent the classes are in your pictures: equally (uniform), as in training (train), as in a CSV
            file of label and number, or estimated from the pictures themselves (estimate).
        batch: Pictures that are computed together. A smaller batch needs less memory.
        workers: Threads that decode while the network computes; by default one per core. With --ray: processes of the
            cluster; by default one per GPU, or per core if there are none.
        ray: Compute on the Ray cluster of RAY_ADDRESS, or on this machine's cores with Ray. Needs --out FILE, and
            pictures and model at paths that all machines share.
        backend: ONNX Runtime, or torch.
        device: auto uses CUDA if available.
        precision: int8 uses the quantised ONNX file, if the model has one; on the CPU.
        reduced: Decode large JPEGs at a half, quarter or eighth of their size, at least twice the network's: faster,
            with slightly other probabilities.
        table: A table. PATH is then the one folder that its paths start from.
    """
    special = out is not None and os.path.exists(out) and not os.path.isfile(out) and not os.path.isdir(out)
    to_file = not (out is None or special or str(out) == "-")
    if out is None or not to_file:
        if resume or overwrite or ray:
            raise ZooError("--resume, --overwrite and --ray need --out FILE.")
    elif resume and overwrite:
        raise ZooError("--resume continues the file, --overwrite replaces it: choose one.")
    else:
        refuse_out(out, resume, overwrite)
    if copy_to is not None and link_to is not None:
        raise ZooError("--copy-to and --link-to: choose one.")
    if table is not None and (len(paths) != 1 or paths_from is not None):
        raise ZooError("--table goes with one path: the folder that the table's paths start from.")
    sources = _Sources(paths, paths_from)
    predictor = zoo.load(model, backend=backend, device=device, precision=precision)
    predictor.reading, predictor.reduced = reading.over(predictor.reading.to_dict()), reduced
    if classes is not None:
        predictor = predictor.only(_lines(classes))
    predictor = predictor.without(exclude)

    def predicted(pictures: Iterable[Any], prior: Any) -> Iterator[Prediction]:
        return predictor.predict_each(pictures, top_k, prior, batch_size=batch, workers=workers)

    def listed_again() -> Iterator[Any]:
        return pictures_in_table(table, paths[0], columns) if table else pictures_of(sources, passed_over, columns)

    layout = _layout(predictor, top_k, threshold, coverage)
    passed_over: Counter[str] = Counter()
    remarks = Remarks()
    frequencies: Any = prior
    if prior == "estimate":
        next(predicted([], "uniform"), None)  # refuses invalid flags before anything is computed
        frequencies = earlier_setting(out, "prior") if resume and out is not None else None
        if frequencies is None:
            if not sources.again:
                raise ZooError("--prior estimate goes through the pictures twice: use --list FILE in place of -.")
            frequencies = _estimated(predictor, lambda: predicted(_some(listed_again), "uniform")).tolist()
            passed_over.clear()
    elif isinstance(prior, Path):
        frequencies = _prior_of_file(prior, predictor)
    next(predicted([], frequencies), None)
    pictures = listed_again()
    total = bad = 0
    with ExitStack() as stack:
        rows_file, stopped = None, []
        if ray:
            stack.enter_context(on_ray.cluster())
        if out is None:
            add = _printer(layout)
        elif not to_file:
            add = _csv_rows(out, layout, stack)
        else:
            rows_file = stack.enter_context(
                RowsFile(out, layout, _settings(predictor, frequencies), resume, overwrite, batch))
            pictures, stopped = rows_file.new(pictures), stack.enter_context(stop_signals())
            add = _row_of(rows_file)
            total, bad = rows_file.rows, rows_file.bad
        number = None if table or not sources.again else partial(number_of_pictures, sources, columns)
        bar = stack.enter_context(_bar("off" if out is None else progress, total, number))
        review_in = copy_to or link_to
        review = None if review_in is None else Review(review_in, link=link_to is not None, again=resume)
        again: Iterator[Any] = itertools.repeat(None)
        if review is not None:
            pictures, again = itertools.tee(pictures)
        if ray:
            job = on_ray.Job(os.getcwd(), model, backend, device, precision, predictor.reading, reduced,
                             predictor.classes, on_ray.model_files(predictor), layout, frequencies, batch)
            rows = on_ray.predict_each(job, pictures, workers)
        else:
            rows = ((row, layout.values(row)) for row in predicted(pictures, frequencies))
        for (row, found), picture in zip(stack.enter_context(closing(rows)), again, strict=False):
            remarks.add(row.facts)
            if review is not None:
                review.add(row, picture, layout.threshold)
            add(row, found)
            total += 1
            bad += row.error is not None
            bar.update()
            if stopped:
                raise Interrupted(f"stopped by {signal.Signals(stopped[0]).name}. {out} keeps {total:,} rows; the same "
                                  "command with --resume continues.", 128 + stopped[0])
        if rows_file is not None:
            rows_file.finish()
    if to_file:
        print(f"{out}: {total:,} rows", file=sys.stderr)
    if bad:
        print(f"{bad:,} of {total:,} could not be read; their rows say why.", file=sys.stderr)
    for remark in (*remarks.in_words(predictor.reading), passed_over_in_words(passed_over)):
        if remark:
            print(remark, file=sys.stderr)
    return 1 if bad else 0


class _Sources:
    """The paths from the command line or a list. They can be read again, unless one is -."""

    def __init__(self, paths: list[Path], paths_from: Path | None):
        self.paths, self.paths_from = [str(path) for path in paths], paths_from
        self.again = "-" not in self.paths
        if not paths and paths_from is None:
            raise ZooError("name at least one picture or folder.")
        if paths_from is not None:
            try:
                open(paths_from, "rb").close()
            except OSError as error:
                raise ZooError(f"--list {paths_from} cannot be read: {error.strerror or error}.") from error
        missing = [path for path in self.paths if path != "-" and next(expanded([path]), path) == path
                   and not os.path.lexists(path)]
        if missing and len(missing) == len(paths) and paths_from is None:
            raise ZooError(f"{', '.join(missing)}: no such file or folder.")

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            if path == "-":
                yield from paths_in_list(sys.stdin.buffer)
            else:
                yield path
        if self.paths_from is not None:
            with open(self.paths_from, "rb") as lines:
                yield from paths_in_list(lines)


def _bar(show: str, done: int, number: Callable[[], int] | None) -> tqdm:
    """A progress bar on standard error.

    number   counts the pictures in a thread of its own; the bar shows no time left until it is done
    """
    a_terminal = sys.stderr.isatty()
    bar = tqdm(initial=done, unit=" pictures", dynamic_ncols=True, mininterval=0.1 if a_terminal else 10,
               disable=show == "off" or (show == "auto" and not a_terminal))

    def count() -> None:
        with suppress(ZooError):  # the run itself meets the same error
            bar.total = number() if number else None

    if not bar.disable:
        threading.Thread(target=count, daemon=True).start()
    return bar


Add = Callable[[Prediction, dict[str, Any]], None]  # a prediction, and its row


def _row_of(rows_file: RowsFile) -> Add:
    return lambda _, found: rows_file.add(found)


def _csv_rows(out: Path, layout: Layout, stack: ExitStack) -> Add:
    """Write rows to standard output, a pipe or a device."""
    try:
        stream = sys.stdout if str(out) == "-" else stack.enter_context(out.open("w", newline="", encoding="utf-8"))
    except OSError as error:
        raise ZooError(f"--out {out} cannot be written: {error.strerror or error}.") from error
    writer = csv.writer(stream)
    writer.writerow(layout.columns)
    return lambda _, found: writer.writerow(as_cells(found, layout.columns))


def _layout(predictor: Predictor, top_k: int, threshold: float | None, coverage: float | None) -> Layout:
    """The columns. Raises ZooError for invalid flags."""
    if threshold is not None and not 0 < threshold <= 1:
        raise ZooError(f"--threshold {threshold}: a probability above 0, at most 1.")
    if coverage is not None:
        predictor.classes.inside(np.zeros((1, len(predictor.labels))), coverage)
    return Layout(top_k, threshold, coverage, predictor.calibration is not None)


def _printer(layout: Layout) -> Add:
    """Answers in words, to standard output."""
    def add(row: Prediction, found: dict[str, Any]) -> None:
        text = str(row)
        if "unsure" in found:
            text += f"\n  unsure: less than {layout.threshold:.0%}"
        if "set" in found:
            text += f"\n  with {layout.coverage:.0%} coverage: {found['set'].replace(' | ', ', ')}"
        print(printable(text))

    return add


def _settings(predictor: Predictor, prior: Any) -> dict[str, Any]:
    """The settings that the rows depend on."""
    excluded = [predictor.labels[c] for c in np.flatnonzero(~predictor.classes.allowed_C)]
    return {"model": predictor.name, "model files": on_ray.model_files(predictor), "precision": predictor.precision,
            "prior": prior, "excluded classes": excluded, "reading": asdict(predictor.reading),
            "reduced": predictor.reduced}


def _prior_of_file(path: Path, predictor: Predictor) -> list[float]:
    """The number of each class in a CSV file of label and number, with or without a header."""
    if not path.exists():
        raise ZooError(f"--prior {path}: no such file, and none of train, uniform and estimate.")
    found: dict[str, float] = {}
    for i, row in enumerate(csv.reader(_lines(path))):
        try:
            label, number = row
            found[same_text(label.strip())] = float(number)
        except ValueError:
            if i:
                raise ZooError(f"--prior {path}, line {i + 1}: expected a label and a number, as in fox,12.") from None
    predictor.only(found)  # raises for names that are not classes
    if missing := [label for label in predictor.labels if same_text(label) not in found]:
        raise ZooError(f"--prior {path} lacks {len(missing)} classes, the first is {missing[0]}: give each a number, "
                       "and 0 to those that cannot occur.")
    return [found[same_text(label)] for label in predictor.labels]


def _some(listed_again: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """At most ESTIMATED_FROM pictures, evenly from the whole list."""
    step = max(1, -(-sum(1 for _ in listed_again()) // ESTIMATED_FROM))
    return itertools.islice(listed_again(), 0, None, step)


def _estimated(predictor: Predictor, answers: Callable[[], Iterable[Prediction]]) -> np.ndarray:
    """Estimate the prior; print it to standard error, and why it may be wrong."""
    used = [replace(answer, features=None, feature_map=None) for answer in answers() if answer.error is None]
    prior_C = predictor.estimate_prior(used)
    first = np.argsort(-prior_C, kind="stable")[:5]
    print(f"Class frequencies estimated from {len(used):,} pictures: "
          + ", ".join(f"{predictor.labels[c]} {prior_C[c]:.1%}" for c in first) + " …", file=sys.stderr)
    strange = float(np.mean([answer.unfamiliar for answer in used]))
    classes = len(predictor.labels)
    for holds, warning in (
            (predictor.calibration is None, "the model has no calibration (`metasaug calibrate`)"),
            (len(used) < 20 * classes, f"{len(used):,} pictures are few for {classes} classes"),
            (strange > 3 * UNFAMILIAR, f"{strange:.0%} of the pictures look unlike anything in training")):
        if holds:
            print(f"Do not trust this estimate: {warning}.", file=sys.stderr)
    return prior_C


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(f"{path} cannot be read as text: {getattr(error, 'strerror', None) or error}.") from error
