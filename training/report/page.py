"""report.html: the test results of a model, in sentences and charts. One file, no script, nothing fetched.

C classes. `results` comes from training.report.metrics; sections whose figures are missing are left out.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import TrainingError
from training.report.charts import PERCENT_TICKS, Plot, count_ticks, even_ticks, shortened
from training.report.metrics import BINS, ZERO_RECALL, weighted_accuracy, wilson_interval
from training.report.pictures import sections_of
from training.report.sentences import Classes, Results, advice, findings, percent, span, summary
from zoo.files import write_atomically
from zoo.markup import DARK, LIGHT, badge, breakable, escaped, variables
from zoo.model_folder import ModelFolder
from zoo.pixels import LOCAL

STYLE = Path(__file__).with_name("page.css")
SINGLE = 20  # with this many classes or more, means are drawn instead of an interval for each class
OPEN_UP_TO = 60  # rows of a table that is shown unfolded


def report_of_run(run: Path, results: Results) -> str:
    """Write RUN/report.html; returns the sentences printed at the end of training. Raises TrainingError."""
    config = ModelFolder(run / "model").config
    reading = LOCAL.over(config["metasaug"].get("reading") or {})
    write_text(run / "report.html", page(config, results, read_log(run / "log.jsonl"), sections_of(run, reading)))
    return "\n".join(["", *summary(config, results), f"{run / 'report.html'}: the results in detail"])


def write_text(path: Path, text: str) -> None:
    """Write the whole file or nothing. File names that are not UTF-8 keep their odd bytes as \\udcXX."""
    try:
        write_atomically(path, text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror or error}.") from error


def read_log(path: Path) -> list[dict]:
    """The lines of a log; a torn last one is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def page(config: Mapping[str, Any], results: Results, log: Sequence[Mapping[str, Any]] = (),
         of_pictures: Sequence[str] = ()) -> str:
    """HTML5 that is XML as well.

    of_pictures   sections that show pictures (training.report.pictures)
    """
    ours = config["metasaug"]
    classes = Classes(config, results)
    title = f"{ours['name']}: test results"
    sections = [
        _top(config, results), _tiles(classes), _words(classes), _by_size(classes), _confusion(classes), *of_pictures,
        _calibration(classes, ours.get("calibration")), _shifts(classes), _curves(log), _every_class(classes),
        _footer(ours),
    ]
    colours = (f":root {{ {variables(LIGHT)} }}\n"
               f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}\n")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>{escaped(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:"/>
