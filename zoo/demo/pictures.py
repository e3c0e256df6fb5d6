"""Classify many pictures, or zips of them, one after another; show them as a table and a gallery."""

import csv
import itertools
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import utils as gradio_utils

import zoo
from zoo import archives, images
from zoo.demo import models
from zoo.demo.html import (
    alert,
    badge,
    closed,
    counted,
    escape,
    mass_bar,
    name_of,
    percent,
    thumbnail,
    times,
    uploaded,
)
from zoo.images import NamedPicture
from zoo.labels import GROUPS, UNKNOWN
from zoo.pixels import PUBLIC, Reading
from zoo.rows import Layout

A_PAGE = 60
MOST = archives.MAX_ENTRIES
LAYOUT = Layout()
MAX_PIXELS, MAX_SECONDS = 20_000_000_000, 300.0  # of one job: pixels decoded, time to decode them
LIMITS = f"{MAX_PIXELS // 10**9} gigapixels or {MAX_SECONDS / 60:.0f} minutes"
UNREAD = "not read"
SORTS = {"name": "File", "label": "Class", "sure": "Sure", "group": "Group", "seen": "Seen in training"}


@dataclass(frozen=True)
class Row:
    """One picture: its prediction, without arrays, and a thumbnail."""

    prediction: zoo.Prediction
    small: str = ""

    @property
    def group(self) -> str:
        return self.prediction.top[0].group if self.prediction.top else UNREAD

    @property
    def note(self) -> str:
        """The text after the name, if the picture was not read whole."""
        return f" ({escape(self.prediction.note)})" if self.prediction.note else ""

    @property
    def sure(self) -> float:
        return self.prediction.top[0].probability if self.prediction.top else -1.0


@dataclass(frozen=True)
class View:
    """Which rows are shown, and how."""

    layout: str = "gallery"
    group: str = "all"
    sort: str = "sure"
    down: bool = False
    page: int = 0


# ---- events ----


def run(files: Any, name: str) -> Iterator[tuple[str, list[Row], View, dict[str, Any]]]:
    """Page, rows, view and download, repeatedly during the job: a visitor who leaves ends it at the next yield."""
    rows: list[Row] = []
    no_file = gr.update(value=None, interactive=False)
    try:
        model = models.model(name)
        sources, names, refused = opened(files)
        total = len(names)
        yield progress(0, total, "Loading the model …" if not model.loaded else ""), rows, View(), no_file
        seen: list[tuple[str, str]] = []
        budget, told = Budget(), time.monotonic()
        # One picture at a time: between two pictures, the job can end and others have their turn.
        for prediction in model.predictor.predict_each(each(sources, seen, budget, model.predictor.reading),
                                                       batch_size=1):
            small, note = seen[len(rows)]
            rows.append(Row(light(replace(prediction, note=note)), small))
            if time.monotonic() - told > 0.4:
                told = time.monotonic()
                yield progress(len(rows), total), rows, View(), no_file
    except zoo.PictureError as error:
        yield alert("Nothing was classified", str(error)), [], View(), no_file
        return
    except zoo.ZooError as error:
        yield alert(*closed(name, error)), [], View(), no_file
        return
    used_up = f"Not read: this job has used up its {LIMITS}."
    refused = [*((left, used_up) for left in names[len(rows):]), *refused]
    rows += [Row(zoo.Prediction(source, error=reason)) for source, reason in refused]
    yield show(rows, View()), rows, View(), gr.update(value=as_csv(rows), interactive=True)


def stopped(rows: list[Row] | None) -> tuple[str, dict[str, Any]]:
    if not rows:
        return empty(), gr.update(value=None, interactive=False)
    return show(rows, View()), gr.update(value=as_csv(rows), interactive=True)


def turn(rows: list[Row] | None, view: View | None, event: gr.EventData) -> tuple[str, View]:
    """The page after a click on one of its buttons: "sort:label", "group:tail", "layout:table", "page:2"."""
    what, _, to = str(getattr(event, "act", "")).partition(":")
    view = view or View()
    if what == "sort" and to in SORTS:
        view = replace(view, sort=to, down=not view.down if view.sort == to else False, page=0)
    elif what == "group":
        view = replace(view, group=to, page=0)
    elif what == "layout" and to in ("gallery", "table"):
        view = replace(view, layout=to)
    elif what == "page" and to.isdecimal():
        view = replace(view, page=int(to[:6]))
    return (show(rows, view) if rows else empty()), view


# ---- the pictures ----


class Budget:
    """The limits of one job: pixels and seconds of decoding."""

    def __init__(self) -> None:
        self.pixels, self.seconds = MAX_PIXELS, MAX_SECONDS

    @property
    def left(self) -> bool:
        return self.pixels > 0 and self.seconds > 0


