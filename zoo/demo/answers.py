"""The answers of several models to one picture, side by side and under any prior."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

import zoo
from zoo import images
from zoo.demo import models
from zoo.demo.html import (
    SUCH,
    alert,
    badge,
    closed,
    data_uri,
    escape,
    mass_bar,
    measured,
    name_of,
    percent,
    png,
    times,
    uploaded,
    ways,
)
from zoo.demo.models import HOW_TRAINED, Model

EXAMPLES = Path(zoo.__file__).parent / "examples"
EXAMPLE_NAMES = ("airplane", "automobile", "bird", "cat", "horse", "ship", "truck", "coffee")
COVERAGE, NAMED = 0.9, 6  # of the prediction sets shown; and how many of a set's classes are named
WORLDS = {"own": None, "train": 1.0, "uniform": 0.0, "inverted": -1.0}


@dataclass(frozen=True)
class Answer:
    """A model's answer, and its network's input as (H, W, 3) uint8. Kept for the prior slider."""

    name: str
    prediction: zoo.Prediction
    seen: np.ndarray


# ---- events ----


def compare(
    picture: dict[str, Any] | None, names: list[str] | None, adjust: bool = False, world: float = 0.0
) -> Iterator[tuple[str, list[Answer]]]:
    """The cards, filled one after another, and their answers; or one plain sentence on why there are none."""
    names = chosen(names)
    if picture is None:
        yield cards(names, {}), []
        return
    try:
        path = uploaded(picture)
        decoded, facts = images.read(path, name="This file")
    except zoo.PictureError as error:
        yield alert("This picture could not be read", str(error)) + cards(names, {}), []
        return
    answers: list[Answer] = []
    waits = dict.fromkeys(names, "Loading the model …")
    for name in names:
        opened = models.quietly(models.model, name)
        if opened is None or not opened.loaded:
            yield cards(names, shown(answers, adjust, world), waits), answers
        try:
            model = models.model(name)
            reading, shown_to, its_facts = model.predictor.reading, decoded, facts
            if reading.to_dict():  # trained with other pages, or another white
                shown_to, its_facts = images.read(path, name="This file", reading=reading)
            answer = replace(model.predictor.predict(shown_to), note=its_facts.note(reading))
            answers = [*answers, Answer(name, answer, sees(model, shown_to))]
        except zoo.ZooError as error:
            waits[name] = ": ".join(closed(name, error))
    yield cards(names, shown(answers, adjust, world), waits), answers


def again(answers: list[Answer], names: list[str] | None, adjust: bool, world: float) -> str:
    """The cards for another prior; no network runs."""
    return cards(chosen(names), shown(answers or [], adjust, world))


def predict(picture: dict[str, Any], model: str, prior: str = "own") -> dict[str, Any]:
    """The five likeliest classes of a picture, and the probability of each group.

    Each class has its probability, group (head, medium or tail) and number of training pictures. `prior` is how common
    the classes are where the picture is from: own (as the model assumes), train (as in its training), uniform, or
    inverted (rare classes are common)."""
    offer = models.find(model)
    if offer is None or not offer.ready:
        what = offer.what_to_do if offer else f"Unknown model: one of {', '.join(models.ready_names())}."
        raise gr.Error(what, print_exception=False)
    if not isinstance(prior, str) or prior not in WORLDS:
        raise gr.Error(f"Unknown prior: one of {', '.join(WORLDS)}.", print_exception=False)
    try:
        opened = models.model(model)
        answer = opened.predictor.predict(
            images.decode(uploaded(picture), name="This file", reading=opened.predictor.reading))
        answer = reweighed(opened, answer, WORLDS[prior])
    except zoo.PictureError as error:
        raise gr.Error(str(error), print_exception=False) from None
    except zoo.ZooError as error:
        raise gr.Error(" ".join(closed(model, error)), print_exception=False) from None
    return {
        "model": model,
        "top": [{"label": c.label, "probability": c.probability, "group": c.group, "train_images": c.train_images}
                for c in answer.top],
        "groups": dict(answer.groups),
    }


def choose_example(event: gr.EventData) -> str:
    index = getattr(event, "index", 0)
    name = EXAMPLE_NAMES[index if isinstance(index, int) and 0 <= index < len(EXAMPLE_NAMES) else 0]
    return str(EXAMPLES / f"{name}.jpg")


def chosen(names: Any) -> list[str]:
    """The models on offer that a request names, at most four; the first set if there are none."""
    known = [name for name in (names if isinstance(names, list) else []) if models.find(name)]
    return list(dict.fromkeys(known))[: models.AT_ONCE] or models.first_set()


# ---- arithmetic ----


def reweighed(model: Model, answer: zoo.Prediction, world: float | None) -> zoo.Prediction:
    """The answer if classes are as common as training counts to the power of `world`; None: unchanged."""
    prior = None if world is None else model.prior_of_world(world)
    return answer if prior is None else model.predictor.reweigh(answer, prior=prior)


def shown(answers: Sequence[Answer], adjust: bool, world: Any) -> dict[str, Answer]:
    world = float(np.clip(world, -1, 1)) if adjust and isinstance(world, (int, float)) else None
    return {a.name: Answer(a.name, reweighed(models.model(a.name), a.prediction, world), a.seen) for a in answers}


def sees(model: Model, picture: Image.Image) -> np.ndarray:
    """The network's input as (H, W, 3) uint8: the picture, cropped and reduced."""
    cfg = model.config["pretrained_cfg"]
    array = model.predictor.preprocess(picture).transpose(1, 2, 0) * np.asarray(cfg["std"]) + np.asarray(cfg["mean"])
    return np.rint(array * 255).clip(0, 255).astype(np.uint8)


