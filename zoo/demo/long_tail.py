"""The long tail: training pictures of each class, and each model's accuracy on it."""

import math
from collections.abc import Sequence

import numpy as np

from zoo.demo import models
from zoo.demo.answers import Answer, chosen
from zoo.demo.html import badge, counted, escape, groups_of, legend, meaning, measured, name_of, percent
from zoo.demo.models import Model

BARS = 40  # up to this many classes, each gets a bar with its name
ROWS = 150  # up to this many classes, all are listed and have a dot


def introduction(names: list[str] | None) -> str:
    """The head of the page: the question, and the long tail that the first model was trained on."""
    opened = models.opened(chosen(names))
    story, figure = "Real collections have a long tail: a few classes with many pictures, many classes with few.", ""
    if opened and (counts := opened[0].class_counts):
        model = opened[0]
        first, last = model.by_size[0], model.by_size[-1]
        story = (f"{'These networks' if len(opened) > 1 else 'This network'} saw <b>"
                 f"{counted(counts[first], 'picture')}</b> of “{name_of(model.labels[first])}” but only <b>"
                 f"{counts[last]:,}</b> of “{name_of(model.labels[last])}”. After ordinary training, a network "
                 "often misses classes that it rarely saw. MetaSAug is a training method against that"
                 + (": give both models the same picture and compare." if len(opened) > 1 else "."))
        figure = strip(model) if len(model.labels) <= BARS else curve(model, [], 110)
    return ('<div class="intro"><div><h1>How well do models recognise rare classes?</h1>'
            f"<p>{story}</p></div>{figure}</div>")


def strip(model: Model) -> str:
    counts = model.class_counts or []
    top = max(counts)
    bars = "".join(
        f'<li><b>{counts[c]:,}</b><i class="{model.groups[c]}" style="height:{counts[c] / max(top, 1) * 72 + 2:.1f}px">'
        f"</i><span>{name_of(model.labels[c])}</span></li>"
        for c in model.by_size
    )
    return (f'<figure class="strip{" many" if len(counts) > 12 else ""}"><ol>{bars}</ol>'
            f"<figcaption>Training pictures of each class</figcaption>{legend(model)}</figure>")


def page(names: list[str] | None, answers: list[Answer] | None) -> str:
    """The whole tab: the curve with the answers marked on it, and accuracy against class size."""
    opened = models.opened(chosen(names))
    if not opened:
        return "<p>None of the chosen models is published yet.</p>"
    first = opened[0]
    alike = [m for m in opened if m.labels == first.labels]
    others = [m.name for m in opened if m.labels != first.labels]
    note = f'<p class="aside">Left out, as their classes differ: {escape(", ".join(others))}.</p>' if others else ""
    return f'<section class="longtail">{sizes(first, alike, answers or [])}{accuracies(alike)}{note}</section>'


# ---- the curve ----


def sizes(first: Model, alike: Sequence[Model], answers: Sequence[Answer]) -> str:
    if not first.class_counts:
        return "<h2>The long tail</h2><p>The training pictures per class are not known for this model.</p>"
    known = {m.name: m for m in alike}
    marks = [(i, known[a.name], a.prediction.top[0].index) for i, a in enumerate(answers)
             if a.name in known and a.prediction.top]
    said = "".join(f'<li><i class="dot m{i}"></i>{escape(m.title)} says <b>{name_of(m.labels[c])}</b>: '
                   f"{counted(first.class_counts[c], 'training picture')}, number {first.by_size.index(c) + 1:,} of "
                   f"{len(m.labels):,} by size</li>" for i, m, c in marks)
    hint = "" if said else '<p class="aside">Give the models a picture to see their answers here.</p>'
    total, half = sum(first.class_counts), half_way(first)
    return (f"<h2>Training pictures per class</h2><p>{counted(len(first.labels), 'class')[:-1] + 'es'}, "
            f"{total:,} training pictures; half of them belong to the {half:,} largest "
            f"class{'' if half == 1 else 'es'}.</p>{curve(first, marks, 190)}<ul class=\"said\">{said}</ul>{hint}")


def half_way(model: Model) -> int:
    """How many of the largest classes hold half of the training pictures."""
    counts = np.array([(model.class_counts or [])[c] for c in model.by_size])
    return int(np.searchsorted(counts.cumsum(), counts.sum() / 2)) + 1


