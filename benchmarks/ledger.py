"""Does it help? Every cell of ledger.toml, run once, from one stage 1 a set and seed.

    python -m benchmarks.ledger run --cifar10 DIR --plankton DIR   # goes on where it was stopped
    python -m benchmarks.ledger status                             # what is missing, and how long it will take
    python -m benchmarks.ledger page                               # the tables in docs/ledger.md, docs/heldout.md

`run` and `status` take the cells of another list as well, with its own results: --protocol benchmarks/development.toml.
"""

import dataclasses
import io
import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from training.command_line import RunOptions, TrainCifar, TrainFolder, alone_in
from training.data.check import second_step
from training.data.cifar import long_tail_counts
from training.data.datasets import LongTailed, Split
from training.network.derivatives import Precision
from training.recipes import Cifar10LT, Folder, Recipe
from zoo.files import write_atomically
from zoo.labels import GROUPS

HERE = Path(__file__).resolve().parent
PROTOCOL, DEVELOPMENT, RESULTS = HERE / "ledger.toml", HERE / "development.toml", HERE / "results" / "ledger.json"
PAGE, HELDOUT_PAGE = (HERE.parent / "docs" / f"{name}.md" for name in ("ledger", "heldout"))
RECIPES: dict[str, type[Recipe]] = {recipe.dataset: recipe for recipe in (Cifar10LT, Folder)}


@dataclass(frozen=True)
class Cell:
    set: str
    method: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.set}/{self.method}/{self.seed}"


