"""`metasaug release`: every named cell trained, measured, exported and published by one command.

What is done is read from the run folders and the Hub each time, never from a list of our own, so the command may be
killed at any moment and given again. Each cell trains and is published in a process of its own: one that fails, or
takes too much memory, takes nothing with it.
"""

import functools
import hashlib
import importlib.util
import json
import math
import shlex
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tyro
from huggingface_hub.utils import disable_progress_bars

from export.errors import ExportError
from export.publish import WHERE, asked, on_hub
from export.release_plan import (
    AS_GIVEN,
    FOLDERS,
    Cell,
    Planned,
    Standing,
    Work,
    by_data_set,
    cell_of,
    classes_of,
    disk_of,
    entries_named,
    in_cells,
    plan_table,
    rates_from,
    results_by_cell,
    work_of,
)
from export.release_runs import Children, Gauge, Line, launched
from training.command_line import choose_device, settle
from training.data.check import duration_in_words, size_in_words
from training.data.datasets import LongTailed
from training.errors import Interrupted, TrainingError
from training.recipes import Recipe
from training.run.run_folder import alone_in
from zoo.errors import HubError, ModelFolderError, ZooError
from zoo.hub import PREFIX, HubFolder, own_copies
from zoo.loading import open_entry
from zoo.model_folder import CARD, CONFIG, FIGURE, MANIFEST, ONNX, ModelFolder
from zoo.registry import Entry

NO_ROOT = Path("ROOT")  # stands for a --root that was not given
LIBRARIES = ("torch", "torchvision", "onnx", "onnxscript", "matplotlib")


def release(
    cells: tuple[str, ...],
    root: Path | None = None,
    owner: str | None = None,
    out: Path = Path("runs/release"),
    data: tuple[str, ...] = (),
    processes: int = 1,
    pictures_per_second: tuple[str, ...] = (),
    price_per_hour: float | None = None,
    again: bool = False,
    private: bool = False,
    publish: bool = True,
    dry_run: bool = False,
    flags: tyro.conf.Positional[tuple[str, ...]] = (),
) -> int:
    """Train, measure, export and publish every named cell that is not out yet. First it tells what that takes.

    Stopped or killed at any moment, the same command goes on where it was: no cell is trained or published twice. What
    follows a lone -- goes to each `metasaug train`, as in `metasaug release --cells inat18 … -- --workers 32`.
    Exit code 0: all is done; 1: some cells failed, each with its reason; 2: nothing was begun; 129, 130,
    143: stopped.

    Args:
        cells: Names from `metasaug list`, data sets (all their cells that are not out), or all; with commas or spaces.
        root: Folder of the data sets: ROOT/cifar10, cifar100, imagenet-lt, inat17, inat18, plankton, each as `metasaug
            train` reads it.
        owner: User or organisation on the Hub; models go to OWNER/NAME. Without it METASAUG_HUB_OWNER.
        out: Folder of the runs, OUT/NAME, each with the output of its training in output.log.
        data: DATASET=DIR, for a data set that lies elsewhere than under --root.
        processes: Processes of each training, started by torchrun; one a GPU.
        pictures_per_second: Speed of plain training here, for the plan: a number for all data sets, or DATASET=NUMBER.
        price_per_hour: What the machine costs, for the plan.
        again: Cells that are out already, too.
        private: Make the repositories private.
        publish: Put the models on the Hub; without it all stays in the runs.
        dry_run: Print the plan and leave; needs neither data nor GPU, and does not ask the Hub.
        flags: Flags for `metasaug train`, after --.
    """
    if flags and not flags[0].startswith("-"):
        raise ExportError(f"{shlex.join(flags)}: cells are named with --cells; what follows -- are flags of `metasaug "
                          "train`.")
    if processes < 1:
        raise ExportError(f"--processes {processes}: at least 1.")
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise ExportError(f"--price-per-hour {price_per_hour}: a number, 0 or more.")
    disable_progress_bars()  # the Hub's; ours is a line a cell
    places = {name: Path(place).expanduser() for name, place in by_data_set(data, "data").items()}
    base = NO_ROOT if root is None else root.expanduser()
    order = Order(
        [cell_of(entry, places.get(entry.dataset, base / FOLDERS[entry.dataset]), out, flags)
         for entry in entries_named(cells)],
        out, (owner or own_copies()) if publish else None, publish, private, again, processes,
        rates_from(pictures_per_second), price_per_hour)
    if dry_run:
        print(order.plan_in_words())
        missing = order.look_at_data() if root is not None or places else []
        print("\n".join([*missing, "Dry run: nothing was begun"
                         + (", and the Hub was not asked which of these are out." if publish else ".")]))
        return 0
    with alone_in(out), Children() as children:
        unready = order.look_round()
        print(order.plan_in_words(), flush=True)
        if unready:
            raise ExportError("not ready, and nothing was begun:\n\n" + "\n\n".join(unready))
        return order.carry_out(children)