class Turns:
    """A lock that is granted in the order of requests, so that several jobs alternate picture by picture."""

    def __init__(self) -> None:
        self._lock, self._waiting = threading.Lock(), deque[threading.Event]()

    @property
    def shared(self) -> bool:
        """Whether others have a turn or wait for one; ask only outside a turn of your own."""
        return bool(self._waiting)

    @contextmanager
    def turn(self) -> Iterator[None]:
        mine = threading.Event()
        with self._lock:
            self._waiting.append(mine)
            if self._waiting[0] is mine:
                mine.set()
        try:
            mine.wait()
            yield
        finally:
            with self._lock:
                self._waiting.remove(mine)
                if self._waiting:
                    self._waiting[0].set()


_turns = Turns()


def opened(files: Any) -> tuple[Iterator[NamedPicture], list[str], list[tuple[str, str]]]:
    """The pictures among uploads and inside zips, their names, and the refused zips with the reasons.

    Raises PictureError if there is nothing to classify, or too much.
    """
    sources, refused, names = [], [], []
    for file in files if isinstance(files, list) else []:
        name = str((isinstance(file, dict) and file.get("orig_name")) or "file")[:200]
        path = uploaded(file)
        if archives.is_zip(path):
            try:
                inside, pictures = archives.open_zip(path, name)
            except zoo.PictureError as error:
                refused.append((name, str(error)))
                continue
            names += inside
            sources.append(pictures)
        else:
            names.append(name)
            sources.append(iter([NamedPicture(name, path)]))
    if len(names) > MOST:
        raise zoo.PictureError(f"{len(names):,} pictures: at most {MOST:,} at a time here. For more, on your own "
                               "computer: metasaug predict NAME FOLDER --out rows.csv.")
    if not names:
        raise zoo.PictureError(refused[0][1] if refused else "Choose pictures, or a zip of them, first.")
    return itertools.chain.from_iterable(sources), names, refused


def each(
    sources: Iterator[NamedPicture], seen: list[tuple[str, str]], budget: Budget, reading: Reading = PUBLIC
) -> Iterator[NamedPicture]:
    """Decode each picture once, for the model and for its thumbnail, until the budget is used up.

    `seen` gets each thumbnail, with the note on how the picture was read.
    """
    while budget.left:
        with _turns.turn():
            began = time.monotonic()
            named = next(sources, None)
            if named is None:
                return
            name, picture = named
            try:
                if isinstance(picture, zoo.PictureError):
                    raise picture
                decoded: Any
                decoded, facts = images.read(picture, name, reading=reading)
                budget.pixels -= decoded.width * decoded.height * (facts.pages if isinstance(reading.page, str) else 1)
                small, note = thumbnail(decoded), facts.note(reading)
            except zoo.PictureError as error:
                decoded, small, note = error, "", ""
            budget.seconds -= time.monotonic() - began
        seen.append((small, note))
        yield NamedPicture(name, decoded)
        del decoded, picture, named  # keep no large picture while waiting for the next turn


def light(prediction: zoo.Prediction) -> zoo.Prediction:
    return replace(prediction, probabilities=None, logits=None, features=None, feature_map=None)


def as_csv(rows: Sequence[Row]) -> str:
    folder = Path(tempfile.mkdtemp(dir=gradio_utils.get_upload_folder()))
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(LAYOUT.columns)
        writer.writerows(LAYOUT.cells(row.prediction) for row in rows)
    return str(folder / "predictions.csv")


# ---- HTML ----


def empty() -> str:
    return ('<div class="empty"><p>Choose many pictures, or a zip of them, and the model sorts them: by class, by '
            "group, the least sure ones first. You can download the rows as CSV.</p><p>One job reads at most "
            f"{MOST:,} pictures, {LIMITS} of decoding, whichever comes first. Jobs of several visitors "
            "take turns; a job ends when you close the page.</p></div>")


def progress(done: int, total: int, words: str = "") -> str:
    words = words or f"{done:,} of {counted(total, 'picture')}" + ", taking turns with others" * _turns.shared
    return (f'<div class="progress" role="status"><label for="folder-progress">{words}</label>'
            f'<progress id="folder-progress" max="{total}" value="{done}"></progress></div>')


