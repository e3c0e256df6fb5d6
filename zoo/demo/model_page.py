"""A page for each model: what it is, its accuracy, three lines of Python that load it, and its card."""

import re
from typing import Any

import zoo
from zoo.demo import models
from zoo.demo.html import closed, escape, percent, ways

LONG_CARD = 60_000  # characters; a longer card is shown without its table of all classes


def page(name: str | None) -> tuple[str, str, str]:
    """The facts above the code, the code, and the card as Markdown."""
    if not isinstance(name, str):
        return "<p>Choose a model.</p>", "", ""
    return facts(name), how_to_load(name), card(name)


def how_to_load(name: str) -> str:
    offer = models.find(name)
    what = offer.source if offer else name
    return f'import zoo\nmodel = zoo.load("{what}")\nprint(model.predict("photo.jpg"))'


def facts(name: str) -> str:
    offer = models.find(name)
    try:
        model = models.model(name)
    except zoo.ZooError as error:
        title, sentence = closed(name, error)
        published = offer.entry.published_error if offer and offer.entry else None
        paper = (f"<p>Its published error is <b>{published:.2%}</b> ({escape(offer.entry.published_source or '')}).</p>"
                 if offer and offer.entry and published is not None else "")
        return (f'<div class="facts closed"><h2>{escape(name)}</h2><p><b>{escape(title)}.</b></p>{ways(sentence)}'
                f"{paper}</div>")
    results = model.results
    figures: list[tuple[str, Any]] = [("classes", f"{len(model.labels):,}")]
    if model.class_counts:
        figures.append(("training pictures", f"{sum(model.class_counts):,}"))
    if results:
        figures.append(("test accuracy", percent(1 - results["error"])))
        figures += [(f"accuracy on {g}", percent(r["accuracy"])) for g, r in results["groups"].items()
                    if r.get("accuracy") is not None]
    items = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in figures)
    what = f"{model.title}, {model.config['architecture']}, trained on {model.ours['dataset']}."
    return f'<div class="facts"><h2>{escape(name)}</h2><p>{escape(what)}</p><dl>{items}</dl></div>'


def card(name: str) -> str:
    """The card without its YAML header, pictures (the page loads nothing from elsewhere) and very long tables."""
    try:
        text = models.model(name).folder.card
    except zoo.ZooError:
        return ""
    if text.startswith("---") and "\n---" in text:
        text = text.split("\n---", 1)[1].lstrip("-\n")
    text = re.sub(r"^# .*\n+", "", text, count=1)
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^## Citation\n.*?(?=^## |\Z)", "", text, flags=re.S | re.M)
    if len(text) > LONG_CARD:
        text = re.sub(r"^### Per class\n.*?(?=^## |\Z)", "", text, flags=re.S | re.M)
    return re.sub(r"^(#+) ", r"#\1 ", text[:LONG_CARD], flags=re.M)


def list_models() -> list[dict]:
    """Every model on offer: name, data set, method, and where its weights are.

    `weights` is bundled, hub, yours or unpublished; what_to_do says how to get weights that are unpublished."""
    rows = []
    for o in models.offers():
        e = o.entry
        rows.append({"name": o.name, "dataset": e.dataset if e else o.trained_on,
                     "imbalance": e.imbalance if e else None, "method": o.method, "weights": o.weights,
                     "trained": e.summary if e and o.weights == "bundled" else o.trained_on if o.ready
                     else "not published yet", "what_to_do": o.what_to_do if not o.ready else None})
    return rows
