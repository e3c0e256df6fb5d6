"""The card's figure: accuracy of each class beside its number of training pictures."""

import io
from collections.abc import Mapping
from typing import Any

from zoo.labels import GROUPS, UNKNOWN
from zoo.markup import LIGHT


def accuracy_figure(config: Mapping[str, Any]) -> bytes | None:
    """A PNG, the same for the same config; None if nothing was measured, or without matplotlib.

    Classes from left to right by training pictures, most first: a dot for the accuracy of each (a bar if there are few
    classes), coloured by group, and the training pictures as a grey step line on a logarithmic axis.
    """
    ours = config["metasaug"]
    results, counts = ours.get("results"), ours.get("class_counts")
    if not results:
        return None
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None

    rows = list(zip(results["per_class"], ours["groups"], counts or [0] * config["num_classes"], strict=True))
    rows.sort(key=lambda row: -row[2])
    tested = [(at, row, group) for at, (row, group, _) in enumerate(rows) if row["test_images"]]
    figure = Figure(figsize=(8, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for group in (*GROUPS, UNKNOWN):
        at = [i for i, _, g in tested if g == group]
        right = [100 * row["correct"] / row["test_images"] for _, row, g in tested if g == group]
        if at and len(rows) <= 50:
            axes.bar(at, right, color=LIGHT[group], label=group)
        elif at:
            axes.scatter(at, right, s=max(1, 600 / len(rows)), color=LIGHT[group], label=group, linewidths=0)
    axes.set(ylim=(0, 100), xlim=(-0.6, len(rows) - 0.4), ylabel="right, % of test pictures",
             xlabel="classes, by training pictures" if counts else "classes")
    if len(rows) <= 20:
        axes.set_xticks(range(len(rows)), [_short(row["label"]) for row, _, _ in rows], rotation=30, ha="right")
    if counts:
        numbers = axes.twinx()
        numbers.step(range(len(rows)), [max(count, 0.5) for _, _, count in rows], where="mid", color="#888888", lw=1.2)
        numbers.set(yscale="log", ylabel="training pictures (line)")
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _short(label: str) -> str:
    text = label if len(label) <= 16 else label[:15] + "…"
    return text.replace("$", r"\$")  # which would begin a formula