def show(rows: Sequence[Row], view: View) -> str:
    of_group = [row for row in rows if view.group in ("all", row.group)]
    ordered = sorted(of_group, key=partial(key, view.sort), reverse=view.down)
    pages = max(1, -(-len(ordered) // A_PAGE))
    at = min(view.page, pages - 1)
    part = ordered[at * A_PAGE : (at + 1) * A_PAGE]
    body = table(part, view) if view.layout == "table" else gallery(part)
    turns = "".join(button(f"page:{to}", text, at == to, to < 0 or to >= pages)
                    for to, text in ((at - 1, "Earlier"), (at + 1, "Later")))
    foot = (f'<nav class="pages" aria-label="Pages">{turns}<span>{at * A_PAGE + 1:,} to '
            f"{at * A_PAGE + len(part):,} of {len(ordered):,}</span></nav>" if pages > 1 else "")
    return f'<section class="folder">{summary(rows)}{controls(rows, view)}{body}{foot}</section>'


def key(sort: str, row: Row) -> Any:
    top = row.prediction.top[0] if row.prediction.top else None
    # Unread pictures come last in every order except that by file.
    return {
        "name": lambda: row.prediction.source, "sure": lambda: row.sure if top else 2.0,
        "label": lambda: top.label if top else "\U0010ffff",
        "group": lambda: (*GROUPS, UNKNOWN, UNREAD).index(row.group),
        "seen": lambda: (top.train_images or 0) if top else 10**12,
    }[sort]()  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    read = [row for row in rows if row.prediction.top]
    unread = len(rows) - len(read)
    found = Counter((row.prediction.top[0].label, row.group) for row in read)
    groups = Counter(row.group for row in read)
    shares = {g: groups[g] / len(read) for g in (*GROUPS, UNKNOWN) if groups[g]} if read else {}
    classes = "".join(f"<li>{badge(group)} {name_of(label)} <b>{count:,}</b></li>"
                      for (label, group), count in found.most_common(12))
    more = f"<li>and {counted(len(found) - 12, 'more class')[:-1]}es</li>" if len(found) > 13 else ""
    bad = f", {unread:,} could not be read" if unread else ""
    return (f'<div role="status"><h2>{counted(len(read), "picture")} classified{bad}</h2></div>'
            f'{mass_bar(shares) if shares else ""}<ul class="found" aria-label="Classes found">{classes}{more}</ul>')


def controls(rows: Sequence[Row], view: View) -> str:
    counts = Counter(row.group for row in rows)
    present = ["all", *(g for g in (*GROUPS, UNKNOWN, UNREAD) if counts[g])]
    groups = "".join(button(f"group:{g}", f"{g} {counts[g] if g != 'all' else len(rows):,}", view.group == g)
                     for g in present)
    sorts = "".join(button(f"sort:{s}", text, view.sort == s) for s, text in
                    (("sure", f"{'Most' if view.sort == 'sure' and view.down else 'Least'} sure first"),
                     ("label", "By class"), ("name", "By file")))
    layouts = "".join(button(f"layout:{name}", name.title(), view.layout == name) for name in ("gallery", "table"))
    parts = "".join(f'<div role="group" aria-label="{label}">{buttons}</div>' for label, buttons in
                    (("Show", layouts), ("Groups", groups), ("Order", sorts)))
    return f'<div class="controls">{parts}</div>'


def button(act: str, text: str, pressed: bool, disabled: bool = False) -> str:
    return (f'<button type="button" data-act="{act}" aria-pressed="{str(pressed).lower()}"'
            f'{" disabled" if disabled else ""}>{escape(text)}</button>')


def gallery(rows: Sequence[Row]) -> str:
    items = ""
    for row in rows:
        name, top = escape(short(row.prediction.source)), row.prediction.top
        if top:
            items += (f'<li><img src="{row.small}" alt="" width="72" height="72"><div><b>{name_of(top[0].label)}</b>'
                      f'<span>{badge(top[0].group)} {percent(top[0].probability)}</span>'
                      f'<small title="{escape(row.prediction.source)}">{name}{row.note}</small></div></li>')
        else:
            items += (f'<li class="unread"><div><b>Not read</b><small>{name}</small>'
                      f"<span>{escape(reason(row))}</span></div></li>")
    return f'<ul class="gallery">{items}</ul>'


def table(rows: Sequence[Row], view: View) -> str:
    def head(sort: str, text: str) -> str:
        order = ("descending" if view.down else "ascending") if view.sort == sort else "none"
        return (f'<th scope="col" aria-sort="{order}"><button type="button" data-act="sort:{sort}">{text}'
                f'<i aria-hidden="true" class="{order}"></i></button></th>')

    lines = ""
    for row in rows:
        top, name = row.prediction.top, escape(row.prediction.source)
        if top:
            second = f"{name_of(top[1].label)} {percent(top[1].probability)}" if len(top) > 1 else ""
            lines += (f'<tr><td><img src="{row.small}" alt="" width="36" height="36"></td>'
                      f'<th scope="row">{name}{row.note}</th>'
                      f"<td><b>{name_of(top[0].label)}</b></td><td>{percent(top[0].probability)}</td>"
                      f"<td>{badge(top[0].group)}</td><td>{times(top[0].train_images)}</td><td>{second}</td></tr>")
        else:
            lines += (f'<tr class="unread"><td></td><th scope="row">{name}</th><td colspan="5">Not read: '
                      f"{escape(reason(row))}</td></tr>")
    heads = "".join(head(sort, text) for sort, text in SORTS.items())
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="All pictures"><table><thead><tr>'
            f'<td></td>{heads}<th scope="col">Next</th></tr></thead><tbody>{lines}</tbody></table></div>')


def short(source: str) -> str:
    return source.replace("\\", "/").rpartition("/")[2] or source


def reason(row: Row) -> str:
    """The error without the file name, which is shown beside it."""
    return (row.prediction.error or "").removeprefix(row.prediction.source).strip()
