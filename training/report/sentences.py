"""Test results as sentences: what a model gets right, and what to do about the weak ones. C classes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from training.report.metrics import by_size, wilson_interval
from zoo.labels import HEAD_ABOVE, TAIL_BELOW

FEW = 10  # test pictures, below which a class's own figure says little
NAMED = 6  # classes that a sentence names at most
PLAIN_LOSSES = ("ce", "focal")

Results = Mapping[str, Any]


class Classes:
    """The results with their classes as arrays (C,): what sentences and figures draw from. config is the model's."""

    def __init__(self, config: Mapping[str, Any], results: Results):
        rows = results["per_class"]
        self.config, self.results = config, results
        self.ours: Mapping[str, Any] = config["metasaug"]
        self.names: list[str] = [row["label"] for row in rows]
        self.groups: list[str] = self.ours["groups"]
        self.images = np.array([row["test_images"] for row in rows])
        self.correct = np.array([row["correct"] for row in rows])
        counts = [row["train_images"] for row in rows]
        self.counts = None if None in counts else np.array(counts)
        self.order = by_size(None if self.counts is None else counts, len(rows))
        self.present = [g for g, figures in results["groups"].items() if figures["classes"]]
        self.accuracy = self.correct.sum() / self.images.sum()
        with np.errstate(invalid="ignore"):
            self.recall = self.correct / self.images  # NaN where there are no test pictures
        self.upper = np.array([wilson_interval(k, n)[1] for k, n in zip(self.correct, self.images, strict=True)])

    def size(self, c: int) -> str:
        return "" if self.counts is None else f"{self.counts[c]:,} training pictures"

    def weak(self) -> list[int]:
        """Classes that are below the average even at the upper end of their interval, the surest first."""
        tested = [c for c in self.order if self.images[c] and self.upper[c] < self.accuracy]
        return sorted(tested, key=lambda c: self.upper[c])

    def mistaken_for(self, c: int) -> int | None:
        """Whom a class is most often taken for, where that pair is among those kept."""
        pairs = self.results.get("confusion", {}).get("pairs", ())
        return max(((p["images"], p["predicted"]) for p in pairs if p["true"] == c), default=(0, None))[1]


def percent(share: float, of: int = 1000) -> str:
    """With as many digits as so many pictures carry."""
    return f"{share:.1%}" if of >= 200 else f"{share:.0%}"


def span(interval: Sequence[float], of: int = 1000) -> str:
    return f"{percent(interval[0], of)} to {percent(interval[1], of)}"