def curve(model: Model, marks: Sequence[tuple[int, Model, int]], height: int) -> str:
    """Training pictures of each class, the largest first; a needle for each answer."""
    counts = [(model.class_counts or [])[c] for c in model.by_size]
    top, classes = max(*counts, 1), len(counts)
    areas = "".join(area(counts, [model.groups[c] for c in model.by_size], group, top) for group in groups_of(model))
    rank = {c: r for r, c in enumerate(model.by_size)}
    needles = ""
    for i, _, c in marks:
        left = (rank[c] + 0.5) / classes
        side = "right" if left > 0.6 else "left"
        needles += (f'<span class="needle m{i} {side}" style="left:{left:.2%};top:{8 + 22 * i}px"><i class="dot m{i}">'
                    f"</i><b>{name_of(model.labels[c])}</b></span>")
    words = (f"Class sizes from {counts[0]:,} to {counts[-1]:,} training pictures over {classes:,} classes; the middle "
             f"one has {counts[classes // 2]:,}.")
    return (f'<figure class="curve"><div class="plot" style="height:{height}px">'
            f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="{words}">{areas}</svg>'
            f'{needles}</div>'
            f"<figcaption><span>the largest class: {top:,} pictures</span><span>the smallest: {counts[-1]:,}</span>"
            f"</figcaption>{legend(model)}</figure>")


