"""Small figures as SVG text, without a library. The page's style sheet gives colours for light and dark mode."""

import math
from collections.abc import Iterable, Mapping, Sequence

from zoo.markup import escaped

Point = tuple[float, float]


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


class Plot:
    """Axes and marks in a box of width x height units, about the pixels of a phone.

    x, y     the ranges shown                 log_x, log_y   logarithmic axes
    The colour of a mark comes from a class of the style sheet: head, medium, tail, plain, accent.
    """

    def __init__(
        self, x: Point, y: Point, *, log_x: bool = False, log_y: bool = False, width: int = 440, height: int = 270,
        left: int = 52, top: int = 12, right: int = 14, bottom: int = 40,
    ):
        self.x, self.y, self.log_x, self.log_y = x, y, log_x, log_y
        self.width, self.height = width, height
        self.left, self.top, self.right, self.bottom = left, top, width - right, height - bottom
        self.parts: list[str] = []

    def at(self, x: float, y: float) -> Point:
        """The place of a point in the box; points beyond the ranges go to their edge."""
        return (self.left + _place(x, self.x, self.log_x) * (self.right - self.left),
                self.bottom - _place(y, self.y, self.log_y) * (self.bottom - self.top))

    def axes(self, x_ticks: Mapping[float, str], y_ticks: Mapping[float, str], x_title: str, y_title: str = "") -> None:
        for y, label in y_ticks.items():
            _, at = self.at(self.x[0], y)
            self.parts.append(f'<path class="grid" d="M{self.left} {at:.1f}H{self.right}"/>')
            self.text(self.left - 6, at + 4, label, "end")
        for x, label in x_ticks.items():
            at, _ = self.at(x, self.y[0])
            self.parts.append(f'<path class="tick" d="M{at:.1f} {self.bottom}v4"/>')
            self.text(at, self.bottom + 16, label, "middle")
        self.parts.append(f'<path class="base" d="M{self.left} {self.bottom}H{self.right}"/>')
        self.text((self.left + self.right) / 2, self.bottom + 33, x_title, "middle", "title")
        if y_title:
            self.text(self.left, self.top - 12, y_title, "start", "title")

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> None:
        """In units of the box, not of the ranges."""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escaped(text)}</text>')

    def line(self, points: Sequence[Point], kind: str) -> None:
        if points:
            at = " ".join("{:.1f},{:.1f}".format(*self.at(*point)) for point in points)
            self.parts.append(f'<polyline class="line {kind}" points="{at}"/>')

    def area(self, lower: Sequence[Point], upper: Sequence[Point], kind: str) -> None:
        if lower:
            at = " ".join("{:.1f},{:.1f}".format(*self.at(*point)) for point in (*lower, *reversed(upper)))
            self.parts.append(f'<polygon class="area {kind}" points="{at}"/>')

    def dots(self, points: Iterable[Point], kind: str, names: Sequence[str] = (), radius: float = 3.5) -> None:
        """Named dots show their name on hover; dots without names take a few bytes each, for thousands of them."""
        places = [self.at(*point) for point in points]
        if names:
            self.parts += [f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escaped(name)}'
                           "</title></circle>" for (x, y), name in zip(places, names, strict=True)]
        elif places:
            at = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
            self.parts.append(f'<path class="cloud {kind}" stroke-width="{2 * radius}" d="{at}"/>')

    def interval(self, x: float, low: float, high: float, kind: str) -> None:
        (at, bottom), (_, top) = self.at(x, low), self.at(x, high)
        self.parts.append(f'<path class="whisker {kind}" d="M{at:.1f} {bottom:.1f}V{top:.1f}"/>')

    def svg(self, label: str) -> str:
        return (f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escaped(label)}">'
                + "".join(self.parts) + "</svg>")


def _place(value: float, ends: Point, log: bool) -> float:
    low, high = (math.log(end) for end in ends) if log else ends
    value = math.log(max(value, 1e-12)) if log else value
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


PERCENT_TICKS = {0.0: "0%", 0.25: "25%", 0.5: "50%", 0.75: "75%", 1.0: "100%"}


def count_ticks(low: float, high: float) -> dict[float, str]:
    """1, 10, 100 … in [low, high], with 3, or 2 and 5, between if these are too few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = {float(s * 10**p): f"{s * 10**p:,}" for p in powers if p >= 0 for s in steps
                 if low <= s * 10**p <= high}
        if len(ticks) >= 3:
            break
    return ticks


def even_ticks(high: float, low: float = 0.0, at_most: int = 5) -> dict[float, str]:
    """Round steps over [low, high]."""
    raw = max(high - low, 1e-9) / at_most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * (1 - 1e-9))
    ticks = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return {tick: f"{tick:,.10g}" for tick in (round(tick, 10) for tick in ticks)}
