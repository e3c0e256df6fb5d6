"""Predictions as rows of a table: what `metasaug predict --out` and the demo write."""

from zoo.files import printable
from zoo.labels import GROUPS
from zoo.predictor import Prediction


def header(top_k: int) -> list[str]:
    """The columns of `cells`."""
    return ["path", "label", "probability", "group", "train_images", *GROUPS, *_others(top_k), "error", "note"]


def cells(row: Prediction, top_k: int) -> list[str]:
    """One prediction: the likeliest class, the mass of each group, the next likeliest, the error or a note if any."""
    first = ["", "", "", ""]
    if row.top:
        best = row.top[0]
        first = [best.label, f"{best.probability:.6f}", best.group,
                 "" if best.train_images is None else str(best.train_images)]
    mass = [f"{row.groups[g]:.6f}" if g in row.groups else "" for g in GROUPS]
    rest = [cell for c in row.top[1:top_k] for cell in (c.label, f"{c.probability:.6f}")]
    rest += [""] * (len(_others(top_k)) - len(rest))
    return [safe(printable(cell)) for cell in (row.source, *first, *mass, *rest, row.error or "", row.note)]


def safe(text: str) -> str:
    """A cell that no spreadsheet runs as a formula: ' before a text that begins with one of = + - @ tab, return or '.

    `plain` takes it off again.
    """
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "'")) else text


def plain(cell: str) -> str:
    """The text that `safe` made a cell of."""
    return cell.removeprefix("'")


def _others(top_k: int) -> list[str]:
    return [f"{column}_{rank}" for rank in range(2, top_k + 1) for column in ("label", "probability")]
