"""The run's log as TensorBoard shows it: every number of log.jsonl, by epoch."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


class TensorBoardLog:
    """Event files in `folder`, written anew from `lines` (what a resumed run's log holds), then line by line.

    Raises ModuleNotFoundError without the library: pip install 'metasaug[tensorboard]'.
    """

    def __init__(self, folder: Path, lines: Iterable[Mapping[str, Any]] = ()):
        from torch.utils.tensorboard import SummaryWriter

        for older in folder.glob("events.out.tfevents.*"):
            older.unlink()  # else an epoch that is trained again is there twice
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
    """The numbers in a line but the epoch, those of objects within it under names like test/groups/tail/accuracy."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{above}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and (above or name != "epoch"):
            yield f"{above}{name}", value
