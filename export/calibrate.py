"""`metasaug calibrate`: calibrate a model's probabilities, on pictures that it was not trained on.

Shape suffixes: N pictures, C classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from export.errors import ExportError
from training.data.cifar import CIFAR, find_pool, places_of
from training.data.datasets import PictureFiles, Split
from training.data.own_pictures import load_folder
from training.report.calibrated import COVERAGE, measured
from training.report.evaluate import labelled_pictures
from zoo.calibration import UNFAMILIAR, Calibration, fit_calibration, log_sum_exp
from zoo.labels import GROUPS
from zoo.listing import pictures_under
from zoo.model_folder import CARD, ModelFolder
from zoo.predictor import Classes, Predictor


def calibrate(
    folder: tyro.conf.Positional[Path], data: Path, every: bool = False, test: Path | None = None,
    strange: Path | None = None, per_class: int = 200,
) -> None:
    """Calibrate a model: probabilities, prediction sets, and familiarity, which is low for unusual pictures.

    Args:
        folder: A model folder, or a run of `metasaug train` with a model in it.
        data: The --data of the training. Pictures that the run held out or left over fit the calibration; its test
            pictures measure it. With --every: labelled pictures that are in neither training nor test.
        every: Use every picture of --data.
        test: With --every: labelled test pictures to measure the result on.
        strange: A folder of pictures of none of the classes, to measure how well familiarity tells them from the test
            pictures.
        per_class: Maximum number of pictures used per class.
    """
    from export.card import write_card
    from export.to_onnx import record

    if not (folder / "manifest.json").exists() and (folder / "model" / "manifest.json").exists():
        folder = folder / "model"
    if test is not None and not every:
        raise ExportError("--test needs --every. Without --every the test pictures of the training are used.")
    model = Predictor(ModelFolder(folder), device="cpu")
    if every:
        cut, tested = (None if path is None else _labelled(path, model, per_class if path == data else None)
                       for path in (data, test))
        words = str(data.name)
    else:
        cut, tested, words = held_out(model, data, per_class)
    assert cut is not None
    logits_NC, labels_N = _logits(model, *cut)
    found = fit_calibration(logits_NC, labels_N, model.classes.prior_C, words)
    if tested is not None:
        logits_NC, labels_N = _logits(model, *tested)
        fitted = Calibration.fitted(found, model.groups)
        found["measured"] = measured(replace(model.classes, calibration=fitted), logits_NC, labels_N)
        if strange is not None:
            pictures = list(pictures_under(strange))
            strange_NC, _ = _logits(model, pictures, np.full(len(pictures), -1))
            found["measured"]["strange"] = {"pictures": strange.resolve().parent.name + "/" + strange.name,
                                            **told_apart(found, model.classes, logits_NC, strange_NC)}
    record(folder, calibration=found)
    if CARD in model.folder:
        write_card(folder)
    print(f"{folder}: temperature {found['temperature']:.3f}, from {found['images']:,} pictures ({words})")
    for line in in_words(found):
        print(line)


def held_out(
    model: Predictor, data: Path, per_class: int
) -> tuple[tuple[Any, np.ndarray], tuple[Any, np.ndarray], str]:
    """Pictures and labels to calibrate on, those to test on, and their source in words.

    The model was neither trained nor tested on the first; the second are its test pictures.
    """
    ours = model.folder.config["metasaug"]
    recipe = ours.get("recipe") or {}
    cut: Split | PictureFiles
    test: Split | PictureFiles
    kind, instead = recipe.get("dataset"), "give labelled pictures that are in neither training nor test with --every"
    if recipe.get("meta_in_training") in ("stage2", "always"):
        raise ExportError(f"{model.name} was also trained on its meta pictures: {instead}.")
    if kind in CIFAR:
        pool = find_pool(kind, data)
        train_at, meta_at = places_of(pool, recipe["imbalance"], recipe["meta_per_class"], recipe["subset_seed"],
                                      recipe.get("subset", "seeded"))
        used = np.zeros(len(pool.labels), bool)
        used[train_at] = used[meta_at] = True
        free = np.array([i for i in np.flatnonzero(~used).tolist() if pool.keys[i] not in pool.banned], np.int64)
        at = np.concatenate([meta_at, _first(free, pool.labels, per_class)])
        counts, source, test = np.bincount(pool.labels[train_at]), pool.source, pool.test
        cut = pool.pick(at)
        words = f"{source}: meta pictures, and training pictures that the long tail leaves out"
    elif kind == "folder":
        loaded = load_folder(data, meta_per_class=recipe["meta_per_class"], test_share=recipe["test_share"],
                             subset_seed=recipe["subset_seed"], skip_bad=bool(recipe.get("skip_bad")))
        cut, test, counts, source = loaded.held_out, loaded.test, np.array(loaded.class_counts), loaded.source
        words = f"{ours['dataset']}: meta pictures"
    else:
        raise ExportError(f"{model.name} was trained on {ours['dataset']}: {instead}.")
    if model.class_counts is None or counts.tolist() != list(model.class_counts):
        raise ExportError(f"{data} ({source}) is not what {model.name} was trained on: its classes have other counts. "
                          "Give the --data of its training.")
    return (_pictures(cut), cut.labels), (_pictures(test), test.labels), words


def told_apart(found: dict[str, Any], classes: Classes, known_NC: np.ndarray, strange_NC: np.ndarray) -> dict[str, Any]:
    """How well familiarity tells strange pictures from known ones.

    `auroc`: share of pairs in which the strange picture has the lower energy. `called` and `falsely_called`: shares of
    the strange and of the known pictures that are called unfamiliar.
    """
    calibration = Calibration.fitted(found, classes.groups)
    known_N, strange_N = (log_sum_exp(classes.fair(each_NC)) for each_NC in (known_NC, strange_NC))
    known_N.sort()
    pairs_N = (np.searchsorted(known_N, strange_N, "left") + np.searchsorted(known_N, strange_N, "right")) / 2
    called, falsely = (float((calibration.familiarity(classes.fair(each_NC)) < UNFAMILIAR).mean())
                       for each_NC in (strange_NC, known_NC))
    return {"images": len(strange_N), "auroc": float(1 - pairs_N.mean() / len(known_N)), "called": called,
            "falsely_called": falsely}


def in_words(found: dict[str, Any]) -> Iterable[str]:
    """The measured figures, as lines of a table."""
    if (figures := found.get("measured")) is None:
        return
    before, after, sets = figures["ece"]["before"], figures["ece"]["after"], figures["coverage"]
    yield f"on {figures['images']:,} test pictures:"
    yield f"  {'group':<8} {'ECE before':>10} {'after':>7} {f'sets of {COVERAGE:.0%}: coverage':>22} {'classes':>8}"
    for group in (*GROUPS, "all"):
        if group in sets:
            yield (f"  {group:<8} {before[group]:>10.1%} {after[group]:>7.1%} {sets[group]['coverage']:>22.1%} "
                   f"{sets[group]['size']:>8.2f}")
    if other := figures.get("strange"):
        yield (f"  called unfamiliar: {other['called']:.1%} of {other['images']:,} pictures of none of the classes, "
               f"{other['falsely_called']:.1%} of the test pictures; AUROC {other['auroc']:.3f}")
    yield "  error on the surest " + ", ".join(f"{share:.0%}: {error:.1%}" for share, error in figures["risk"])


def _labelled(path: Path, model: Predictor, per_class: int | None) -> tuple[Any, np.ndarray]:
    pictures, labels_N = labelled_pictures(path, model, model.name)
    if per_class is not None:
        at = _first(np.arange(len(labels_N)), labels_N, per_class)
        pictures, labels_N = [pictures[i] for i in at], labels_N[at]
    return pictures, labels_N


def _first(places: np.ndarray, labels_N: np.ndarray, per_class: int) -> np.ndarray:
    """Draw up to `per_class` of these places for each class, the same ones each time."""
    places = np.random.default_rng(0).permutation(places)
    return np.concatenate([places[labels_N[places] == c][:per_class] for c in range(labels_N.max() + 1)]).astype(int)


def _pictures(part: Split | PictureFiles) -> Sequence[Any]:
    return list(part.pictures) if isinstance(part, Split) else [part.root / name for name in part.names]


def _logits(model: Predictor, pictures: Sequence[Any], labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of the pictures that can be read."""
    rows = tqdm(model.predict_each(pictures, top_k=1), total=len(pictures), unit="picture", disable=None)
    logits = [row.logits for row in rows]
    good = [i for i, each in enumerate(logits) if each is not None]
    if not good:
        raise ExportError("None of the pictures can be read.")
    return np.stack([logits[i] for i in good]), labels_N[good]