class Protocol:
    """ledger.toml, read."""

    def __init__(self, path: Path = PROTOCOL):
        self._content = tomllib.loads(path.read_text(encoding="utf-8"))
        self.metric: str = self._content["metric"]
        self.methods: dict[str, dict[str, Any]] = self._content["methods"]

    @property
    def cells(self) -> list[Cell]:
        """In the order of running: a seed of a set after the other; the first cell runs the stage 1 that all share."""
        return [Cell(part["set"], method, seed) for part in self._content["cells"] for seed in part["seeds"]
                for method in part["methods"]]

    def set_of(self, cell: Cell) -> dict[str, Any]:
        return self._content["sets"][cell.set]

    def precision(self, cell: Cell) -> Precision:
        """Of the backbone; a seed's cells have one, as they share a stage 1."""
        return next(part.get("precision", "float32") for part in self._content["cells"]
                    if part["set"] == cell.set and cell.seed in part["seeds"] and cell.method in part["methods"])

    def validation(self, cell: Cell) -> int:
        """Training pictures of each class that stand in for the test set; 0: none."""
        return self.set_of(cell).get("validation", 0)

    def steps(self, cell: Cell) -> int:
        """Steps an epoch."""
        return -(-self.set_of(cell)["train_pictures"] // self.recipe(cell).batch_size)

    def recipe(self, cell: Cell) -> Recipe:
        flags = dict(self.set_of(cell)["recipe"])
        make = RECIPES[flags.pop("dataset")]
        return make(**flags, **self.methods[cell.method], precision=self.precision(cell), stage1_loss="ce",
                    seed=cell.seed, subset_seed=cell.seed)


# ---- running ----


def run(cifar10: Path | None = None, plankton: Path | None = None, runs: Path = Path("runs/ledger"),
        results: Path | None = None, only: str = "", limit: int | None = None, protocol: Path = PROTOCOL) -> None:
    """Run the cells that are missing, one after the other; a cell done is never run again.

    Args:
        cifar10: Folder of the CIFAR-10 pictures, as for `metasaug train cifar10-lt`; without it those cells wait.
        plankton: Folder of the plankton class folders, as for `metasaug train folder`; without it those cells wait.
        runs: Where the runs live; a run that was stopped goes on to the same bits.
        results: The file that takes each cell's figures as it ends; benchmarks/results/NAME.json of NAME.toml.
        only: Only cells whose SET/METHOD/SEED matches, as "cifar10-lt-100/*/1". Several of these commands may run
            beside each other where no set and seed is matched by two.
        limit: Stop after so many cells.
        protocol: The list of cells.
    """
    listed, results = Protocol(protocol), results or _results_of(protocol)
    folders = {"cifar10-lt": cifar10, "folder": plankton}
    missing = [cell for cell in _missing(listed, results)
               if folders[listed.recipe(cell).dataset] and fnmatch(cell.key, only or "*")]
    for number, cell in enumerate(missing[:limit], 1):
        print(f"[{number}/{len(missing)}] {cell.key}", flush=True)
        recipe = listed.recipe(cell)
        folder = folders[recipe.dataset]
        assert folder is not None
        with alone_in(runs / cell.set / str(cell.seed)):
            figures = _run_cell(recipe, cell, _load(recipe, folder, listed.validation(cell)), runs)
        with alone_in(runs, wait=True):
            done = [*_done(results), figures]
            order = [cell.key for cell in listed.cells]
            done.sort(key=lambda row: order.index(_cell_of(row).key))
            write_atomically(results, _as_json(done))
        print(f"    {listed.metric} {figures[listed.metric]:.2%}", flush=True)


def _results_of(protocol: Path) -> Path:
    return RESULTS.with_name(f"{protocol.stem}.json")


def _load(recipe: Recipe, folder: Path, validation: int) -> LongTailed:
    """As `metasaug train` loads it. `validation`: so many training pictures a class take the test set's place; 0: none.
    """
    options = RunOptions(data=folder)
    if isinstance(recipe, Cifar10LT):
        return _with_validation(recipe, options, validation) if validation else TrainCifar(recipe, options).load()
    assert isinstance(recipe, Folder)
    return TrainFolder(recipe, options).load()


def _with_validation(recipe: Cifar10LT, options: RunOptions, per_class: int) -> LongTailed:
    """The long tail is cut from what remains; the meta set is that of the whole."""
    whole = TrainCifar(dataclasses.replace(recipe, imbalance=1), options).load()
    assert isinstance(whole.train, Split)
    of_class = [np.flatnonzero(whole.train.labels == c) for c in range(len(whole.label_names))]
    counts = long_tail_counts(min(map(len, of_class)) - per_class, len(of_class), recipe.imbalance)
    test_at = np.concatenate([at[:per_class] for at in of_class])
    train_at = np.concatenate([at[per_class : per_class + n] for at, n in zip(of_class, counts, strict=True)])
    train, test = (whole.train.at(at) for at in (train_at, test_at))
    return dataclasses.replace(whole, train=train, test=test, source=f"{whole.source}, validation cut")


def _run_cell(recipe: Recipe, cell: Cell, pictures: LongTailed, runs: Path) -> dict[str, Any]:
    import torch

    from benchmarks.measuring import machine
    from training.command_line import code_version
    from training.run import loop, stages

    folder = runs / cell.set / str(cell.seed)
    stage1 = folder / "stage1"  # the first cell's; the others start from it
    own = folder / cell.method
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state, measured = loop.run(recipe, pictures, own, device, resume=True, stage1=stage1 if stage1.exists() else None,
                               evaluate_every=recipe.epochs, features=folder / "features")
    if not stage1.exists():
        (own / "stage1").rename(stage1)
    second = [line for line in map(json.loads, (own / "log.jsonl").read_text().splitlines()) if line["stage"] == 2]
    counts = stages.data_of_stage(recipe, pictures, 2).class_counts
    return {
        **asdict(cell), "data": pictures.source, "imbalance": recipe.to_dict().get("imbalance"),
        "fidelity": recipe.fidelity if recipe.augment == "metasaug" else None, "epochs": recipe.epochs,
        "precision": recipe.precision, "error": measured["error"], "macro_error": measured["macro_error"],
        "worst_class_error": measured["worst_class_error"],
        "groups": {group: row["accuracy"] for group, row in measured["groups"].items()},
        "classes": [{"train_images": n, "correct": row["correct"], "test_images": row["test_images"]}
                    for n, row in zip(counts, measured["per_class"], strict=True)],
        "stage2_log": [{name: line[name] for name in ("epoch", "loss", "shift", "effect") if name in line}
                       for line in second],
        "seconds": round(state.seconds), "machine": machine(device), "code_version": code_version(),
    }


def _done(results: Path) -> list[dict[str, Any]]:
    return json.loads(results.read_text())["cells"] if results.exists() else []


def _cell_of(row: Mapping[str, Any]) -> Cell:
    return Cell(row["set"], row["method"], row["seed"])


def _missing(protocol: Protocol, results: Path) -> list[Cell]:
    done = {_cell_of(row) for row in _done(results)}
    return [cell for cell in protocol.cells if cell not in done]


def _as_json(cells: Sequence[Mapping[str, Any]]) -> bytes:
    """A cell a line: a commit shows which one came."""
    return ('{"cells": [\n' + ",\n".join(json.dumps(cell) for cell in cells) + "\n]}\n").encode()


# ---- status ----


def status(results: Path | None = None, protocol: Path = PROTOCOL) -> None:
    """What is done, what is missing, and the time left, by what like cells took."""
    listed, results = Protocol(protocol), results or _results_of(protocol)
    done, missing = _done(results), _missing(listed, results)
    for cell in missing:
        print(f"missing  {cell.key}")
    left = _hours_left(listed, missing, done)
    print(f"{len(done)} cells done, {len(missing)} missing"
          + ("" if left is None else f"; about {left:.1f} hours left at the speed of the cells done"))


def _hours_left(protocol: Protocol, missing: Sequence[Cell], done: Sequence[Mapping[str, Any]]) -> float | None:
    plain = [row["seconds"] / (row["epochs"] * protocol.steps(_cell_of(row))) for row in done if row["method"] == "ce"]
    if not plain:
        return None
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


# What the others are set beside, where it was run.
BASES = ("isda", "metasaug", "isda-meta")


def tables(cells: Sequence[Mapping[str, Any]], metric: str) -> str:
    """A table a set, in Markdown: a line a method, means over its seeds."""
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
    """A line a set: how far the method lies from the others, paired by seed, and where the difference to ISDA lies."""
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


def shift_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """How far the meta step moved S, and what that did to the loss, an epoch a line: means over the steps."""
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
    """A PNG of shift and effect over stage 2, a line a set and method, of its first seed."""
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
    """Write the tables into docs/ledger.md and docs/heldout.md, between their markers, and docs/shift.png."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    PAGE.with_name("shift.png").write_bytes(shift_figure(_done(RESULTS)))


def pages() -> dict[Path, str]:
    """The pages with their generated parts made anew."""
    from benchmarks.measuring import filled

    cells, metric, made = _done(RESULTS), Protocol().metric, {}
    for path, parts in {
        PAGE: {"results": tables(cells, metric), "shift": shift_table(cells)},
        HELDOUT_PAGE: {"development": tables(_done(_results_of(DEVELOPMENT)), metric),
                       "report": comparison(cells, metric, "heldout")},
    }.items():
        made[path] = path.read_text(encoding="utf-8")
        for name, content in parts.items():
            begin, end = f"<!-- {name}: python -m benchmarks.ledger page -->", f"<!-- end of {name} -->"
            made[path] = filled(made[path], begin, end, content)
    return made


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"run": run, "status": status, "page": page}, prog="benchmarks.ledger",
                                         description=__doc__)


if __name__ == "__main__":
    main()
