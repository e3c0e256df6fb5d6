"""Predictions as rows of a table: what `metasaug predict --out` and the demo write."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zoo.files import printable
from zoo.labels import GROUPS
from zoo.predictor import Prediction


@dataclass(frozen=True)
class Layout:
    """The columns of a table of predictions, and their values.

    top_k        classes in each row
    threshold    adds the column unsure: yes where the likeliest class has a lower probability
    coverage     adds the columns set and set_size: the prediction set of this coverage, its labels joined by " | "
    familiarity  adds the column familiarity; for a model with a calibration
    """

    top_k: int = 5
    threshold: float | None = None
    coverage: float | None = None
    familiarity: bool = False

    @cached_property
    def columns(self) -> dict[str, type]:
        """The name and type of each column. Any value but the path may be missing."""
        return {"path": str, "label": str, "probability": float, "margin": float, "group": str, "train_images": int,
                **({} if self.threshold is None else {"unsure": str}),
                **({} if self.coverage is None else {"set": str, "set_size": int}),
                **({"familiarity": float} if self.familiarity else {}),
                **dict.fromkeys(GROUPS, float),
                **{f"{name}_{rank}": kind for rank in range(2, self.top_k + 1)
                   for name, kind in (("label", str), ("probability", float))},
                "error": str, "note": str}

    def values(self, row: Prediction) -> dict[str, Any]:
        """One prediction: the likeliest class, its lead over the next, the probability of each group, the next
        likeliest classes, and the error or a note if any. Missing values are left out."""
        found: dict[str, Any] = {"path": printable(row.source)}
        if row.top:
            best = row.top[0]
            found |= {"label": best.label, "probability": round(best.probability, 6), "margin": round(row.margin, 6),
                      "group": best.group, "train_images": best.train_images}
            if self.threshold is not None and best.probability < self.threshold:
                found["unsure"] = "yes"
            if self.coverage is not None:
                labels = [each.label for each in row.set(self.coverage)]
                found |= {"set": " | ".join(labels), "set_size": len(labels)}
            if self.familiarity and row.familiarity is not None:
                found["familiarity"] = round(row.familiarity, 6)
        found |= {group: round(mass, 6) for group, mass in row.groups.items() if group in GROUPS}
        for rank, each in enumerate(row.top[1 : self.top_k], 2):
            found |= {f"label_{rank}": each.label, f"probability_{rank}": round(each.probability, 6)}
        found |= {"error": row.error and printable(row.error), "note": row.note or None}
        return {name: value for name, value in found.items() if value is not None}

    def cells(self, row: Prediction) -> list[str]:
        """`values` as text that any spreadsheet opens."""
        return as_cells(self.values(row), self.columns)


def as_cells(found: dict[str, Any], types: dict[str, type]) -> list[str]:
    """The cells of `Layout.values`, in the order of the columns; an empty one for a missing value."""
    return ["" if (value := found.get(name)) is None else f"{value:.6f}" if kind is float else safe(str(value))
            for name, kind in types.items()]


def safe(text: str) -> str:
    """A cell that no spreadsheet runs as a formula: ' before a text that starts with = + - @ tab, return or '.

    `plain` removes it again.
    """
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "'")) else text


def plain(cell: str) -> str:
    """The text from which `safe` made the cell."""
    return cell.removeprefix("'")
