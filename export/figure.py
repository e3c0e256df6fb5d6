"""The card's figure: accuracy of each class beside its training pictures, accuracy of the groups, and reliability."""

import io
from collections.abc import Mapping
from typing import Any

from zoo.labels import GROUPS, UNKNOWN
from zoo.markup import LIGHT


def accuracy_figure(config: Mapping[str, Any]) -> bytes | None:
    """A PNG, identical for the same config; None if nothing was measured or matplotlib is missing.

    Above: the accuracy of each class as a dot (a bar if there are few classes), coloured by group, with the most
    frequent class on the left. A grey step line on a logarithmic axis shows the training pictures. Below: the accuracy
    of each group with its 95 % interval, and the accuracy of answers beside their stated confidence.
    """
    ours = config["metasaug"]
    if not ours.get("results"):
        return None
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None

    measured = (ours.get("calibration") or {}).get("measured") or {}
    bins = measured.get("reliability") or ours["results"].get("calibration")
    figure = Figure(figsize=(8, 6.2), dpi=100, layout="constrained")
    panels = figure.subplot_mosaic([["classes"] * 2, ["groups", "reliability" if bins else "groups"]])
    _classes(panels["classes"], ours)
    _groups(panels["groups"], ours["results"]["groups"])
    if bins:
        _reliability(panels["reliability"], bins)
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _classes(axes: Any, ours: Mapping[str, Any]) -> None:
    per_class, counts = ours["results"]["per_class"], ours.get("class_counts")
    rows = list(zip(per_class, ours["groups"], counts or [0] * len(per_class), strict=True))
    rows.sort(key=lambda row: -row[2])
    tested = [(at, row, group) for at, (row, group, _) in enumerate(rows) if row["test_images"]]
    for group in (*GROUPS, UNKNOWN):
        at = [i for i, _, g in tested if g == group]
        accuracy = [100 * row["correct"] / row["test_images"] for _, row, g in tested if g == group]
        if at and len(rows) <= 50:
            axes.bar(at, accuracy, color=LIGHT[group], label=group)
        elif at:
            axes.scatter(at, accuracy, s=max(1, 2400 / len(rows)), color=LIGHT[group], label=group, linewidths=0,
                         clip_on=False)
    axes.set(ylim=(0, 100), xlim=(-0.6, len(rows) - 0.4), ylabel="correct, % of test pictures",
             xlabel="classes, by training pictures" if counts else "classes")
    if len(rows) <= 20:
        axes.set_xticks(range(len(rows)), [_short(row["label"]) for row, _, _ in rows], rotation=30, ha="right")
    if counts:
        numbers = axes.twinx()
        numbers.step(range(len(rows)), [max(count, 0.5) for _, _, count in rows], where="mid", color="#888888", lw=1.2)
        numbers.set(yscale="log", ylabel="training pictures (line)")


def _groups(axes: Any, groups: Mapping[str, Any]) -> None:
    shown = [group for group in (*GROUPS, UNKNOWN) if (groups.get(group) or {}).get("accuracy") is not None]
    for at, group in enumerate(shown):
        accuracy, (low, high) = groups[group]["accuracy"], groups[group]["interval"]
        axes.bar(at, 100 * accuracy, color=LIGHT[group], width=0.6)
        axes.vlines(at, 100 * low, 100 * high, color="#333333")
    axes.set(ylim=(0, 100), ylabel="correct, % of test pictures", title="Groups, with 95 % intervals")
    axes.set_xticks(range(len(shown)), [f"{group}\n{groups[group]['classes']} classes" for group in shown])


def _reliability(axes: Any, bins: Mapping[str, Any]) -> None:
    """bins   pictures, accuracy and mean confidence of each, as `Tally` gives them"""
    filled = [i for i, images in enumerate(bins["images"]) if images]
    most = max(bins["images"][i] for i in filled)
    axes.plot([0, 100], [0, 100], color="#888888", lw=1, ls="--")
    axes.scatter([100 * bins["confidence"][i] for i in filled], [100 * bins["accuracy"][i] for i in filled],
                 s=[10 + 90 * bins["images"][i] / most for i in filled], color="#444444", linewidths=0)
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="probability of the answer, %", ylabel="correct, % of such answers",
             title="What a probability means")


def _short(label: str) -> str:
    text = label if len(label) <= 16 else label[:15] + "…"
    return text.replace("$", r"\$")  # a plain $ would begin a formula