@dataclass
class Order:
    """What was asked for, and what was found on the way."""

    cells: list[Cell]
    out: Path
    owner: str | None
    publish: bool
    private: bool
    again: bool
    processes: int
    rates: Mapping[str, tuple[float, str]]
    price: float | None
    on_hub: dict[str, HubFolder] = field(default_factory=dict)  # what is published under the cells' names
    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)  # of a data set: for training, and classes
    pace: dict[str, float] = field(default_factory=dict)  # of a data set: measured seconds for one that was reckoned

    # ---- where everything stands ----

    def repo(self, cell: Cell) -> str:
        return f"{self.owner}/{cell.name}"

    def standing(self, cell: Cell) -> Standing:
        """As the registry, the Hub and the run folder have it."""
        if cell.entry.weights != "unpublished" and not self.again:
            return "out"
        local, remote = finished(cell), self.on_hub.get(cell.name)
        if local is not None and other_recipe(cell.recipe, local):
            return "otherwise"
        if remote is not None and local is not None and same(local, remote):
            return "published"
        if remote is not None and not self.again:
            return "otherwise" if other_recipe(cell.recipe, remote) else "published"
        if local is not None:
            return "trained"
        return "begun" if any((cell.run / "checkpoints").glob("*.pt")) else "new"

    def _otherwise(self, cell: Cell) -> str:
        """What to do about a model of this name that was trained otherwise."""
        local, remote = finished(cell), self.on_hub.get(cell.name)
        if local is not None and (other := other_recipe(cell.recipe, local)):
            return (f"{cell.run} holds {cell.name} trained otherwise ({other}): name another --out, or remove that "
                    "folder.")
        assert remote is not None
        return (f"{remote.source} is {cell.name} trained otherwise ({other_recipe(cell.recipe, remote)}). With --again "
                "it is replaced, by a new commit.")

    def is_done(self, cell: Cell) -> bool:
        return self.standing(cell) in (("out", "published") if self.publish else ("out", "published", "trained"))

    def plan(self) -> list[Planned]:
        """The cells that are not done, what is left of each, and from which the first stage is taken."""
        ready, begun, rows = stage1_runs(self.out), dict[str, str](), []
        for cell in self.cells:
            standing = self.standing(cell)
            if self.is_done(cell):
                continue
            name, recipe = cell.entry.dataset, cell.recipe
            pictures, classes = self.pictures.get(name, (None, classes_of(recipe)))
            rate = self.rates.get(name)
            work = work_of(recipe, pictures, rate and rate[0] * (1 if rate[1] == AS_GIVEN else self.processes))
            taken = next((run.name for run, saved in ready if fits(recipe, saved)), begun.get(recipe.stage1_key()))
            begun.setdefault(recipe.stage1_key(), cell.name)
            taken = taken if work.first and taken != cell.name else None
            share = 1.0 if standing == "trained" else max(share_done(cell, work), work.first if taken else 0.0)
            rows.append(Planned(cell, standing, work, taken, work.steps and round(work.steps * (1 - share)),
                                work.total - work.done(share), disk_of(recipe, pictures, classes)))
        return rows

    def plan_in_words(self) -> str:
        plan = self.plan()
        left = {row.cell.name for row in plan}
        where = (f"to {PREFIX}{self.owner or 'OWNER'}/NAME{' (private)' if self.private else ''}" if self.publish else
                 "not published")
        lines = [f"{in_cells(len(plan))} to do, {where}; runs in {self.out}"]
        done: dict[str, list[str]] = {}
        for cell in self.cells:
            if cell.name not in left:
                done.setdefault(self._why_done(cell), []).append(cell.name)
        for why, names in done.items():
            lines += textwrap.wrap(f"{why}: {', '.join(names)}", 108, initial_indent="  ", subsequent_indent="    ",
                                   break_on_hyphens=False)
        return "\n".join(lines + (["", plan_table(plan, self.price, self.processes, self.rates), ""] if plan else []))

    def _why_done(self, cell: Cell) -> str:
        standing = self.standing(cell)
        if standing == "out":
            return f"out already ({cell.entry.weights}), not made again without --again"
        return f"published already as {PREFIX}{self.owner}/NAME" if standing == "published" else "trained already"

    # ---- what is needed ----

    def look_round(self) -> list[str]:
        """Everything that would stop the order later, each with what to do. Asks the Hub."""
        unready = self._look_at_hub() if self.publish else []
        lacking = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
        if lacking:
            unready.append(f"Training and export need {', '.join(lacking)}: pip install 'metasaug[train]'.")
        unready += [self._otherwise(cell) for cell in self.cells if self.standing(cell) == "otherwise"]
        return [*unready, *self.look_at_data(), *self._look_at_machine()]

    def look_at_data(self) -> list[str]:
        """Each data set that is needed, read as training reads it, but no picture decoded; what is missing."""
        missing = []
        needed = {row.cell.entry.dataset: row.cell for row in reversed(self.plan()) if row.standing != "trained"}
        for name, cell in needed.items():
            place = cell.job.options.data
            if place == NO_ROOT / FOLDERS[name]:
                missing.append(f"Where is {name}? --root DIR, with {FOLDERS[name]} in it, or --data {name}=DIR.")
                continue
            try:
                loaded = cell.job.load(look=False)
            except ZooError as error:
                missing.append(f"{name}, looked for in {place} (--data {name}=DIR for elsewhere): {error}"
                               + (" They are the training pictures of the National Data Science Bowl (2015), a folder "
                                  "for each of the 121 classes." if name == "plankton" else ""))
                continue
            print(f"{name}: {len(loaded.train):,} training pictures in {len(loaded.label_names):,} classes, in {place}"
                  + "".join(f"\n  {note}" for note in loaded.notes), flush=True)
            missing += self._nameless(name, loaded)
            if not hasattr(cell.recipe, "imbalance"):  # of which there are as many sizes
                self.pictures[name] = len(loaded.train), len(loaded.label_names)
            try:
                self.cells = [self._settled(cell, loaded) if cell.entry.dataset == name else cell
                              for cell in self.cells]
            except ZooError as error:
                missing.append(str(error))
        return missing

    def _settled(self, cell: Cell, loaded: LongTailed) -> Cell:
        """The cell with what its recipe leaves open chosen, as its training will."""
        device = choose_device(cell.job.options.device)
        return cell.with_recipe(settle(cell.recipe, loaded, device, cell.run)[0])

    def _nameless(self, name: str, loaded: LongTailed) -> list[str]:
        if self.publish and all(label == str(c) for c, label in enumerate(loaded.label_names)):
            return [f"{name}: the classes have numbers for names, and `metasaug publish` refuses those. Use the JSON "
                    "files of the data set, or --no-publish."]
        return []

    def _look_at_machine(self) -> list[str]:
        plan = self.plan()
        unready = []
        if any(row.standing != "trained" for row in plan):
            import torch

            try:
                device = choose_device(plan[0].cell.job.options.device)
            except TrainingError as error:
                return [str(error)]
            if device.type == "cpu" and any(row.cell.recipe.architecture == "resnet50" for row in plan):
                print("No GPU here: the hours of the large sets below are those of one.")
            if device.type == "cuda" and self.processes > torch.cuda.device_count():
                unready.append(f"--processes {self.processes}: there are {torch.cuda.device_count()} GPUs here.")
        there = sum(file.stat().st_size for row in plan for file in row.cell.run.rglob("*") if file.is_file())
        needed = sum(row.disk or 0 for row in plan) - there
        free = shutil.disk_usage(self.out).free
        if needed > free:
            unready.append(f"The runs take {size_in_words(needed)} more, and {self.out} has {size_in_words(free)} free:"
                           " make room, or name another --out.")
        return unready

    def _look_at_hub(self) -> list[str]:
        """Whether we may write there, and what is there already."""
        from huggingface_hub import HfApi

        if self.owner is None:
            return ["Whose are the models on the Hub? --owner NAME, or METASAUG_HUB_OWNER; or --no-publish."]
        try:
            who = asked(self.owner, HfApi().whoami)
        except HubError as error:
            return [f"The Hub does not say who is logged in: {error} Log in with a token that may write (`hf auth "
                    "login`, or HF_TOKEN), or --no-publish."]
        lack = may_not_write(who, self.owner)
        if lack:
            return [lack]
        unready = []
        for cell in self.cells:
            try:
                if self.standing(cell) != "out" and (folder := published(self.repo(cell))) is not None:
                    self.on_hub[cell.name] = folder
            except ZooError as error:
                unready.append(str(error))
        return unready

    # ---- doing it ----

    def carry_out(self, children: Children) -> int:
        """Every cell that is not done, one after the other; the results of all. 0, or 1 where some failed."""
        failed: dict[str, str] = {}
        stuck: dict[str, str] = {}  # first stages that failed, and in which cell
        plan = self.plan()
        for number, row in enumerate(plan, 1):
            cell, key = row.cell, row.cell.recipe.stage1_key()
            with Line(f"[{number}/{len(plan)}] {cell.name}") as line:
                try:
                    if key in stuck and row.standing == "new":
                        raise ExportError(f"not begun, as its first stage is that of {stuck[key]}.")
                    self._make(row, plan[number:], children, line)
                except Interrupted:
                    raise
                except (ZooError, OSError) as error:
                    failed[cell.name] = str(error)
                    line.say(f"failed: {str(error).splitlines()[0]}")
                    if row.work.first and finished(cell) is None and stage1_for(cell, self.out) is None:
                        stuck.setdefault(key, cell.name)
        print(self.results())
        for name, reason in failed.items():
            print(f"\nFailed: {name}: {reason}")
        if failed:
            print(f"\n{in_cells(len(failed))} of {len(plan)} failed; once mended, the same command goes on with "
                  f"{'it' if len(failed) == 1 else 'them'} alone.")
        return int(bool(failed))

    def _make(self, row: Planned, later: list[Planned], children: Children, line: Line) -> None:
        cell, log = row.cell, row.cell.run / "output.log"
        if row.standing != "trained":
            line.show(f"training, its output in {log}", always=True)
            stage1 = stage1_for(cell, self.out)
            words = [*cell.words, *(["--stage1", str(stage1)] if stage1 not in (None, cell.run) else [])]
            with alone_in(cell.run, wait=True):  # one that outlived a killed release saves, and leaves
                pass
            gauge = Gauge(row.work, lambda here, pace: self._tell(row, later, here, pace), line,
                          duration_in_words(row.seconds + sum(each.seconds for each in later)))
            children.run(launched(words, self.processes), log, "metasaug train", gauge.look)
            if finished(cell) is None:
                raise ExportError(f"training left no whole model in {cell.run}: see {log}.")
        result = finished(cell)
        assert result is not None and result.results is not None
        done = f"error {result.results['error']:.2%}"
        if self.publish:
            line.show("publishing")
            children.run(["-m", "metasaug", "publish", str(cell.run), "--repo", self.repo(cell),
                          *(["--private"] if self.private else [])], log, "metasaug publish")
            folder = published(self.repo(cell))
            if folder is None or not same(result, folder):
                raise ExportError(f"{PREFIX}{self.repo(cell)} does not hold what was published: see {log}.")
            self.on_hub[cell.name] = folder
            done += f", published as {folder.source}"
        line.say(done)

    def _tell(self, row: Planned, later: list[Planned], here: float, pace: float) -> str:
        """The time left, of this cell and of all, by the speed measured."""
        self.pace[row.cell.entry.dataset] = pace
        total = here + sum(each.seconds * self.pace.get(each.cell.entry.dataset, 1.0) for each in later)
        money = "" if self.price is None else f" ({total / 3600 * self.price:,.2f})"
        return f"{duration_in_words(here)} left, with all that follow {duration_in_words(total)}{money}"

    def results(self) -> str:
        """What every named cell got, beside the published figures; what to paste where something was published."""
        rows: list[tuple[Entry, Mapping[str, Any] | None]] = []
        for cell in self.cells:
            folder = self.on_hub.get(cell.name) or finished(cell)
            if folder is None and cell.entry.bundled:
                folder = open_entry(cell.entry)
            config = folder.config if folder else None
            if config or cell.entry.measured_error is not None:
                rows.append((cell.entry, (config or {}).get("metasaug", {}).get("results")))
        parts = ["\n" + results_by_cell(rows, lambda entry: entry.measured_error)] if rows else []
        pasted = [on_hub(folder.config, folder.repo, folder.revision,
                         hashlib.sha256((folder.path / MANIFEST).read_bytes()).hexdigest())
                  for folder in self.on_hub.values()]
        return "\n".join(parts + (["", WHERE, *pasted] if pasted else []))


