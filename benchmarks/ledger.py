"""Does MetaSAug help? Runs every cell of ledger.toml once, with one shared stage 1 per set and seed.

    python -m benchmarks.ledger run --cifar10 DIR --plankton DIR   # continues where it was stopped
    python -m benchmarks.ledger status                             # what is missing, and how long it will take
    python -m benchmarks.ledger page                               # the tables in docs: ledger, paper, heldout

`run` and `status` take another list of cells, with its own results: --protocol benchmarks/paper.toml.
"""

import dataclasses
import io
import json
import statistics
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from training.data.cifar import Pool, cut_pool, find_pool, long_tail_counts
from training.data.datasets import LongTailed, Split
from training.data.imagenet_inat import load_imagenet_lt
from training.data.own_pictures import load_folder
from training.errors import Interrupted
from training.network.derivatives import Precision
from training.recipes import Cifar10LT, Cifar100LT, Folder, ImageNetLT, Recipe
from training.run.cells import Cell as Training
from training.run.cells import Queue, Trained, train
from training.run.run_folder import alone_in, code_version
from zoo.files import write_atomically
from zoo.labels import GROUPS

HERE = Path(__file__).resolve().parent
PROTOCOL, DEVELOPMENT, PAPER = (HERE / f"{name}.toml" for name in ("ledger", "development", "paper"))
RESULTS = HERE / "results" / "ledger.json"
PAGE, PAPER_PAGE, HELDOUT_PAGE = (HERE.parent / "docs" / f"{name}.md" for name in ("ledger", "paper", "heldout"))
RECIPES: dict[str, type[Recipe]] = {recipe.dataset: recipe for recipe in (Cifar10LT, Cifar100LT, Folder, ImageNetLT)}


@dataclass(frozen=True)
class Cell:
    set: str
    method: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.set}/{self.method}/{self.seed}"

    @property
    def folder(self) -> str:
        """Folder of its run. Cells of a set and seed share their first stage."""
        return f"{self.set}/{self.seed}/{self.method}"