def heat(model: Model, answer: zoo.Prediction) -> np.ndarray | None:
    """Class activation map of the first answer (Zhou et al. 2016) as (h, w, 4) uint8, opaque where it supports it.

    Exact here: only the mean over positions and the last layer follow the feature map. The logit is therefore the mean
    of this map, before negative values are cut, plus the class's bias.
    """
    if model.weight_CA is None or model.ours.get("cosine_scale") or answer.feature_map is None:
        return None
    if answer.feature_map.ndim != 3 or answer.feature_map.shape[0] != model.weight_CA.shape[1]:
        return None
    cam = np.tensordot(model.weight_CA[answer.top[0].index], answer.feature_map, 1).clip(0)
    alpha = cam / cam.max() * 190 if cam.max() > 0 else cam
    return np.dstack([np.full_like(alpha, v) for v in (255, 196, 0)] + [alpha]).astype(np.uint8)


# ---- HTML ----


def cards(names: Sequence[str], answers: dict[str, Answer], waits: dict[str, str] | None = None) -> str:
    each = "".join(card(name, answers.get(name), (waits or {}).get(name, "Waiting for a picture")) for name in names)
    return f'<div class="cards n{len(names)}">{each}</div>'


def card(name: str, answer: Answer | None, wait: str) -> str:
    try:
        model = models.model(name)
    except zoo.ZooError as error:
        return closed_card(name, error)
    how = HOW_TRAINED.get(model.method, model.ours["dataset"])
    if (model.ours.get("recipe") or {}).get("start") not in (None, "none"):
        how += "; from a pretrained network"
    head = (f"<header><h3>{escape(model.title)}</h3><p>{escape(how)}<br><code>{escape(name)}</code></p></header>")
    body = waiting(model, wait) if answer is None else answered(model, answer)
    accent = " accent" if model.method == "metasaug" else ""
    return f'<article class="card{accent}">{head}{body}{trained(model)}</article>'


def closed_card(name: str, error: zoo.ZooError) -> str:
    title, sentence = closed(name, error)
    return (f'<article class="card closed"><header><h3>{escape(title)}</h3><p><code>{escape(name)}</code></p></header>'
            f"{ways(sentence)}</article>")


def waiting(model: Model, wait: str) -> str:
    blank = '<li><span class="label"></span><span class="track"></span></li>' * min(5, len(model.labels))
    return f'<div class="waiting"><p>{escape(wait)}</p><ol class="top" aria-hidden="true">{blank}</ol></div>'


def answered(model: Model, answer: Answer) -> str:
    prediction = answer.prediction
    best, glow = prediction.top[0], heat(model, prediction)
    overlay = "" if glow is None else f'<img class="heat" src="{png(glow)}" alt="">'
    where = "Input of the network" + ("" if glow is None else "; yellow: what supports its answer")
    rows = "".join(
        f'<li><span class="label">{name_of(c.label)}</span>{badge(c.group)}'
        f'<span class="count">{times(c.train_images)}</span>'
        f'<span class="number">{percent(c.probability)}</span>'
        f'<span class="track"><i class="{c.group}" style="width:{c.probability:.2%}"></i></span></li>'
        for c in prediction.top
    )
    return f"""
<div class="answer">
  <figure class="seen" title="{where}"><img src="{png(answer.seen)}" alt="{where}">{overlay}</figure>
  <div><p class="best">{name_of(best.label)}</p>
  <p>{badge(best.group)} <span class="sure">{percent(best.probability)} sure</span></p></div>
</div>
{honest(prediction)}
<p class="trust">{escape(f"This picture is {prediction.note}. " if prediction.note else "")}{trust(model, best)}</p>
<h4>Most likely classes, and how often seen in training</h4><ol class="top">{rows}</ol>
<h4>Probability by group</h4>{mass_bar(dict(prediction.groups))}
"""