# ---- what is there already ----


def finished(cell: Cell) -> ModelFolder | None:
    """The run's model, measured and exported; None where there is none yet. (Publishing checks every byte.)"""
    try:
        folder = ModelFolder(cell.run / "model")
        return folder if ONNX in folder and CARD in folder and folder.results else None
    except ModelFolderError:  # not there, or killed while it was written
        return None


def other_recipe(recipe: Recipe, folder: ModelFolder) -> str | None:
    """In what the model was trained otherwise than by this recipe."""
    saved = recipe.completed(folder.config["metasaug"].get("recipe") or {})
    ours, theirs = (json.loads(json.dumps(one)) for one in (as_chosen(recipe, saved).to_dict(), saved))
    differing = [f"{flag} {theirs[flag]}, not {value}" for flag, value in ours.items() if theirs[flag] != value]
    return ", ".join(differing[:5]) or None


def as_chosen(recipe: Recipe, saved: Mapping[str, Any]) -> Recipe:
    """The recipe, what it leaves to be chosen from the pictures or its backbone being as it was for a saved one."""
    usual = type(recipe)()

    def left_open(flag: str) -> bool:
        value = getattr(recipe, flag)
        return (flag in recipe.CHOSEN and value in ("auto", 0, None)) or (
            recipe.backbone is not None and value == getattr(usual, flag))

    return replace(recipe, **{each.name: saved[each.name] for each in fields(recipe)
                              if left_open(each.name) and each.name in saved})


