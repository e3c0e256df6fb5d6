"""Test results as sentences: how well each group is recognised, which classes are weak, what to do.

Shape suffix: C classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from training.report.metrics import by_size, wilson_interval
from zoo.labels import HEAD_ABOVE, meaning_of

FEW = 10  # test pictures; with fewer, the accuracy of a single class says little
NAMED = 6  # most classes that one sentence names
PLAIN_LOSSES = ("ce", "focal")

Results = Mapping[str, Any]


class Classes:
    """The results of each class as arrays (C,), for sentences and charts. config is the model's."""

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
        """Classes whose whole 95 % interval lies below the average, the clearest case first."""
        tested = [c for c in self.order if self.images[c] and self.upper[c] < self.accuracy]
        return sorted(tested, key=lambda c: self.upper[c])

    def mistaken_for(self, c: int) -> int | None:
        """The wrong answer given most often for class c, if that pair is among the kept ones."""
        pairs = self.results.get("confusion", {}).get("pairs", ())
        return max(((p["images"], p["predicted"]) for p in pairs if p["true"] == c), default=(0, None))[1]


def percent(share: float, of: int = 1000) -> str:
    """With a decimal only if there are enough pictures."""
    return f"{share:.1%}" if of >= 200 else f"{share:.0%}"


def span(interval: Sequence[float], of: int = 1000) -> str:
    return f"{percent(interval[0], of)} to {percent(interval[1], of)}"


