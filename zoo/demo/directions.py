"""The semantic directions of a class, in words, bars and example pictures."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

import zoo
from zoo.demo import models
from zoo.demo.answers import EXAMPLE_NAMES, EXAMPLES, Answer
from zoo.demo.html import alert, badge, closed, counted, escape, name_of, percent, thumbnail
from zoo.demo.models import Model
from zoo.directions import Direction, Variation, variation

YOURS = "your picture"
LEANS = 0.1  # cosine from which a direction counts as leaning towards a class


def offered() -> list[str]:
    """Models that may have directions: on the Hub, by their method; bundled and own models are opened to check."""
    return [o.name for o in models.offers() if o.ready and (
        o.method in ("metasaug", "isda", "heldout") if o.weights == "hub"
        else (found := models.quietly(models.model, o.name)) is not None and found.has_directions)]


def classes(name: str) -> dict[str, Any]:
    """The choices of the class list, the rarest class first and chosen."""
    model = models.quietly(models.model, name)
    if model is None:
        return gr.update(choices=[], value=None)
    counts = model.class_counts
    choices = [(model.labels[c] if counts is None else f"{model.labels[c]} ({counts[c]:,})", c)
               for c in reversed(model.by_size)]
    return gr.update(choices=choices, value=choices[0][1])


def page(name: str, index: Any, answers: list[Answer] | None) -> str:
    """The page of a class: its directions."""
    if not offered():
        return "<p>No model here has learned class covariances. MetaSAug models have.</p>"
    try:
        model = models.model(name)
        if not isinstance(index, int) or not 0 <= index < len(model.labels):
            return "<p>Choose a class.</p>"
        found = _variation(model, index)
    except zoo.ZooError as error:
        return alert(*closed(name, error))
    yours = next((a for a in answers or [] if a.name == name), None)
    along = examples(model) + ([(YOURS, thumbnail(Image.fromarray(yours.seen)), yours.prediction.features)]
                               if yours and yours.prediction.features is not None else [])
    each = "".join(direction(model, index, number, d, along) for number, d in enumerate(found.directions, 1))
    return f'<section class="directions">{lead(model, index, found)}<ol>{each}</ol></section>'


@lru_cache(maxsize=256)
def _variation(model: Model, index: int) -> Variation:
    return variation(model.folder, index)


@lru_cache(maxsize=8)
def examples(model: Model) -> list[tuple[str, str, np.ndarray]]:
    """The example pictures: name, thumbnail, and features (A,) in this model."""
    paths = [EXAMPLES / f"{name}.jpg" for name in EXAMPLE_NAMES]
    return [(name, thumbnail(Image.open(path)), row.features) for name, path, row in
            zip(EXAMPLE_NAMES, paths, model.predictor.predict_each(paths), strict=True) if row.features is not None]


# ---- HTML ----


def lead(model: Model, index: int, found: Variation) -> str:
    label = name_of(model.labels[index])
    if not found.directions:
        return f"<h2>{label}</h2><p>No variation of this class is known: it was hardly seen.</p>"
    first = sum(d.share for d in found.directions)
    what = "directions" if found.kind == "full" else "features"
    pulls = np.argsort(-found.pull_C)[:5]
    top = max(float(found.pull_C[pulls[0]]), 1e-12)
    bars = "".join(f'<li><span>{name_of(model.labels[j])}</span><span class="track"><i class="{model.groups[j]}" '
                   f'style="width:{found.pull_C[j] / top:.2%}"></i></span></li>' for j in pulls if found.pull_C[j] > 0)
    largest = f"the {len(found.directions)} largest {what} hold <b>{percent(first)}</b> of it"
    if model.ours.get("augment") == "heldout":
        found_by = "measures this scatter on pictures held out of training, in part over all classes together"
    else:
        seen = f" from {counted(model.class_counts[index], 'training picture')}" if model.class_counts else ""
        found_by = f"estimates this scatter{seen}"
        learned = "none of it" if not found.learned_share else f"{percent(found.learned_share)} of it"
        largest += f", and {learned} is the\ncorrection learned on the balanced set"
    return f"""
<h2>How “{label}” varies {badge(model.groups[index])}</h2>
<div class="lead"><p>The network turns a picture into {found.features} numbers. Pictures of one class scatter around a
centre, further in some directions than in others. {escape(model.title)} {found_by}. In training,
it moves every picture of the class along this scatter, as if there were more pictures. A rare class gains variety
in this way. Here {largest}.</p><div><h3 class="small">Trained hardest against</h3><ul class="pull">{bars}</ul></div>
</div>"""


def direction(model: Model, index: int, number: int, d: Direction, along: Sequence) -> str:
    ahead = [int(j) for j in np.argsort(-d.lean_C) if d.lean_C[j] > LEANS][:3]
    behind = [int(j) for j in np.argsort(d.lean_C) if d.lean_C[j] < -LEANS][:3]
    leans = "".join(lean(model.labels[j], float(d.lean_C[j]), model.groups[j]) for j in [*ahead, *reversed(behind)])
    itself = f"more clearly “{name_of(model.labels[index])}”"
    one, other = names(model, ahead), names(model, behind)
    if not ahead and not behind:
        words = "It leans towards no other class: pictures along it differ, but their class stays."
    else:
        words = (f"One way it becomes {f'more like {one}' if one else itself}; "
                 f"the other way, {f'more like {other}' if other else itself}.")
    ordered = sorted(along, key=lambda item: float(item[2] @ d.vector_A))
    strip = "".join(f'<li class="{"yours" if name == YOURS else ""}"><img src="{uri}" alt="{name}" title="{name}" '
                    f'width="44" height="44">{"<span>yours</span>" if name == YOURS else ""}</li>'
                    for name, uri, _ in ordered)
    return f"""<li class="direction"><header><h3>Direction {number}</h3>
<span><b>{percent(d.share)}</b> of the scatter</span>
<span class="track" aria-hidden="true"><i style="width:{d.share:.2%}"></i></span></header>
<div><p>{words}</p><ul class="leans">{leans}</ul></div>
<div><h4>Pictures in their order along it</h4><ol class="along">{strip}</ol></div></li>"""


def names(model: Model, indices: Sequence[int]) -> str:
    labels = [f"<b>{name_of(model.labels[j])}</b>" for j in indices]
    return " and ".join([", ".join(labels[:-1]), labels[-1]]) if len(labels) > 1 else "".join(labels)


def lean(label: str, cosine: float, group: str) -> str:
    """A bar to the right for a class ahead, to the left for one behind."""
    side = f"left:50%;width:{cosine * 50:.1f}%" if cosine > 0 else f"right:50%;width:{-cosine * 50:.1f}%"
    bar = f'<span class="axis" aria-hidden="true"><i class="{group}" style="{side}"></i></span>'
    return f'<li><span>{name_of(label)}</span>{bar}<span class="number">{cosine:+.2f}</span></li>'
