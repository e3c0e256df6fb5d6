"""`metasaug list` and `info`."""

import json
from typing import Annotated, Any

import tyro

import zoo
from zoo.hub import OWNER, own_copies
from zoo.loading import open_folder
from zoo.model_folder import CARD
from zoo.registry import PAPER


def list_table(
    every: Annotated[bool, tyro.conf.arg(name="all")] = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """List the models: data set, method, where the weights are, test error.

    Args:
        every: List the benchmark cells without published weights too; `metasaug train` and `release` make them.
        as_json: Print one JSON array of all models instead of the table.
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
    owner = own_copies()
    if not (every or owner):
        ready = [row for row in rows if row["weights"] != "unpublished"]
        left_out, rows = len(rows) - len(ready), ready
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
    if owner:
        print(f"{OWNER}={owner}: a model that is not bundled loads from hf:{owner}/NAME.")
    elif not every:
        print(f"\n{left_out} more models are benchmark cells without published weights: `metasaug list --all`.")


def info(model: tyro.conf.Positional[str]) -> None:
    """Show a model's card: how it was trained, its accuracy per group and class, its limits.

    Args:
        model: A name from `metasaug list`, hf:owner/repo[@revision] on the Hub, or a model folder.
    """
    print(open_folder(model, [CARD]).card)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