<link rel="icon" href="data:,"/><style>
{colours}{STYLE.read_text(encoding="utf-8")}</style></head><body><main>
{chr(10).join(filter(None, sections))}
</main></body></html>
"""


def _top(config: Mapping[str, Any], results: Results) -> str:
    ours = config["metasaug"]
    _, height, width = config["pretrained_cfg"]["input_size"]
    counts = ours.get("class_counts")
    trained = (f", {sum(counts):,} training pictures of {len(counts):,} classes ({max(counts):,} to {min(counts):,})"
               if counts else f", {config['num_classes']:,} classes, training counts not known")
    prior = {"uniform": "; with all classes assumed equally frequent",
             "train": "; with classes assumed as frequent as in training"}.get(results.get("prior") or "", "")
    on = "its test set" if results.get("split", "test") == "test" else results["split"]
    return (f'<header><h1>{escaped(ours["name"])}</h1><p class="facts">{escaped(config["architecture"])} at {width} × '
            f'{height} pixels, trained on {escaped(ours["dataset"])}{trained}. {escaped(ours.get("schedule") or "")}'
            f'<br/>Measured on {escaped(on)}: {results["images"]:,} pictures{prior}.'
            "</p></header>")


def _tile(title: str, kind: str, share: float | None, interval: Sequence[float], words: str, of: int) -> str:
    if share is None:
        return f'<div class="tile {kind}">{title}<b>–</b><span>{words}</span></div>'
    low, high = interval
    return (f'<div class="tile {kind}">{title}<b>{percent(share, of)}</b><span class="track"><i style="left:{low:.2%};'
            f'width:{high - low:.2%}"></i><i style="left:{share:.2%}"></i></span><span>{span(interval, of)}</span>'
            f"<span>{words}</span></div>")


def _tiles(classes: Classes) -> str:
    results, images = classes.results, classes.results["images"]
    tiles = [_tile("All test pictures", "accent", 1 - results["error"],
                   wilson_interval(int(classes.correct.sum()), images), f"{images:,} test pictures", images)]
    for group in classes.present:
        figures = results["groups"][group]
        words = (f"{figures['correct']:,} of {figures['images']:,} correct, {figures['classes']:,} "
                 f"class{'es' if figures['classes'] > 1 else ''}") if figures["images"] else "no test pictures"
        tiles.append(_tile(badge(group), group, figures["accuracy"], figures["interval"], words, figures["images"]))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _words(classes: Classes) -> str:
    more = []
    if classes.results.get("top5_error") is not None:
        more.append(f"correct class among the first five answers: {1 - classes.results['top5_error']:.1%}")
    more.append(f"worst class: {1 - classes.results['worst_class_error']:.1%} correct")
    if "geometric_mean_corrected" in classes.results:
        more.append(f"geometric mean over classes: {classes.results['geometric_mean_corrected']:.1%}"
                    + (f" (a class without a correct answer counts as {ZERO_RECALL:.1%})"
                       if classes.results["classes_never_right"] else ""))
    return (f"<section><h2>Results</h2><ul>{_items(findings(classes))}</ul>"
            f'<p class="note">{escaped("; ".join(more))}.</p>'
            f"<h2>What to do about weak classes</h2><ul>{_items(advice(classes))}</ul></section>")


def _items(sentences: Iterable[str]) -> str:
    """List items; `code` between backquotes."""
    texts = []
    for sentence in sentences:
        parts = breakable(sentence).split("`")
        even = len(parts) % 2  # otherwise a class name has a backquote
        texts.append("".join(f"<code>{part}</code>" if i % 2 and even else part for i, part in enumerate(parts)))
    return "".join(f"<li>{text}</li>" for text in texts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", names: int = 1) -> str:
    """Cells are HTML; the first `names` columns are words, the others numbers."""
    kinds = [' class="name"' if i < names else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{cell}</th>' for kind, cell in zip(kinds, head, strict=True))
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], rest, strict=True)) + "</tr>"
        for first, *rest in rows)
    caption = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _small(number: str, below: str) -> str:
    return f"{number}<br/><small>{below}</small>"


def _figure(title: str, drawing: str, caption: str, key: str = "") -> str:
    return f"<figure><h3>{title}</h3>{key}{drawing}<figcaption>{caption}</figcaption></figure>"


def _key(entries: Iterable[tuple[str, str]]) -> str:
    spans = "".join(f'<span><i class="{kind}"></i>{name}</span>' for kind, name in entries)
    return f'<div class="key">{spans}</div>'


def _by_size(classes: Classes) -> str:
    """Class-count curve with accuracy below it, and accuracy against class size."""
    if classes.counts is None:
        return ""
    counts = np.maximum(classes.counts, 0.7)  # gives classes without training pictures a place on a log axis
    key = _key((group, group) for group in classes.present)
    return ('<section><h2>Common and rare classes</h2><div class="figures">'
            + _figure("Training pictures and accuracy of each class", _count_curve(classes, counts),
                      "Classes, largest first. Top: training pictures, logarithmic. Bottom: accuracy.", key)
            + _figure("Accuracy against class size", _against_size(classes, counts),
                      "One dot for each class" + (", with 95% intervals." if len(classes.names) < SINGLE else ". The "
                      "line joins the means of classes of similar size, with 95% intervals."), key)
            + "</div></section>")


def _count_curve(classes: Classes, counts: np.ndarray) -> str:
    C = len(classes.names)
    top = 10.0 ** max(1, np.ceil(np.log10(counts.max())))
    above = Plot((0, C), (0.7, top), log_y=True, bottom=150)
    above.axes({}, count_ticks(1, top), "")
    below = Plot((0, C), (0, 1), top=142)
    whole = {tick: label for tick, label in even_ticks(C).items() if tick == int(tick)}
    below.axes(whole, {0.0: "0%", 0.5: "50%", 1.0: "100%"}, "classes, by training pictures")
    for group in classes.present:
        for first, last in _runs([classes.groups[c] == group for c in classes.order]):
            steps = [(place + side, counts[classes.order[place]]) for place in range(first, last) for side in (0, 1)]
            above.area([(first, 0.7), (last, 0.7)], steps, f"{group} solid")
        places = [i for i, c in enumerate(classes.order) if classes.groups[c] == group and classes.images[c]]
        below.dots([(i + 0.5, classes.recall[classes.order[i]]) for i in places], group,
                   [_tip(classes, classes.order[i]) for i in places] if C <= 300 else (), 3.5 if C <= 300 else 2)
    above.parts += below.parts
    return above.svg("Training pictures and accuracy of each class")


def _runs(holds: Sequence[bool]) -> list[tuple[int, int]]:
    """[first, last) of each stretch of true values."""
    edges = np.flatnonzero(np.diff([0, *map(int, holds), 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _tip(classes: Classes, c: int) -> str:
    return f"{classes.names[c]}: {classes.correct[c]:,} of {classes.images[c]:,} correct, {classes.size(c)}"


def _against_size(classes: Classes, counts: np.ndarray) -> str:
    C = len(classes.names)
    low, high = max(0.7, counts.min() / 1.3), counts.max() * 1.3
    plot = Plot((low, high), (0, 1), log_x=True)
    plot.axes(count_ticks(low, high), PERCENT_TICKS, "training pictures of the class")
    tested = [c for c in classes.order if classes.images[c]]
    for group in classes.present:
        members = [c for c in tested if classes.groups[c] == group]
        plot.dots([(counts[c], classes.recall[c]) for c in members], group,
                  [_tip(classes, c) for c in members] if C <= 300 else (), 4 if C <= 300 else 2)
    if C < SINGLE:
        for c in tested:
            plot.interval(counts[c], *wilson_interval(classes.correct[c], classes.images[c]), classes.groups[c])
    elif len(tested) >= SINGLE:
        means = []
        for part in np.array_split(tested, min(10, len(tested) // 8)):
            x = float(np.exp(np.log(counts[part]).mean()))
            mean, (below, above) = weighted_accuracy(np.ones(len(part)), classes.correct[part], classes.images[part])
            plot.interval(x, below, above, "accent")
            means.append((x, mean))
        plot.line(means, "accent")
    return plot.svg("Accuracy of each class against its number of training pictures")


def _confusion(classes: Classes) -> str:
    confusion = classes.results.get("confusion")
    if not confusion:
        return ""
    sizes, images = confusion["by_size"]["classes"], np.array(confusion["by_size"]["images"])
    whole = len(sizes) == len(classes.names)
    parts = (f"Classes in {len(sizes)} equal parts, ordered by "
             + ("class number" if classes.counts is None else "training pictures (left)")
             + ". An answer in the same part may still be wrong. ")
    heat = _figure("Confusion by class size", _heat(classes, sizes, images),
                   f"{'' if whole else parts}Rows: true class. Columns: answer. In percent of the row.")
    pairs = [p for p in confusion["pairs"] if p["images"] > 1] or confusion["pairs"]
    groups = _group_table(classes, confusion["groups"]) if "unknown" not in classes.present else ""
    return (f'<section><h2>Confused classes</h2><div class="figures">{heat}<figure>{groups}'
            f"{_pair_table(classes, pairs[:10])}</figure></div></section>")


def _heat(classes: Classes, sizes: Sequence[int], images: np.ndarray) -> str:
    side = len(sizes)
    plot = Plot((0, side), (0, side), height=34 + 34 * side, left=136, top=26, right=4, bottom=8)
    ends = np.cumsum([0, *sizes])
    for row in range(side):
        part = classes.order[ends[row] : ends[row + 1]]
        name = classes.names[part[0]]
        if len(part) > 1:
            ends_of = (ends[row] + 1, ends[row + 1]) if classes.counts is None else classes.counts[part[[0, -1]]]
            name = f"{ends_of[0]:,} – {ends_of[1]:,}"
        left, top = plot.at(row, side - row)
        right, bottom = plot.at(row + 1, side - row - 1)
        plot.text(plot.left - 30, (top + bottom) / 2 + 4, shortened(name, 14), "end")
        plot.text(plot.left - 6, (top + bottom) / 2 + 4, str(row + 1), "end")
        plot.text((left + right) / 2, plot.top - 8, str(row + 1), "middle")
        total = images[row].sum()
        for column in range(side):
            share = images[row, column] / total if total else 0
            x, y = plot.at(column, side - row)
            plot.parts.append(f'<rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{right - left - 1:.1f}" height="'
                              f'{bottom - top - 1:.1f}" rx="2" fill-opacity="{0.06 + 0.64 * share:.3f}"/>')
            if share >= 0.005:
                plot.text(x + (right - left) / 2, y + (bottom - top) / 2 + 3.5, f"{share * 100:.0f}", "middle", "cell")
    return plot.svg("Confusion: shares of answers for each true class, by class size")


def _group_table(classes: Classes, by_group: Mapping[str, Mapping[str, int]]) -> str:
    answers = [group for group in classes.present if group in by_group]
    rows = []
    for true in answers:
        total = sum(by_group[true].values())
        right = classes.results["groups"][true]["correct"]
        counts = [right, *(by_group[true][g] - (right if g == true else 0) for g in answers)]
        rows.append([badge(true), *(_small(percent(n / total, total) if total else "–", f"{n:,}") for n in counts)])
    return _table(["true class", "correct", *(f"wrong: {group}" for group in answers)], rows, "Between groups")


def _pair_table(classes: Classes, pairs: Sequence[Mapping[str, int]]) -> str:
    if not pairs:
        return "<p>Every test picture is correct.</p>"
    rows = [[_name(classes, p["true"]), _name(classes, p["predicted"]),
             f"{p['images']:,} of {classes.images[p['true']]:,}"] for p in pairs]
    return _table(["true class", "answer", "pictures"], rows, "Most confused pairs", names=2)


def _name(classes: Classes, c: int) -> str:
    return f"<bdi>{breakable(classes.names[c])}</bdi>"


def _calibration(classes: Classes, fitted: Mapping[str, Any] | None) -> str:
    """fitted   the calibration that the model folder holds"""
    calibration = classes.results.get("calibration")
    if not calibration:
        return ""
    images = np.array(calibration["images"])
    plot = Plot((0, 1), (0, 1), height=330)
    plot.axes(PERCENT_TICKS, PERCENT_TICKS, "confidence of the model")
    plot.line([(0, 0), (1, 1)], "plain dashed")
    bins = [(calibration["confidence"][b], calibration["accuracy"][b], int(images[b])) for b in np.flatnonzero(images)]
    for sure, right, n in bins:
        plot.interval(sure, *wilson_interval(right * n, n), "accent")
        plot.dots([(sure, right)], "accent", [f"{n:,} pictures: confidence {sure:.0%}, correct {right:.0%}"],
                  3 + 6 * float(np.sqrt(n / images.max())))
    rows = [[badge(group), *(f"{figures[key]:.1%}" for key in ("confidence", "accuracy", "ece"))]
            for group, figures in classes.results["groups"].items() if figures.get("ece") is not None]
    rows.append(["all", f"{_says(calibration):.1%}", f"{classes.accuracy:.1%}", f"{classes.results['ece']:.1%}"])
    figure = _figure("Confidence and accuracy", plot.svg("Accuracy against confidence"),
                     "Pictures grouped by confidence, with 95% intervals; larger dots are more pictures. On the dashed "
                     "line confidence equals accuracy; below it the model is overconfident.")
    words = escaped(_trust(classes, calibration) + _after(fitted))
    return f"""<section><h2>Is its confidence reliable?</h2><p>{words}</p>
