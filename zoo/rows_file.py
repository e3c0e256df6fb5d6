"""A file of predictions that stays whole if the run is interrupted, and that a later run can continue.

    rows.csv, rows.jsonl    each row is appended as soon as it is known
    rows.parquet            written at the end, from rows.parquet.part, which holds its rows as JSON lines until then
    rows.csv.run.json       the model and settings behind the rows, and whether all rows are there

A run continues from the end of a batch: which pictures are computed together can change a last digit. The file thus
becomes exactly what an uninterrupted run writes.
"""

import csv
import hashlib
import io
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from zoo.errors import ZooError
from zoo.files import printable, write_atomically
from zoo.images import NamedPicture
from zoo.rows import Layout, as_cells, plain

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ENDINGS = (".csv", ".jsonl", ".parquet")
PARQUET_ROWS = 50_000  # in a row group, which is held in memory when a Parquet file is written


class RowsFile:
    """The file behind `--out`; a context manager. Raises ZooError if it cannot be written.

    path       its ending gives the format: .csv, .jsonl or .parquet     layout   the columns
    settings   what the rows depend on, by name; a run continues only with the same settings
    resume     continue an older file; without it and without `overwrite`, an older file is an error
    batch      pictures that are computed together
    rows, bad  number of rows in the file, and of those with an error
    """

    def __init__(self, path: Path, layout: Layout, settings: Mapping[str, Any], resume: bool = False,
                 overwrite: bool = False, batch: int = 64):
        self.path, self.batch = path, batch
        self.kind = refuse_out(path, resume, overwrite)
        self.columns, self.settings = layout.columns, {**settings, **asdict(layout)}
        self.about = path.with_name(f"{path.name}.run.json")
        self.rows_path = path.with_name(f"{path.name}.part") if self.kind == ".parquet" else path
        self.rows = self.bad = self.size = 0
        self.done = np.empty(0, np.uint64)
        try:
            self._open(resume)
        except OSError as error:
            raise ZooError(f"--out {path} cannot be written: {error.strerror or error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        self.file.close()

    def new(self, pictures: Iterable[Any]) -> Iterator[Any]:
        """The pictures that have no row yet. A picture that is listed twice gets two rows."""
        taken = np.zeros(len(self.done), bool)
        for picture in pictures:
            if len(taken):
                name = picture.name if isinstance(picture, NamedPicture) else picture
                digest = np.uint64(_digest(printable(str(name))))
                first, end = (int(np.searchsorted(self.done, digest, side)) for side in ("left", "right"))
                free = np.flatnonzero(~taken[first:end])
                if len(free):
                    taken[first + free[0]] = True
                    continue
            yield picture

    def add(self, found: dict[str, Any]) -> None:
        """Append the row of `Layout.values`; it is in the file when this returns.

        If the disk is full, the file keeps its whole rows.
        """
        try:
            self._append(self._encoded(found))
        except OSError as error:
            os.ftruncate(self.file.fileno(), self.size)
            raise ZooError(f"--out {self.path} cannot be written: {error.strerror or error}. It keeps {self.rows:,} "
                           "rows; the same command with --resume continues.") from error
        self.rows += 1
        self.bad += "error" in found

    def finish(self) -> None:
        """Mark the file as finished; write the Parquet file."""
        try:
            os.fsync(self.file.fileno())
            if self.kind == ".parquet":
                self._write_parquet()
            self._describe(finished=True)
            if self.kind == ".parquet":
                self.rows_path.unlink()
        except OSError as error:
            raise ZooError(f"--out {self.path} cannot be finished: {error.strerror or error}. {self.rows_path} keeps "
                           f"{self.rows:,} rows; the same command with --resume continues.") from error

    # ---- opening ----

    def _open(self, resume: bool) -> None:
        there = _has_content(self.path) or _has_content(self.rows_path)
        finished = self._same_settings() if resume and there else False
        self.file = open(self.rows_path, "ab", buffering=0)  # noqa: SIM115
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise ZooError(f"--out {self.path} is being written by another run.") from None
            if not resume:
                self.file.truncate(0)
            elif finished and self.kind == ".parquet" and not self.rows_path.stat().st_size:
                self._rows_of_parquet()
            self._keep(finished)
            if not self.size and self.kind == ".csv":
                self._append(_csv_line(self.columns))
            self._describe(finished=False)
        except BaseException:
            self.file.close()
            raise

    def _same_settings(self) -> bool:
        """Whether the older run finished. Raises ZooError if its settings were different."""
        try:
            about = json.loads(self.about.read_text(encoding="utf-8"))
            older, finished = about["settings"], bool(about["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ZooError(f"{self.about} is missing or damaged: it says which model made the rows of {self.path}. "
                           "Start again with --overwrite.") from None
        mine = json.loads(json.dumps(self.settings))
        if differing := [name for name in {**older, **mine} if older.get(name) != mine.get(name)]:
            raise ZooError(f"The rows of {self.path} were made with another {', '.join(differing)}: use the same, or "
                           "start again with --overwrite.")
        return finished

    def _keep(self, finished: bool) -> None:
        """Read the older rows; cut off an incomplete row and the rows of an unfinished batch."""
        digests, good = array("Q"), 0
        kept = kept_bad = kept_size = bad = size = 0
        with open(self.rows_path, "rb") as file:
            records = _records(file, quotes=self.kind == ".csv")
            if self.kind == ".csv" and (first := next(records, None)):
                if first != _csv_line(self.columns):
                    raise ZooError(f"{self.path} has other columns than this run: start again with --overwrite.")
                size = kept_size = len(first)
            for record in records:
                found = self._decoded(record)
                if found is None:
                    break
                digests.append(_digest(found["path"]))
                size += len(record)
                is_bad = "error" in found
                good, bad = good + (not is_bad), bad + is_bad
                if finished or good % self.batch == 0:
                    kept, kept_bad, kept_size = len(digests), bad, size
        self.rows, self.bad, self.size = kept, kept_bad, kept_size
        self.done = np.sort(np.frombuffer(digests[:kept], np.uint64)) if kept else self.done
        self.file.truncate(kept_size)

    def _describe(self, finished: bool) -> None:
        about = {"finished": finished, "rows": self.rows, "unreadable": self.bad, "settings": self.settings}
        write_atomically(self.about, (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())

    # ---- rows as bytes ----

    def _append(self, record: bytes) -> None:
        left = memoryview(record)
        while left:
            left = left[self.file.write(left):]
        self.size += len(record)

    def _encoded(self, found: dict[str, Any]) -> bytes:
        if self.kind == ".csv":
            return _csv_line(as_cells(found, self.columns))
        return (json.dumps({name: found.get(name) for name in self.columns}, ensure_ascii=False) + "\n").encode()

    def _decoded(self, record: bytes) -> dict[str, Any] | None:
        """The row's values; None if the record is not a row."""
        try:
            if self.kind == ".csv":
                (cells,) = csv.reader(io.StringIO(record.decode(), newline=""))
                found = {name: plain(cell) for name, cell in zip(self.columns, cells, strict=True) if cell}
            else:
                found = {name: value for name, value in json.loads(record).items() if value is not None}
                if not found.keys() <= self.columns.keys():
                    return None
            return found if isinstance(found["path"], str) else None
        except (ValueError, KeyError, AttributeError, csv.Error):
            return None

    # ---- Parquet ----

    def _write_parquet(self) -> None:
        import pyarrow
        from pyarrow import parquet

        schema = parquet_schema(self.columns)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with open(self.rows_path, "rb") as rows, parquet.ParquetWriter(temporary, schema) as writer:
                some: list[dict[str, Any]] = []
                for record in rows:
                    some.append(json.loads(record))
                    if len(some) == PARQUET_ROWS:
                        writer.write_table(pyarrow.Table.from_pylist(some, schema))
                        some = []
                writer.write_table(pyarrow.Table.from_pylist(some, schema))
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _rows_of_parquet(self) -> None:
        from pyarrow import parquet

        for some in parquet.ParquetFile(self.path).iter_batches(PARQUET_ROWS):
            for found in some.to_pylist():
                self._append(self._encoded(found))
        self.size = 0


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a finished file, typed as `zoo.rows.Layout.columns`, without missing values. Raises ZooError."""
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            for some in parquet.ParquetFile(path).iter_batches(PARQUET_ROWS):
                yield from ({name: value for name, value in row.items() if value is not None}
                            for row in some.to_pylist())
        elif path.suffix.lower() == ".jsonl":
            with open(path, encoding="utf-8") as file:
                for line in file:
                    yield {name: value for name, value in json.loads(line).items() if value is not None}
        else:
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    types = Layout(len(row), 0, 0.5, True).columns
                    yield {name: types[name](plain(cell)) for name, cell in row.items() if cell}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise ZooError(f"{path} cannot be read as rows of `metasaug predict`: {error}.") from error


def about_rows(path: Path) -> dict[str, Any]:
    """The settings behind the rows. Raises ZooError if the run is unfinished or another program wrote the file."""
    about = path.with_name(f"{path.name}.run.json")
    try:
        found = json.loads(about.read_text(encoding="utf-8"))
        settings, finished = {**found["settings"]}, found["finished"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZooError(f"{about} cannot be read: it says which model made {path}. Name a file that "
                       "`metasaug predict --out` wrote.") from error
    if not finished:
        raise ZooError(f"{path} is not finished: continue the run with --resume first.")
    return settings


def earlier_setting(path: Path, name: str) -> Any:
    """A setting of an earlier part of the run; None if there is none."""
    try:
        return json.loads(path.with_name(f"{path.name}.run.json").read_text(encoding="utf-8"))["settings"].get(name)
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def refuse_out(path: Path, resume: bool, overwrite: bool) -> str:
    """The format of `--out`. Raises ZooError if the run may not write this file."""
    kind = path.suffix.lower()
    if os.path.isdir(path):
        raise ZooError(f"--out {path} cannot be written: it is a folder. Name a file in it.")
    if kind not in ENDINGS:
        raise ZooError(f"--out {path}: the ending says the format; it must be {', '.join(ENDINGS[:-1])} or "
                       f"{ENDINGS[-1]}.")
    if kind == ".parquet":
        import pyarrow.parquet  # noqa: F401  (if missing, it fails here, before anything is computed)
    if not (resume or overwrite) and _has_content(path):
        raise ZooError(f"--out {path} exists. --resume continues it, --overwrite replaces it.")
    return kind


def _has_content(path: Path) -> bool:
    return os.path.exists(path) and os.path.getsize(path) > 0


def parquet_schema(types: Mapping[str, type]):
    """The columns as a pyarrow schema."""
    import pyarrow

    kinds = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64()}
    return pyarrow.schema([(name, kinds[kind]) for name, kind in types.items()])


def _csv_line(cells: Iterable[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return text.getvalue().encode()


def _records(file: Iterable[bytes], quotes: bool) -> Iterator[bytes]:
    """Lines; with `quotes`, CSV records, whose cells may hold line breaks. An unfinished record is left out."""
    record = b""
    for line in file:
        record += line
        if line.endswith(b"\n") and not (quotes and record.count(b'"') % 2):
            yield record
            record = b""


def _digest(path: str) -> int:
    """A 64-bit hash: among a hundred million paths, two share one with a chance of 1 in 3,700."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")