def same(local: ModelFolder, remote: ModelFolder) -> bool:
    """Whether the Hub has these very weights and results; the card there names another place."""
    apart = {CARD, FIGURE}
    return ({name: entry for name, entry in local.files.items() if name not in apart}
            == {name: entry for name, entry in remote.files.items() if name not in apart})


def published(repo: str) -> HubFolder | None:
    """The model folder in a repository, at its newest commit; None where there is none. Raises HubError."""
    from huggingface_hub import HfApi

    if not asked(repo, lambda: HfApi().file_exists(repo, MANIFEST)):
        return None
    return HubFolder(repo, files=(CONFIG,))


def may_not_write(who: Mapping[str, Any], owner: str) -> str | None:
    """What keeps the account that is logged in from publishing for `owner`, as far as the Hub says."""
    name = who.get("name", "?")
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        return f"The token of {name} on the Hub may only read: make one that may write, then `hf auth login`."
    roles = {org.get("name"): org.get("roleInOrg") for org in who.get("orgs") or []}
    if owner != name and owner not in roles:
        return (f"--owner {owner}: {name} is logged in to the Hub, and is not of {owner}. It may write for "
                f"{', '.join([name, *map(str, roles)])}.")
    if roles.get(owner) == "read":
        return f"--owner {owner}: {name} may only read there; an administrator of {owner} can change that."
    return None