<div class="figures">{figure}<figure>
{_table(["true class", "mean confidence", "accuracy", "calibration error"], rows)}
<figcaption>Expected calibration error: mean difference of confidence and accuracy over {BINS} equal bins of
confidence.</figcaption></figure></div></section>"""


def _says(calibration: Mapping[str, Any]) -> float:
    """Mean confidence."""
    pairs = [(n, sure) for n, sure in zip(calibration["images"], calibration["confidence"], strict=True) if n]
    return sum(n * sure for n, sure in pairs) / sum(n for n, _ in pairs)


def _trust(classes: Classes, calibration: Mapping[str, Any]) -> str:
    says, off = _says(calibration), _says(calibration) - classes.accuracy
    if abs(off) < 0.02:
        return f"Its mean confidence, {says:.0%}, matches its accuracy."
    return (f"Its mean confidence is {says:.0%} and its accuracy {classes.accuracy:.0%}: it is "
            + ("overconfident." if off > 0 else "underconfident."))


def _after(fitted: Mapping[str, Any] | None) -> str:
    if not fitted or "measured" not in fitted:
        return ""
    error, sets = fitted["measured"]["ece"], fitted["measured"]["coverage"]
    return (f" These are its raw answers. The zoo and the demo divide its logits by a temperature of "
            f"{fitted['temperature']:.2f}, fitted on {fitted['images']:,} held-out pictures: calibration error "
            f"{error['before']['all']:.1%} before, {error['after']['all']:.1%} after. Prediction sets of "
            f"{sets['asked']:.0%} hold the true class of {sets['all']['coverage']:.0%} of the test pictures, with "
            f"{sets['all']['size']:.1f} classes on average.")


def _shifts(classes: Classes) -> str:
    rows = classes.results.get("shifted_priors") or ()
    if len(rows) < 2:
        return ""
    at = {row["prior"]: float(i) for i, row in enumerate(rows)}
    plot = Plot((-0.3, len(rows) - 0.7), (0, 1))
    plot.axes({i: name.partition("-")[2] or "1" for name, i in at.items()}, PERCENT_TICKS,
              "as in training   ←   largest : smallest class   →   inverted")
    plot.area([(at[r["prior"]], r["interval"][0]) for r in rows], [(at[r["prior"]], r["interval"][1]) for r in rows],
              "accent")
    plot.line([(at[r["prior"]], r["accuracy"]) for r in rows], "accent")
    given = [r for r in rows if r["adjusted_accuracy"] is not None]
    plot.line([(at[r["prior"]], r["adjusted_accuracy"]) for r in given], "medium")
    key = _key([("accent", "as trained, with 95% interval"),
                *([("medium", "with these frequencies given to the model")] if given else [])])
    figure = _figure("Accuracy under other class frequencies", plot.svg("Accuracy against class frequencies"),
                     "Left: classes are as frequent as in training. Right: rare classes are the most frequent.", key)
    table = _table(["frequencies", "accuracy", "95% interval", "frequencies given"], (
        [f'<span class="whole">{row["prior"]}</span>', f"{row['accuracy']:.1%}",
         f"<small>{span(row['interval'])}</small>",
         "–" if row["adjusted_accuracy"] is None else f"{row['adjusted_accuracy']:.1%}"] for row in rows))
    return f"""<section><h2>If class frequencies differ from the test set's</h2>