class Protocol:
    """The content of ledger.toml, or of another list of cells."""

    def __init__(self, path: Path = PROTOCOL):
        self._content = tomllib.loads(path.read_text(encoding="utf-8"))
        self.results = RESULTS.with_name(f"{path.stem}.json")
        self.metric: str = self._content["metric"]
        self.methods: dict[str, dict[str, Any]] = self._content["methods"]
        self.tests_every_epoch: bool = self._content.get("tests") == "every epoch of stage 2"

    @property
    def cells(self) -> list[Cell]:
        """All cells in running order: by seed, then by method."""
        return [Cell(name, method, seed) for part in self._content["cells"] for seed in part["seeds"]
                for method in part["methods"] for name in _sets(part)]

    def set_of(self, cell: Cell) -> dict[str, Any]:
        return self._content["sets"][cell.set]

    def precision(self, cell: Cell) -> Precision:
        """Precision of the backbone. A seed's cells all have the same, because they share a stage 1."""
        return next(part.get("precision", "float32") for part in self._content["cells"]
                    if cell.set in _sets(part) and cell.seed in part["seeds"] and cell.method in part["methods"])

    def validation(self, cell: Cell) -> int:
        """Training pictures per class that replace the test set; 0: none."""
        return self.set_of(cell).get("validation", 0)

    def steps(self, cell: Cell) -> int:
        """Steps an epoch."""
        return -(-self.set_of(cell)["train_pictures"] // self.recipe(cell).batch_size)

    def recipe(self, cell: Cell) -> Recipe:
        flags = {"subset_seed": cell.seed, **self.set_of(cell)["recipe"]}
        make = RECIPES[flags.pop("dataset")]
        return make(**flags, **self.methods[cell.method], precision=self.precision(cell), stage1_loss="ce",
                    seed=cell.seed)

    def missing(self, results: Path | None = None) -> list[Cell]:
        done = {cell_of(row) for row in rows_in(results or self.results)}
        return [cell for cell in self.cells if cell not in done]

    def queue(self, cells: Iterable[Cell], runs: Path, done: Callable[[], Iterable[Cell]],
              may_take: Callable[[str], bool] = lambda name: True) -> Queue:
        return Queue([Training(cell.folder, self.recipe(cell)) for cell in cells], runs,
                     lambda: {cell.folder for cell in done()}, may_take)

    def how(self, recipe: Recipe) -> dict[str, Any]:
        """Options of training.run.loop.run: the last epoch is always tested."""
        return {"evaluate_every": 1 if self.tests_every_epoch else recipe.epochs}


def _sets(part: Mapping[str, Any]) -> list[str]:
    return [part["set"]] if isinstance(part["set"], str) else part["set"]


# ---- running ----


def run(cifar10: Path | None = None, cifar100: Path | None = None, plankton: Path | None = None,
        imagenet: Path | None = None, runs: Path | None = None, results: Path | None = None, only: str = "",
        limit: int | None = None, protocol: Path = PROTOCOL) -> None:
    """Run the missing cells one after another. A finished cell never runs again.

    Several of these commands may run side by side: each takes cells that no other is running.

    Args:
        cifar10: Folder of the CIFAR-10 pictures, as for `metasaug train cifar10-lt`. Without it those cells wait.
        cifar100: Folder of the CIFAR-100 pictures, the same.
        plankton: Folder of the plankton class folders, as for `metasaug train folder`. Without it those cells wait.
        imagenet: Folder of ImageNet-LT's pictures and lists, or of benchmarks.tiny_imagenet's.
        runs: Folder of the runs. By default runs/NAME for NAME.toml. A stopped run continues bit-identically.
        results: File for the figures of each finished cell. By default benchmarks/results/NAME.json for NAME.toml.
        only: Only cells whose SET/METHOD/SEED matches, for example "cifar10-lt-100/*/1".
        limit: Stop after this many cells.
        protocol: The list of cells.
    """
    listed, runs = Protocol(protocol), runs or Path("runs") / protocol.stem
    results = results or listed.results
    folders = {"cifar10-lt": cifar10, "cifar100-lt": cifar100, "folder": plankton, "imagenet-lt": imagenet}
    wanted = {cell.folder: cell for cell in listed.cells
              if folders[listed.recipe(cell).dataset] and fnmatch(cell.key, only or "*")}
    queue = listed.queue(wanted.values(), runs, lambda: map(cell_of, rows_in(results)))
    device, ended = choose_device(), 0
    for task in queue.tasks():
        print(f"{len(queue.left())} left: {task.name}", flush=True)
        cell, recipe = wanted[task.cell.name], task.cell.recipe
        folder = folders[recipe.dataset]
        assert folder is not None
        trained = train(task, _load(recipe, folder, listed.validation(cell)), device, **listed.how(recipe),
                        features=runs / cell.set / str(cell.seed) / "features")
        if trained is None:
            continue
        figures = row_of(listed, cell, trained, device)
        with alone_in(runs, wait=True):
            add_rows(results, listed, [figures])
        print(f"    {listed.metric} {figures[listed.metric]:.2%}", flush=True)
        ended += 1
        if ended == limit:
            return


def _load(recipe: Recipe, folder: Path, validation: int) -> LongTailed:
    """Load the data as `metasaug train` does.

    validation   training pictures per class that replace the test set; 0: none
    """
    if isinstance(recipe, Cifar10LT):
        pool = find_pool(recipe.dataset, folder)
        return _with_validation(recipe, pool, validation) if validation else cut_as(recipe, pool)
    if isinstance(recipe, ImageNetLT):
        return load_imagenet_lt(folder, meta_per_class=recipe.meta_per_class, subset_seed=recipe.subset_seed,
                                subset=recipe.subset)
    assert isinstance(recipe, Folder)
    return load_folder(folder, meta_per_class=recipe.meta_per_class, test_share=recipe.test_share,
                       subset_seed=recipe.subset_seed, skip_bad=recipe.skip_bad)


def cut_as(recipe: Cifar10LT, pool: Pool) -> LongTailed:
    return cut_pool(pool, recipe.imbalance, recipe.meta_per_class, recipe.subset_seed, recipe.subset)


def _with_validation(recipe: Cifar10LT, pool: Pool, per_class: int) -> LongTailed:
    """Set validation pictures aside, then cut the long tail from the rest. The meta set stays that of the whole."""
    whole = cut_as(dataclasses.replace(recipe, imbalance=1), pool)
    assert isinstance(whole.train, Split)
    of_class = [np.flatnonzero(whole.train.labels == c) for c in range(len(whole.label_names))]
    counts = long_tail_counts(min(map(len, of_class)) - per_class, len(of_class), recipe.imbalance)
    test_at = np.concatenate([at[:per_class] for at in of_class])
    train_at = np.concatenate([at[per_class : per_class + n] for at, n in zip(of_class, counts, strict=True)])
    train, test = (whole.train.at(at) for at in (train_at, test_at))
    return dataclasses.replace(whole, train=train, test=test, source=f"{whole.source}, validation cut")


def choose_device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def row_of(protocol: Protocol, cell: Cell, trained: Trained, device) -> dict[str, Any]:
    """A finished cell as a row of the results."""
    from benchmarks.measuring import machine
    from training.run.stages import data_of_stage

    recipe, measured = trained.cell.recipe, trained.results
    second = [line for line in trained.log if line["stage"] == 2]
    counts = data_of_stage(recipe, trained.data, 2).class_counts
    row = {
        **asdict(cell), "data": trained.data.source, "imbalance": recipe.to_dict().get("imbalance"),
        "fidelity": recipe.fidelity if recipe.augment == "metasaug" else None, "epochs": recipe.epochs,
        "precision": recipe.precision, "error": measured["error"], "macro_error": measured["macro_error"],
        "worst_class_error": measured["worst_class_error"],
        "groups": {group: row["accuracy"] for group, row in measured["groups"].items()},
        "classes": [{"train_images": n, "correct": row["correct"], "test_images": row["test_images"]}
                    for n, row in zip(counts, measured["per_class"], strict=True)],
        "stage2_log": [{name: line[name] for name in ("epoch", "loss", "shift", "effect") if name in line}
                       for line in second],
        "seconds": round(trained.state.seconds), "machine": machine(device), "code_version": code_version(),
    }
    if protocol.tests_every_epoch:
        tested = {line["epoch"]: line["test"]["error"] for line in second}
        best = min(tested, key=lambda epoch: tested[epoch])
        row |= {"best": {"epoch": best, "error": tested[best]}, "mean_of_last_10": _mean_of_last(tested, 10),
                "tests": [round(error, 4) for error in tested.values()]}
    return row


def _mean_of_last(tested: Mapping[int, float], epochs: int) -> float:
    return statistics.mean([tested[epoch] for epoch in sorted(tested)[-epochs:]])


def rows_in(results: Path) -> list[dict[str, Any]]:
    return json.loads(results.read_text())["cells"] if results.exists() else []


def cell_of(row: Mapping[str, Any]) -> Cell:
    return Cell(row["set"], row["method"], row["seed"])


def add_rows(results: Path, protocol: Protocol, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to the file, in the protocol's order. A cell that is already there stays as it is."""
    there = rows_in(results)
    known = {cell_of(row) for row in there}
    order = {cell: number for number, cell in enumerate(protocol.cells)}
    joined = [*there, *(row for row in rows if cell_of(row) not in known)]
    write_atomically(results, _as_json(sorted(joined, key=lambda row: order[cell_of(row)])))


def _as_json(cells: Sequence[Mapping[str, Any]]) -> bytes:
    """One cell per line, so a commit shows which cell was added."""
    return ('{"cells": [\n' + ",\n".join(json.dumps(cell) for cell in cells) + "\n]}\n").encode()


# ---- status ----


def status(results: Path | None = None, protocol: Path = PROTOCOL) -> None:
    """Show what is done, what is missing, and the time left, estimated from finished cells."""
    listed = Protocol(protocol)
    done, missing = rows_in(results or listed.results), listed.missing(results)
    for cell in missing:
        print(f"missing  {cell.key}")
    left = _hours_left(listed, missing, done)
    print(f"{len(done)} cells done, {len(missing)} missing"
          + ("" if left is None else f"; about {left:.1f} hours left at the speed of the cells done"))


def _hours_left(protocol: Protocol, missing: Sequence[Cell], done: Sequence[Mapping[str, Any]]) -> float | None:
    plain = [row["seconds"] / (row["epochs"] * protocol.steps(cell_of(row))) for row in done if row["method"] == "ce"]
    if not plain:
        return None
    from training.data.check import second_step

    steps, begun = 0.0, {(row["set"], row["seed"]) for row in done}
    for cell in missing:
        recipe = protocol.recipe(cell)
        epochs = second_step(recipe) * (recipe.epochs - recipe.stage2_epoch)
        if (cell.set, cell.seed) not in begun:  # the first cell of a set and seed runs their stage 1
            begun.add((cell.set, cell.seed))
            epochs += recipe.stage2_epoch
        steps += epochs * protocol.steps(cell)
    return steps * statistics.median(plain) / 3600


# ---- the page ----


# Methods that the others are compared with, where they were run.
BASES = ("isda", "metasaug", "isda-meta")


def tables(cells: Sequence[Mapping[str, Any]], metric: str) -> str:
    """One Markdown table per set, with one line per method: means over its seeds."""
    parts = []
    for name in dict.fromkeys(cell["set"] for cell in cells):
        of_method = _by_method(cells, name)
        bases = [method for method in BASES if method in of_method]
        parts += [
            f"### {_title(cells, name)}", "",
            "| method | seeds | macro error | " + "".join(f"against `{base}` | " for base in bases)
            + "head | medium | tail | worst class |", "|---|" + "---|" * (len(bases) + 6)]
        for method, mine in of_method.items():
            against = [_spread([cell[metric] - other[metric] for cell, other in _pairs(mine, of_method[base])
                                if method != base], signed=True) for base in bases]
            groups = [_mean([cell["groups"][group] for cell in mine.values()]) for group in GROUPS]
            parts.append(" | ".join([
                f"| `{method}`", str(len(mine)), _spread([cell[metric] for cell in mine.values()]), *against, *groups,
                _mean([cell["worst_class_error"] for cell in mine.values()]) + " |"]))
        parts.append("")
    return "\n".join(parts)


def _by_method(cells: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The cells of a set: by method, then by seed."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for cell in cells:
        if cell["set"] == name:
            found.setdefault(cell["method"], {})[cell["seed"]] = cell
    return found


def _pairs(
    mine: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Cells of two methods that share a seed."""
    return [(cell, others[seed]) for seed, cell in mine.items() if seed in others]


def _title(cells: Sequence[Mapping[str, Any]], name: str) -> str:
    cell = next(cell for cell in cells if cell["set"] == name)
    return (cell["data"] + (f", imbalance {cell['imbalance']:g}" if cell["imbalance"] else "")
            + f", {cell['epochs']} epochs")


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1%}"


def _spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean and standard error, in per cent; a dash for none."""
    if not values:
        return "–"
    mean = 100 * statistics.mean(values)
    shown = f"{mean:+.2f}" if signed else f"{mean:.2f}"
    if len(values) < 2:
        return shown
    return f"{shown} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.2f}"


def comparison(cells: Sequence[Mapping[str, Any]], metric: str, method: str) -> str:
    """One line per set: the method's differences from the others, paired by seed, and from ISDA per group."""
    lines = ["| | seeds | " + "".join(f"against `{base}` | " for base in BASES) + "head | medium | tail |",
             "|---|" + "---|" * (len(BASES) + 4)]
    for name in dict.fromkeys(cell["set"] for cell in cells if cell["method"] == method):
        of_method = _by_method(cells, name)
        pairs = {base: _pairs(of_method[method], of_method.get(base, {})) for base in BASES}
        against = [_spread([mine[metric] - other[metric] for mine, other in pairs[base]], signed=True)
                   for base in BASES]
        groups = [_spread([mine["groups"][group] - other["groups"][group] for mine, other in pairs["isda"]],
                          signed=True) for group in GROUPS]
        lines.append(" | ".join([f"| {_title(cells, name)}", str(len(of_method[method])), *against, *groups]) + " |")
    return "\n".join(lines)


def paper_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """One line per cell of the paper's table: three ways to read its second stage, beside the paper's figure."""
    from zoo.registry import PUBLISHED

    lines = ["| set | method | seeds | last epoch, % | mean of last ten, % | best test epoch, % | paper, % | "
             "best − paper |",
             "|---|---|---|---|---|---|---|---|"]
    for name in dict.fromkeys(cell["set"] for cell in cells):
        for method, mine in _by_method(cells, name).items():
            rows = list(mine.values())
            loss = {"metasaug": "ce", "metasaug-ldam": "ldam"}.get(method, "")
            paper = PUBLISHED.get((name.rpartition("-")[0], loss), {}).get(round(rows[0]["imbalance"]))
            best = [row["best"]["error"] for row in rows]
            beside = "– | –" if paper is None else (
                f"{paper:.2f} | {100 * statistics.mean(best) - paper:+.2f}")
            lines.append(" | ".join([
                f"| {name}", f"`{method}`", str(len(rows)), _spread([row["error"] for row in rows]),
                _spread([row["mean_of_last_10"] for row in rows]), _spread(best), f"{beside} |"]))
    return "\n".join(lines)


def shift_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """How far the meta step moved S and what that did to the loss, one line per epoch: means over the steps."""
    shown = [cell for cell in cells if cell["method"].startswith("metasaug") and cell["seed"] == 0
             and cell["set"] == "cifar10-lt-100"]
    if not shown:
        return ""
    heads = [f"`{cell['method']}`" for cell in shown]
    lines = ["| epoch | " + " | ".join(f"{head} shift | effect" for head in heads) + " |",
             "|---|" + "---|---|" * len(shown)]
    for logged in zip(*(cell["stage2_log"] for cell in shown), strict=True):
        figures = " | ".join(f"{line['shift']:.1e} | {line['effect']:+.1e}" for line in logged)
        lines.append(f"| {logged[0]['epoch']} | {figures} |")
    return "\n".join(lines)


def shift_figure(cells: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of shift and effect over stage 2, one line per set and method, from its first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    shift, effect = figure.subplots(1, 2, sharex=True)
    lines: dict[tuple[str, str], list[dict[str, float]]] = {}
    for cell in cells:
        if "metasaug" in cell["method"]:
            lines.setdefault((cell["set"], cell["method"]), cell["stage2_log"])
    for (name, method), logged in lines.items():
        at = [100 * (number + 0.5) / len(logged) for number in range(len(logged))]
        (line,) = shift.plot(at, [row["shift"] for row in logged], lw=1.3, label=f"{name}/{method}")
        effect.plot(at, [abs(row["effect"]) for row in logged], lw=1.3, color=line.get_color())
    shift.set(yscale="log", xlabel="% of stage 2", title="‖S' − S‖ / ‖S‖", ylim=(1e-9, 1))
    effect.set(yscale="log", xlabel="% of stage 2", title="|change of the loss|, the loss is about 1", ylim=(1e-9, 1))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def page() -> None:
    """Write the tables into docs/ledger.md, paper.md and heldout.md, and docs/shift.png."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    PAGE.with_name("shift.png").write_bytes(shift_figure(rows_in(RESULTS)))


def pages() -> dict[Path, str]:
    """The pages with their generated parts rewritten."""
    from benchmarks.measuring import filled

    cells, metric, made = rows_in(RESULTS), Protocol().metric, {}
    for path, parts in {
        PAGE: {"results": tables(cells, metric), "shift": shift_table(cells)},
        PAPER_PAGE: {"paper": paper_table(rows_in(Protocol(PAPER).results))},
        HELDOUT_PAGE: {"development": tables(rows_in(Protocol(DEVELOPMENT).results), metric),
                       "report": comparison(cells, metric, "heldout")},
    }.items():
        made[path] = path.read_text(encoding="utf-8")
        for name, content in parts.items():
            begin, end = f"<!-- {name}: python -m benchmarks.ledger page -->", f"<!-- end of {name} -->"
            made[path] = filled(made[path], begin, end, content)
    return made


def main() -> None:
    import tyro  # benchmarks.on_gpu imports this module on machines without tyro

    try:
        tyro.extras.subcommand_cli_from_dict({"run": run, "status": status, "page": page}, prog="benchmarks.ledger",
                                             description=__doc__)
    except Interrupted as stop:
        print("Stopped; the state is saved. The same command continues.", file=sys.stderr)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