def area(counts: Sequence[int], groups: Sequence[str], group: str, top: int) -> str:
    """The steps of one group's classes as an SVG path; from 1,000 classes on, a step is a mean over several."""
    members = [r for r, g in enumerate(groups) if g == group]
    every = max(1, len(counts) // 500)
    width = 1000 / len(counts)
    steps = ""
    for start in members[::every]:
        block = members[members.index(start) :][:every] if every > 1 else [start]
        mean = sum(counts[r] for r in block) / len(block)
        x, y = start * width, 100 - max(mean / top * 98, 0.7)
        steps += f"M{x:.2f} 100V{y:.2f}h{(block[-1] + 1 - start) * width + 0.05:.2f}V100z"
    return f'<path class="{group}" d="{steps}"/>'


# ---- accuracy against size ----


def accuracies(alike: Sequence[Model]) -> str:
    known = [model for model in alike if model.results]
    if not known:
        return "<h2>Accuracy</h2><p>None of the chosen models has measured results.</p>"
    first = known[0]
    groups = "".join(group_row(group, known) for group in groups_of(first))
    names = [escape(model.title if len({m.title for m in known}) == len(known) else model.name) for model in known]
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    return f"""
<h2>Accuracy by group</h2>
<p>Measured on {first.results["images"]:,} test pictures that no model was trained on. In brackets: the 95% confidence
interval.</p>
<table class="groups"><thead><tr><th scope=col>Group</th>{head}</tr></thead><tbody>{groups}</tbody></table>
{against_size(known, names)}{class_table(known, names)}"""


def group_row(group: str, alike: Sequence[Model]) -> str:
    cells = ""
    for model in alike:
        figures = measured(model, group)
        if figures is None:
            cells += "<td>not measured</td>"
            continue
        correct, images, low, high = figures
        cells += (f"<td><b>{percent(correct / images)}</b> <span>({low * 100:.1f}–{high:.1%})</span><small>"
                  f"{correct:,} of {images:,}</small></td>")
    small = meaning(alike[0], group)
    return f"<tr><th scope=row>{badge(group)}<small>{small}</small></th>{cells}</tr>"


def rights(model: Model) -> list[float | None]:
    """The accuracy on each class; None if the class has no test pictures."""
    return [row.get("correct", 0) / row["test_images"] if row.get("test_images") else None
            for row in model.results["per_class"]]


def against_size(alike: Sequence[Model], names: Sequence[str]) -> str:
    """A dot per class (for up to ROWS) and a line through the means of classes of similar size, on a log axis."""
    counts = alike[0].class_counts
    if not counts or max(counts) <= max(min(counts), 1):
        return ""
    low, high = math.log(max(min(counts), 1)), math.log(max(counts))

    def across(count: float) -> float:
        return (high - math.log(max(count, 1))) / (high - low)

    dots, lines, keys = "", "", ""
    for i, (model, name) in enumerate(zip(alike, names, strict=True)):
        right = rights(model)
        if len(counts) <= ROWS:
            dots += "".join(f'<i class="dot m{i}" style="left:{across(counts[c]):.2%};bottom:{r:.2%}"></i>'
                            for c, r in enumerate(right) if r is not None)
        points = " ".join(f"{across(size) * 1000:.1f},{100 - share * 100:.1f}" for size, share in means(counts, right))
        lines += f'<polyline class="m{i}" points="{points}"/>'
        keys += f'<li><i class="dot m{i}"></i>{name}</li>'
    ticks = "".join(f'<span style="left:{across(t):.2%}">{t:,}</span>'
                    for t in (10**k for k in range(7)) if low <= math.log(t) <= high)
    each = "Each dot is a class, each line the mean" if dots else "Each line is the mean"
    return f"""
<h2>Accuracy against class size</h2>
<p>{each} over classes of similar size. The rarer a class, the more the training method matters. The table below has
the numbers.</p>
<figure class="scatter"><div class="plot" aria-hidden="true"><span class="y top">100%</span>
<span class="y mid">50%</span><span class="y low">0%</span>
<svg viewBox="0 0 1000 100" preserveAspectRatio="none">{lines}</svg>{dots}</div>
<div class="ticks" aria-hidden="true">{ticks}</div>
<figcaption>Vertical: test accuracy. Horizontal: training pictures of the class, most on the left.</figcaption>
<ul class="keys">{keys}</ul></figure>"""


def means(counts: Sequence[int], right: Sequence[float | None], bins: int = 6) -> list[tuple[float, float]]:
    """(size, accuracy) of classes of similar size, in equal steps of log size, the largest first."""
    known = [(max(n, 1), r) for n, r in zip(counts, right, strict=True) if r is not None]
    if not known:
        return []
    logs = np.log([n for n, _ in known])
    shares = np.array([r for _, r in known])
    step = (logs.max() - logs.min()) / bins or 1.0
    which = np.minimum((logs - logs.min()) // step, bins - 1)
    return [(float(np.exp(logs[which == b].mean())), float(shares[which == b].mean()))
            for b in range(bins - 1, -1, -1) if (which == b).any()]


def class_table(alike: Sequence[Model], names: Sequence[str]) -> str:
    first = alike[0]
    keyed = "".join(f'<th scope=col class="number"><i class="dot m{i}"></i> {n}</th>' for i, n in enumerate(names))
    right = [rights(model) for model in alike]
    order, note = first.by_size, ""
    if len(order) > ROWS:
        order = [*order[:20], *order[-20:]]
        note = f"<p>The 20 largest and 20 smallest of {len(first.labels):,} classes. The model folders list all.</p>"
    rows = "".join(class_row(c, first, [r[c] for r in right]) for c in order)
    return f"""
<h2>Every class, largest first</h2>{note}
<div class="scroll" role="region" tabindex="0" aria-label="Every class"><table class="classes"><thead><tr>
<th scope=col>Class</th><th scope=col>Training pictures</th>
<th scope=col class="wide" aria-hidden="true"><span class="axis"><span>0%</span><span>test accuracy</span>
<span>100%</span></span></th>{keyed}</tr></thead><tbody>{rows}</tbody></table></div>"""


def class_row(c: int, model: Model, right: Sequence[float | None]) -> str:
    count = model.class_counts[c] if model.class_counts else None
    share = 0 if count is None else count / max(*(model.class_counts or ()), 1)
    known = [r for r in right if r is not None]
    span = f'<i class="span" style="left:{min(known):.2%};width:{max(known) - min(known):.2%}"></i>' if known else ""
    dots = "".join(f'<i class="dot m{i}" style="left:{r:.2%}"></i>' for i, r in enumerate(right) if r is not None)
    numbers = "".join(f'<td class="number">{"–" if r is None else percent(r)}</td>' for r in right)
    return (f"<tr><th scope=row>{name_of(model.labels[c])} {badge(model.groups[c])}</th>"
            f'<td><div class="size"><b>{"?" if count is None else f"{count:,}"}</b><span class="bar">'
            f'<i class="{model.groups[c]}" style="width:{share:.2%}"></i></span></div></td>'
            f'<td class="wide" aria-hidden="true"><span class="scale">{span}{dots}</span></td>{numbers}</tr>')