<p>The same test pictures, weighted as if classes were as unequal as in training, equally frequent, or inverted.</p>
<div class="figures">{figure}<figure>{table}</figure></div></section>"""


def _curves(log: Sequence[Mapping[str, Any]]) -> str:
    """Loss and errors over the epochs."""
    if len(log) < 2:
        return ""
    ends = (float(log[0]["epoch"]), float(log[-1]["epoch"]))
    ticks = even_ticks(ends[1], ends[0])

    def series(*keys: str) -> list[tuple[float, float]]:
        points = []
        for line in log:
            value: Any = line
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                points.append((float(line["epoch"]), float(value)))
        return points

    losses = {"accent": ("training loss", series("loss")), "tail": ("loss on the meta set", series("meta_loss"))}
    losses = {kind: entry for kind, entry in losses.items() if entry[1]}
    errors = {"plain": ("training error", series("train_error")), "accent": ("test error", series("test", "error"))}
    top = max((value for _, points in losses.values() for _, value in points), default=1.0)
    loss = Plot(ends, (0, top * 1.05))
    loss.axes(ticks, even_ticks(top * 1.05), "epoch")
    for kind, (_, points) in losses.items():
        loss.line(points, kind)
    error = Plot(ends, (0, 1))
    error.axes(ticks, PERCENT_TICKS, "epoch")
    for kind, (_, points) in errors.items():
        error.line(points, kind)
    for group in ("head", "medium", "tail"):
        points = [(x, 1 - y) for x, y in series("test", "groups", group, "accuracy")]
        if points:
            errors[group] = (f"test error, {group}", points)
            error.line(points, f"{group} dashed")
    second = next((line["epoch"] for line in log if line.get("stage") == 2), None)
    if second is not None and second > ends[0]:
        for plot in (loss, error):
            x, _ = plot.at(second - 0.5, 0)
            plot.parts.append(f'<path class="base" stroke-dasharray="2 3" d="M{x:.1f} {plot.top}V{plot.bottom}"/>')
            plot.text(x - 4, plot.top + 10, "stage 2", "end")
    dashed = [(kind if kind in ("plain", "accent") else f"{kind} dashed", name) for kind, (name, _) in errors.items()]
    return ('<section><h2>Training</h2><div class="figures">'
            + _figure("Loss", loss.svg("Loss by epoch"), "Mean over each epoch's pictures.",
                      _key((kind, name) for kind, (name, _) in losses.items()))
            + _figure("Errors", error.svg("Errors by epoch"), "Training error is on augmented pictures, during the "
                      "epoch. Test errors are measured every few epochs; they do not select the model.", _key(dashed))
            + "</div></section>")


def _every_class(classes: Classes) -> str:
    kept = classes.results["per_class"]
    answered = all("answered" in row for row in kept)
    head = ["class", "training pictures", "correct test pictures", "accuracy, 95% interval"]
    rows = []
    for c in classes.order:
        n, k = int(classes.images[c]), int(classes.correct[c])
        row = [f"{_name(classes, c)}<br/>{badge(classes.groups[c])}",
               "?" if classes.counts is None else f"{classes.counts[c]:,}", f"{k:,} of {n:,}",
               _small(percent(k / n, n), span(wilson_interval(k, n), n)) if n else "–"]
        if answered:
            said = kept[c]["answered"]
            row.append(_small(percent(k / said, said), f"of {said:,}") if said else "never answered")
        rows.append(row)
    table = _table([*head, "correct answers of this class"] if answered else head, rows)
    if len(rows) > OPEN_UP_TO:
        table = f"<details><summary>All {len(rows):,} classes</summary>{table}</details>"
    order = "in the model's order" if classes.counts is None else "largest first"
    return f"<section><h2>Every class, {order}</h2>{table}</section>"


def _footer(ours: Mapping[str, Any]) -> str:
    command = f" Trained by <code>{escaped(ours['command'])}</code>." if ours.get("command") else ""
    return (f"<footer><p>metasaug {version('metasaug')}. Intervals are 95% Wilson intervals. They reflect the number "
            "of test pictures, not the differences between training runs. docs/metrics.md has the formula of every "
            f"figure.{command}</p></footer>")