def stage1_runs(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Runs whose first stage has ended, and what they say of it."""
    found = ((folder.parent, _stage1_in(folder, tuple(sorted(file.name for file in folder.iterdir()))))
             for folder in sorted(out.glob("*/stage1")))
    return [(run, saved) for run, saved in found if saved is not None]


@functools.cache
def _stage1_in(folder: Path, _names: tuple[str, ...]) -> dict[str, Any] | None:
    """What its newest whole checkpoint says, without the tensors; a file is never changed under its name."""
    from training.run.checkpoints import load_newest

    try:
        newest = load_newest(folder)
    except TrainingError:  # damaged: then it is trained again
        return None
    return None if newest is None else {key: newest[1][key] for key in ("stage1_key", "epoch", "recipe")}


def fits(recipe: Recipe, saved: Mapping[str, Any]) -> bool:
    """Whether a finished first stage is this recipe's."""
    settled = as_chosen(recipe, saved["recipe"])
    theirs = settled.completed_key(saved["stage1_key"])
    agree = all(theirs.get(flag) == value for flag, value in json.loads(settled.stage1_key()).items())
    return agree and saved["epoch"] == settled.stage2_epoch


def stage1_for(cell: Cell, out: Path) -> Path | None:
    return next((run for run, saved in stage1_runs(out) if fits(cell.recipe, saved)), None)


def share_done(cell: Cell, work: Work) -> float:
    """Share of the steps that the run's log has; by whole epochs."""
    try:
        epoch = json.loads((cell.run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["epoch"]
    except (OSError, ValueError, IndexError, KeyError):
        return 0.0
    first, epochs = cell.recipe.stage2_epoch, cell.recipe.epochs
    if not epochs:  # chosen from the pictures
        return 0.0
    second = work.first + (1 - work.first) * (epoch - first) / (epochs - first)
    return second if epoch > first else work.first * epoch / first