def listed(names: Iterable[str], limit: int = NAMED) -> str:
    """"a, b and c", or "a, b and 7 more"."""
    names = list(names)
    if len(names) > limit:
        names = [*names[: limit - 1], f"{len(names) - limit + 1:,} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plain_words(config: Mapping[str, Any], results: Results) -> list[str]:
    """Three sentences for a terminal: overall, by group, and the weak ones."""
    classes = Classes(config, results)
    return [_overall(classes), _group_sentence(classes), _weak_sentence(classes)]


def what_it_gets_right(classes: Classes) -> list[str]:
    """The same three, and what to keep in mind when reading them."""
    right = [_overall(classes), _group_sentence(classes), _weak_sentence(classes)]
    tested = classes.images > 0
    never = int((classes.correct[tested] == 0).sum())
    if never:
        right.append(f"{never:,} of {tested.sum():,} classes {'is' if never == 1 else 'are'} never right: " + listed(
            classes.names[c] for c in classes.order if classes.images[c] and not classes.correct[c]) + ".")
    thin = int((classes.images[tested] < FEW).sum())
    if thin:
        right.append(f"Classes with fewer than {FEW} test pictures: {thin:,}. Read their groups, not their own "
                     "figures.")
    if not tested.all():
        right.append(f"Classes without a test picture, which count in no average: {(~tested).sum():,}.")
    return right


def _overall(classes: Classes) -> str:
    images = int(classes.images.sum())
    interval = wilson_interval(int(classes.correct.sum()), images)
    return (f"It names {percent(classes.accuracy, images)} of {images:,} test pictures right (95% interval: "
            f"{span(interval, images)}); the mean over classes is {1 - classes.results['macro_error']:.1%}.")


def _group_sentence(classes: Classes) -> str:
    parts = []
    for group in classes.present:
        figures = classes.results["groups"][group]
        if group == "unknown":
            return ("How many pictures each class had in training is not known, so nothing can be said of common and "
                    "rare ones.")
        n = figures["images"]
        parts.append(f"{_group_in_words(classes, group)}: " + (
            f"{percent(figures['accuracy'], n)} right ({figures['correct']:,} of {n:,}; {span(figures['interval'], n)})"
            if n else "no test pictures"))
    return "; ".join(parts) + "."


def _group_in_words(classes: Classes, group: str) -> str:
    n = classes.results["groups"][group]["classes"]
    if classes.ours.get("groups_by") == "rank":
        meaning = {"head": f"the {n:,} largest in training", "medium": f"the {n:,} between",
                   "tail": f"the {n:,} smallest"}
    else:
        meaning = {"head": f"over {HEAD_ABOVE} training pictures", "medium": f"{TAIL_BELOW} to {HEAD_ABOVE}",
                   "tail": f"under {TAIL_BELOW}"}
    return f"{group} classes ({meaning[group]})"


def _weak_sentence(classes: Classes) -> str:
    weak = classes.weak()
    if not weak:
        tested, right = classes.images > 0, classes.correct > 0
        never = f"; {(tested & ~right).sum():,} are never right" if (tested & ~right).any() else ""
        return (f"No class lies clearly below the average, as far as {classes.images.sum():,} test pictures of "
                f"{tested.sum():,} classes can tell{never}.")

    def described(c: int) -> str:
        other = classes.mistaken_for(c)
        taken = "" if other is None else f", often taken for {classes.names[other]}"
        k, n = classes.correct[c], classes.images[c]
        return f"{classes.names[c]} ({f'{k} of {n}' if n < FEW else percent(k / n, n)} right{taken})"

    return f"Weakest, and clearly below the average: {listed((described(c) for c in weak), 4)}."


def advice(classes: Classes) -> list[str]:
    """What to do about the weak ones: each sentence follows from a figure of this very test."""
    names, results, weak = classes.names, classes.results, classes.weak()
    said = []
    few = [] if classes.counts is None else [c for c in weak if classes.counts[c] <= HEAD_ABOVE]
    if few:
        said.append("More training pictures would help most for " + listed(
            f"{names[c]} ({classes.counts[c]:,} so far)" for c in few) + ".")  # type: ignore[index]
    many = [c for c in weak if c not in few]
    if many and classes.counts is not None:
        _, height, width = classes.config["pretrained_cfg"]["input_size"]
        said.append(f"{listed(names[c] for c in many)}: weak with over {HEAD_ABOVE} training pictures, so more of the "
                    "same may not help. Look at what they are taken for: labels may be mixed up, or the classes be "
                    f"hard to tell apart at {width} × {height} pixels.")
    pairs = [p for p in results.get("confusion", {}).get("pairs", ())
             if wilson_interval(p["images"], classes.images[p["true"]])[0] > 0.1]
    if pairs:
        said.append("Where it matters, have a person look again at what is often mixed up: " + listed((
            f"{names[p['true']]} taken for {names[p['predicted']]} ({p['images']:,} of {classes.images[p['true']]:,})"
            for p in pairs), 4) + ".")
    for group in reversed(classes.present):
        figures = results["groups"][group]
        low, high = figures["interval"]
        if figures["images"] and high - low > 0.15:
            said.append(f"The figure for {group} classes rests on {figures['images']:,} test pictures: the true share "
                        f"may be as low as {low:.0%} or as high as {high:.0%}. Before relying on it, test on more.")
    if results.get("ece", 0) > 0.05:
        said.append(f"Do not read its percentages as odds: they are {results['ece'] * 100:.0f} points off on average, "
                    "see the section on confidence.")
    gains = [(row["adjusted_accuracy"] - row["accuracy"], row) for row in results.get("shifted_priors") or ()
             if row["adjusted_accuracy"] is not None]
    gain, row = max(gains, key=lambda pair: pair[0], default=(0.0, None))
    if row is not None and gain > 0.02:
        said.append("If you know how frequent the classes are where you work, tell the model (`prior=` of predict): "
                    f"where they are {_shift_in_words(row['prior'])} that is worth {gain * 100:.0f} points.")
    if _is_plain(classes.ours) and _gap(results) > 0.15:
        said.append("It was trained as if rare classes did not matter. Train again with `--augment metasaug` or "
                    "`--loss balanced-softmax` and compare.")
    return said or ["Nothing stands out: no class is clearly weak, and the test is large enough to say so."]


def _is_plain(ours: Mapping[str, Any]) -> bool:
    recipe = ours.get("recipe") or {}
    return (ours.get("loss") in PLAIN_LOSSES and ours.get("augment") == "none"
            and recipe.get("class_weights", "auto") != "balanced")


def _gap(results: Results) -> float:
    """Head's accuracy above tail's; 0 where one of them is not there."""
    head, tail = (results["groups"].get(group, {}).get("accuracy") for group in ("head", "tail"))
    return 0.0 if head is None or tail is None else head - tail


def _shift_in_words(name: str) -> str:
    kind, _, ratio = name.partition("-")
    return {"forward": f"long-tailed as in training, {ratio} to 1,", "balanced": "equally frequent",
            "backward": f"the other way round, {ratio} to 1,"}[kind]
