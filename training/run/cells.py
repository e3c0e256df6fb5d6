"""A queue of trainings: each runs once, and those with the same first stage share it.

The queue has no file of its own: it reads from the run folders what is done, begun or in progress. Several processes
may work on one queue, and you may kill and restart any of them.
"""

import json
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.datasets import LongTailed
from training.errors import TrainingError
from training.recipes import Recipe
from training.run.run_folder import alone_in

STAGE1 = "stage1"


@dataclass(frozen=True)
class Cell:
    """One training.

    name    of its run folder in the queue's folder: GROUP/OWN; cells of a group share their first stage
    whole   train both stages in one task
    """

    name: str
    recipe: Recipe
    whole: bool = False

    @property
    def group(self) -> str:
        return self.name.rpartition("/")[0]


@dataclass(frozen=True)
class Task:
    """The work of one process: the first stage of a group, or the rest of a cell."""

    cell: Cell
    name: str  # of the run folder
    folder: Path
    stage1: Path | None  # what the rest of a cell starts from

    @property
    def is_stage1(self) -> bool:
        return self.name != self.cell.name


@dataclass(frozen=True)
class Trained:
    """A finished cell: the state after its last epoch, its test results and the lines of its log."""

    cell: Cell
    folder: Path
    data: LongTailed
    state: Any
    results: dict
    log: list[dict]


class Queue:
    """Cells in the order of running, and the folder of their runs.

    done       the names of the finished cells
    may_take   whether to try the task of this name; by default every one
    """

    def __init__(self, cells: Sequence[Cell], runs: Path, done: Callable[[], Container[str]],
                 may_take: Callable[[str], bool] = lambda name: True):
        self.cells, self.runs, self.done, self.may_take = cells, runs, done, may_take
        for group in {cell.group for cell in cells}:
            if len({cell.recipe.stage1_key() for cell in cells if cell.group == group}) > 1:
                raise TrainingError(f"The cells of {group} have different first stages: put them into separate groups.")

    def left(self) -> list[Cell]:
        done = self.done()
        return [cell for cell in self.cells if cell.name not in done]

    def stage1_of(self, cell: Cell) -> Path | None:
        """The finished first stage of the cell's group."""
        folder = self.runs / cell.group / STAGE1
        return folder if any(folder.glob("step-*.pt")) or any(folder.glob(f"{STAGE1}/step-*.pt")) else None

    def tasks(self) -> Iterator[Task]:
        """One task after the other, each locked until the next is requested; ends when no task is left.

        If all tasks left need a first stage that another process trains, it waits.
        """
        while True:
            with ExitStack() as locked:
                task, wait = self._take(locked)
                if task is not None:
                    yield task
            if task is None:
                if not wait:
                    return
                time.sleep(0.5)

    def _take(self, locked: ExitStack) -> tuple[Task | None, bool]:
        """The first free task, with its lock; else whether one may become free."""
        wait, busy = False, set[str]()
        for cell in self.left():
            stage1, begins_alone = self.stage1_of(cell), cell.whole or cell.recipe.stage2_epoch == 0
            name = cell.name if stage1 or begins_alone else f"{cell.group}/{STAGE1}"
            if name in busy:
                wait |= name != cell.name
                continue
            if not (self.may_take(name) and self.may_take(cell.name)):
                continue
            try:
                locked.enter_context(alone_in(self.runs / name))
            except TrainingError:  # another process has it
                busy.add(name)
                wait |= name != cell.name
                continue
            # Another process may have finished it before we got the lock.
            if cell.name not in self.done() and (name == cell.name or self.stage1_of(cell) is None):
                return Task(cell, name, self.runs / name, None if begins_alone else stage1), False
            locked.close()
            wait = True
        return None, wait


def train(task: Task, data: LongTailed, device: Any, **options: Any) -> Trained | None:
    """Do the task, from its last checkpoint if it was stopped; None for a first stage.

    options    those of training.run.loop.run
    """
    from training.run import loop

    recipe = task.cell.recipe

    def stop_after_stage1(state: Any) -> None:  # the first step of stage 2 comes after stage 1's checkpoint is written
        if state.epoch >= recipe.stage2_epoch:
            raise _Stage1Ended

    if task.is_stage1:
        try:
            loop.run(recipe, data, task.folder, device, resume=True, on_progress=stop_after_stage1,
                     **options | {"evaluate_every": recipe.epochs})
        except _Stage1Ended:
            return None
    state, results = loop.run(recipe, data, task.folder, device, resume=True, stage1=task.stage1, **options)
    log = [json.loads(line) for line in (task.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return Trained(task.cell, task.folder, data, state, results, log)


class _Stage1Ended(Exception):  # noqa: N818
    pass