def series(names: Iterable[str], limit: int = NAMED) -> str:
    """"a, b and c", or "a, b and 7 more"."""
    names = list(names)
    if len(names) > limit:
        names = [*names[: limit - 1], f"{len(names) - limit + 1:,} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def summary(config: Mapping[str, Any], results: Results) -> list[str]:
    """Three sentences for a terminal: overall, by group, weak classes."""
    classes = Classes(config, results)
    return [_overall(classes), _group_sentence(classes), _weak_sentence(classes)]


def findings(classes: Classes) -> list[str]:
    """The summary, and its limits."""
    said = [_overall(classes), _group_sentence(classes), _weak_sentence(classes)]
    tested = classes.images > 0
    never = int((classes.correct[tested] == 0).sum())
    if never:
        said.append(f"Without one correct answer: {never:,} of {tested.sum():,} classes, " + series(
            classes.names[c] for c in classes.order if classes.images[c] and not classes.correct[c]) + ".")
    thin = int((classes.images[tested] < FEW).sum())
    if thin:
        said.append(f"{thin:,} classes have fewer than {FEW} test pictures. Rely on the figures of their group instead "
                    "of their own.")
    if not tested.all():
        said.append(f"{(~tested).sum():,} classes have no test pictures. No average includes them.")
    return said


def _overall(classes: Classes) -> str:
    images = int(classes.images.sum())
    interval = wilson_interval(int(classes.correct.sum()), images)
    return (f"{percent(classes.accuracy, images)} of {images:,} test pictures are correct (95% interval: "
            f"{span(interval, images)}). The mean over classes is {1 - classes.results['macro_error']:.1%}.")


def _group_sentence(classes: Classes) -> str:
    parts = []
    for group in classes.present:
        figures = classes.results["groups"][group]
        if group == "unknown":
            return "The training counts are not known, so common and rare classes cannot be compared."
        n = figures["images"]
        parts.append(f"{group} classes ({meaning_of(group, classes.ours.get('groups_by', 'count'))}): " + (
            f"{percent(figures['accuracy'], n)} correct ({figures['correct']:,} of {n:,}; "
            f"{span(figures['interval'], n)})"
            if n else "no test pictures"))
    return "; ".join(parts) + "."


def _weak_sentence(classes: Classes) -> str:
    weak = classes.weak()
    if not weak:
        tested, right = classes.images > 0, classes.correct > 0
        never = int((tested & ~right).sum())
        return ("No class is clearly below the average; more test pictures might show one."
                + (f" {never:,} have no correct answer." if never else ""))

    def described(c: int) -> str:
        other = classes.mistaken_for(c)
        taken = "" if other is None else f", often mistaken for {classes.names[other]}"
        k, n = classes.correct[c], classes.images[c]
        return f"{classes.names[c]} ({f'{k} of {n}' if n < FEW else percent(k / n, n)} correct{taken})"

    return f"Clearly below the average: {series((described(c) for c in weak), 4)}."


def advice(classes: Classes) -> list[str]:
    """What to do about weak classes. Each sentence follows from a figure of this test."""
    names, results, weak = classes.names, classes.results, classes.weak()
    said = []
    few = [] if classes.counts is None else [c for c in weak if classes.counts[c] <= HEAD_ABOVE]
    if few:
        said.append("Collect more training pictures first for " + series(
            f"{names[c]} ({classes.counts[c]:,} so far)" for c in few) + ".")  # type: ignore[index]
    many = [c for c in weak if c not in few]
    if many and classes.counts is not None:
        _, height, width = classes.config["pretrained_cfg"]["input_size"]
        said.append(f"{series(names[c] for c in many)}: weak despite over {HEAD_ABOVE} training pictures, so more may "
                    "not help. Check what they are mistaken for: labels may be wrong, or the classes may be hard to "
                    f"tell apart at {width} × {height} pixels.")
    pairs = [p for p in results.get("confusion", {}).get("pairs", ())
             if wilson_interval(p["images"], classes.images[p["true"]])[0] > 0.1]
    if pairs:
        said.append("Where it matters, let a person check the classes that are often confused: " + series((
            f"{names[p['true']]} mistaken for {names[p['predicted']]} ({p['images']:,} of "
            f"{classes.images[p['true']]:,})"
            for p in pairs), 4) + ".")
    for group in reversed(classes.present):
        figures = results["groups"][group]
        low, high = figures["interval"]
        if figures["images"] and high - low > 0.15:
            said.append(f"The accuracy of {group} classes rests on {figures['images']:,} test pictures: it may be as "
                        f"low as {low:.0%} or as high as {high:.0%}. Test on more pictures before you rely on it.")
    measured = (classes.ours.get("calibration") or {}).get("measured")
    off = measured["ece"]["after"]["all"] if measured else results.get("ece", 0)
    if off > 0.05:
        said.append(f"Do not read the model's percentages as probabilities: they are off by {off * 100:.0f} points on "
                    "average (see the section on confidence).")
    gains = [(row["adjusted_accuracy"] - row["accuracy"], row) for row in results.get("shifted_priors") or ()
             if row["adjusted_accuracy"] is not None]
    gain, row = max(gains, key=lambda pair: pair[0], default=(0.0, None))
    if row is not None and gain > 0.02:
        said.append("If you know how frequent the classes are where you use the model, give these frequencies to "
                    f"`predict` as `prior=`. If they are {_shift_in_words(row['prior'])} accuracy gains "
                    f"{gain * 100:.0f} points.")
    if _is_plain(classes.ours) and _gap(results) > 0.15:
        said.append("This training did nothing for rare classes. Train with `--augment metasaug` or "
                    "`--loss balanced-softmax` and compare.")
    return said or ["Nothing clear to improve: no class is clearly weak, and the test set is large enough to show it."]


def _is_plain(ours: Mapping[str, Any]) -> bool:
    recipe = ours.get("recipe") or {}
    return (ours.get("loss") in PLAIN_LOSSES and ours.get("augment") == "none"
            and recipe.get("class_weights", "auto") != "balanced")


def _gap(results: Results) -> float:
    """Accuracy of the head minus that of the tail; 0 where one is missing."""
    head, tail = (results["groups"].get(group, {}).get("accuracy") for group in ("head", "tail"))
    return 0.0 if head is None or tail is None else head - tail


def _shift_in_words(name: str) -> str:
    kind, _, ratio = name.partition("-")
    return {"forward": f"long-tailed as in training, {ratio} to 1,", "balanced": "equally frequent,",
            "backward": f"inverted, {ratio} to 1,"}[kind]
