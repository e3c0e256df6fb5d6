"""The run's log: one JSON line per epoch and, on request, the same numbers for TensorBoard."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import TrainingError


class Log:
    """JSON lines. Resuming cuts off the lines that are newer than the checkpoint, so no epoch is there twice.

    path          None in a process that does not write
    length        in bytes, when the checkpoint was written
    tensorboard   folder for the same numbers in TensorBoard's format, or None
    """

    def __init__(self, path: Path | None, length: int, tensorboard: Path | None = None):
        self.path, self.length, self.tensorboard = path, length, tensorboard
        self.board: TensorBoardLog | None = None

    def __enter__(self) -> "Log":
        if self.path is None:
            return self
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            os.truncate(self.path, min(self.length, self.path.stat().st_size))
        if self.tensorboard is not None:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.board = TensorBoardLog(self.tensorboard, map(json.loads, lines))
        return self

    def __exit__(self, *_) -> None:
        if self.board is not None:
            self.board.close()

    def write(self, line: dict) -> int:
        """Append a line; returns the length of the log with it."""
        if self.path is None:
            return self.length
        with self._writing(), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            self.board.write(line)
        return self.path.stat().st_size

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(f"{self.path} could not be written ({error.strerror or error}). Make room, then "
                                "continue with --resume.") from error


class TensorBoardLog:
    """Event files in `folder`, written anew from `lines` (what a resumed run's log holds), then line by line.

    Raises ModuleNotFoundError without the library: pip install 'metasaug[tensorboard]'.
    """

    def __init__(self, folder: Path, lines: Iterable[Mapping[str, Any]] = ()):
        from torch.utils.tensorboard import SummaryWriter

        for older in folder.glob("events.out.tfevents.*"):
            older.unlink()  # else epochs that are trained again appear twice
        self.writer = SummaryWriter(str(folder))
        for line in lines:
            self.write(line)

    def write(self, line: Mapping[str, Any]) -> None:
        for tag, value in scalars(line):
            self.writer.add_scalar(tag, value, line["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def scalars(line: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a line, without the epoch; nested ones under names like test/groups/tail/accuracy."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{above}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and (above or name != "epoch"):
            yield f"{above}{name}", value