def honest(prediction: zoo.Prediction) -> str:
    """The prediction set, and a warning for pictures unlike those in training.

    Empty for a model without a calibration.
    """
    if prediction.familiarity is None:
        return ""
    labels = [name_of(each.label) for each in prediction.set(COVERAGE)]
    names = ", ".join(labels[:NAMED]) + (f" and {len(labels) - NAMED} more" if len(labels) > NAMED else "")
    text = (f"With {COVERAGE:.0%} confidence it is one of {len(labels)}: <b>{names}</b>." if len(labels) > 1 else
            f"With {COVERAGE:.0%} confidence it is <b>{names}</b>, and nothing else.")
    strange = " This picture looks unlike anything in training: perhaps it shows none of the classes."
    return f'<p class="set">{text}{strange if prediction.unfamiliar else ""}</p>'


def trust(model: Model, best: zoo.TopClass) -> str:
    """The model's accuracy on classes of this group, in words, from the model folder's results."""
    seen = "" if best.train_images is None else f"Seen in training {best.train_images:,} times. "
    figures = measured(model, best.group)
    if figures is None:
        return seen + "Its accuracy on classes of this group was not measured."
    correct, tested, low, high = figures
    return (f"{seen}On {SUCH.get(best.group, 'its classes')} this model classified <b>{correct:,} of "
            f"{tested:,}</b> test pictures correctly ({low * 100:.0f}–{high:.0%}).")


def trained(model: Model) -> str:
    facts = model.ours
    pictures = f"{sum(model.class_counts):,} pictures of " if model.class_counts else ""
    time = f"{facts['seconds'] / 60:,.0f} minutes on {facts['hardware']}. " if facts.get("seconds") else ""
    schedule = str(facts.get("schedule") or "schedule not known")
    return (f"<footer><b>Trained on</b> {pictures}{escape(str(facts['dataset']))}. <b>How long:</b> "
            f"{escape(time + schedule)}.</footer>")


def world_in_words(names: list[str] | None, adjust: bool, world: float) -> str:
    """The prior slider in words, with the commonest and the rarest class as an example."""
    opened = models.opened(chosen(names))
    lead = next((m for m in opened if m.prior_of_world(1) is not None), None)
    if lead is None or lead.class_counts is None:
        text = "The class counts of these models are not known, so their answers stay as they are."
    elif not adjust:
        text = "Each model's own answer. Move the slider to ask: what if the classes were more, or less, common?"
    else:
        many, few = lead.by_size[0], lead.by_size[-1]
        ratio = (max(lead.class_counts[many], 1) / max(lead.class_counts[few], 1)) ** float(world)
        common, rare = (many, few) if ratio >= 1 else (few, many)
        how = {1.0: ", as in training", 0.0: "", -1.0: ", the reverse of training"}.get(float(world), "")
        factor = max(ratio, 1 / ratio)
        size = f"{factor:,.0f}" if factor >= 9.95 else f"{factor:.1f}"
        text = ("If all classes were equally common." if factor < 1.05 else
                f"If {lead.labels[common]} were {size} times as common as {lead.labels[rare]}{how}.")
        without = [m.name for m in opened if m.prior_of_world(1) is None]
        text += f" Unchanged, because their class counts are not known: {', '.join(without)}." if without else ""
    return f'<p class="world" aria-live="polite">{escape(text)}</p>'


def example_buttons() -> str:
    buttons = "".join(
        f'<button type="button" data-example="{i}" aria-label="Example: {name}"><img alt="" width="256" height="256" '
        f'src="{data_uri((EXAMPLES / f"{name}.jpg").read_bytes(), "jpeg")}"><span>{name}</span></button>'
        for i, name in enumerate(EXAMPLE_NAMES)
    )
    return f'<h3 class="small">Or try one of these</h3><div class="examples">{buttons}</div>'


def only_these(names: list[str] | None) -> str:
    opened = models.opened(chosen(names))
    if not opened:
        return ""
    labels = [name_of(label) for label in opened[0].labels]
    which = f"{', '.join(labels[:-1])} and {labels[-1]}" if len(labels) <= 12 else f"their {len(labels):,} classes"
    coffee = "" if "coffee" in labels else ": try the cup of coffee"
    return (f'<p class="aside">The models know only <b>{which}</b>. Any other picture is forced into one of these'
            f'{coffee}.</p><p class="aside">The small picture on each card is the input of the network; yellow '
            "marks what supports its answer. Uploads are deleted within two hours, or when the demo stops.</p>")
