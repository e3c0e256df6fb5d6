"""The demo: a picture, and what each bundled model makes of it. `python app.py`, or `metasaug demo`.

Pictures are decoded by zoo.images alone, under its caps: every event has `preprocess=False`, so that Gradio checks
where a file lies and opens nothing. Nothing on the page comes from another host.
"""

import base64
import html
import io
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio import utils as gradio_utils
from PIL import Image

import zoo
from zoo import images

EXAMPLES = Path(zoo.__file__).parent / "examples"
EXAMPLE_NAMES = ("airplane", "automobile", "bird", "cat", "horse", "ship", "truck", "coffee")
TITLES = {"metasaug": "MetaSAug", "ce": "Plain cross entropy"}
HOW_TRAINED = {"metasaug": "Rare classes count more and vary more", "ce": "Training as usual"}
SUCH = {"head": "such common classes", "medium": "such mid-sized classes", "tail": "such rare classes"}
BY_RANK = {"head": "the largest 30%", "medium": "the 40% between", "tail": "the smallest 30%"}
BY_COUNT = {"head": "over 100 training pictures", "medium": "20 to 100", "tail": "under 20"}


# ---- models ----


@cache
def load(name: str) -> zoo.Predictor:
    return zoo.load(name)


@cache
def last_layer(name: str) -> np.ndarray | None:
    """(C, A) weight of the last layer, where it is linear and in the model folder."""
    folder = load(name).folder
    if folder.config["metasaug"].get("cosine_scale"):
        return None
    return folder.weights().get(folder.config["pretrained_cfg"].get("classifier", "fc") + ".weight")


@cache
def model_sets() -> dict[str, list[str]]:
    """The bundled models by what they were trained on: those of one set are shown side by side, MetaSAug first."""
    sets: dict[str, list[str]] = {}
    for entry in sorted(zoo.list_models(), key=lambda entry: entry.method != "metasaug"):
        if entry.weights == "bundled":
            sets.setdefault(f"{entry.dataset}, imbalance {entry.imbalance:g}", []).append(entry.name)
    if not sets:
        raise zoo.ZooError("No bundled models are here: install the package again, or train one (metasaug train).")
    return sets


def models_of(model_set: Any) -> list[zoo.Predictor]:
    sets = model_sets()
    return [load(name) for name in sets.get(model_set if isinstance(model_set, str) else "", next(iter(sets.values())))]


def ours(model: zoo.Predictor) -> dict[str, Any]:
    return model.folder.config["metasaug"]


def results(model: zoo.Predictor) -> dict[str, Any]:
    return model.folder.results or {}


def title(model: zoo.Predictor) -> str:
    return TITLES.get(ours(model)["method"], ours(model)["method"])


def decode(picture: Any) -> Image.Image:
    """The upload (Gradio's file data), decoded by our rules. Raises PictureError in words that name no path.

    Gradio checks the place of files that are marked as such, so a request without the mark could name any file of
    this computer: only what lies in the folder of uploads is opened.
    """
    path = picture.get("path") if isinstance(picture, dict) else None
    if not isinstance(path, str) or not path:
        raise zoo.PictureError("No picture came with the request.")
    uploads = os.path.realpath(gradio_utils.get_upload_folder())
    if "\0" in path or not os.path.realpath(path).startswith(uploads + os.sep):
        raise zoo.PictureError("No picture came with the request: upload it first.")
    return images.decode(path, name="This file")


# ---- events ----


def compare(picture: dict[str, Any] | None, model_set: str) -> str:
    """What the page shows for a picture: a card a model, or one plain sentence on why there is none."""
    models = models_of(model_set)
    if picture is None:
        return cards(models, [None] * len(models))
    try:
        decoded = decode(picture)
        return cards(models, [(model.predict(decoded), sees(model, decoded)) for model in models])
    except zoo.PictureError as error:
        return (f'<div class="notice" role="alert"><h3>This picture could not be read</h3><p>{html.escape(str(error))}'
                f"</p></div>{cards(models, [None] * len(models))}")


def predict(picture: dict[str, Any], model: str) -> dict[str, Any]:
    """The five likeliest classes of a picture, each with its probability, group (head, medium or tail) and number of
    training pictures; and the probability mass of each group."""
    names = [name for names in model_sets().values() for name in names]
    if model not in names:
        raise gr.Error(f"Unknown model: one of {', '.join(names)}.", print_exception=False)
    try:
        answer = load(model).predict(decode(picture))
    except zoo.PictureError as error:
        raise gr.Error(str(error), print_exception=False) from None
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


# ---- pieces of the page: HTML with every text from a model escaped ----


def percent(p: float) -> str:
    return "<0.1%" if 0 < p < 0.0005 else f"{p:.1%}"


def badge(group: str) -> str:
    return f'<span class="badge {group}">{group}</span>'


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def png(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "png")


def sees(model: zoo.Predictor, picture: Image.Image) -> np.ndarray:
    """What the network takes in, as (H, W, 3) uint8: the picture, cropped and made small."""
    cfg = model.folder.config["pretrained_cfg"]
    array = model.preprocess(picture).transpose(1, 2, 0) * np.asarray(cfg["std"]) + np.asarray(cfg["mean"])
    return np.rint(array * 255).clip(0, 255).astype(np.uint8)


def heat(model: zoo.Predictor, answer: zoo.Prediction) -> np.ndarray | None:
    """Class activation map of the first answer (Zhou et al. 2016) as (h, w, 4) uint8, opaque where it speaks for it.

    Exact here: after the feature map come only the mean over positions and the last layer, so that the logit is the
    mean of this map plus the class's bias.
    """
    weight_CA = last_layer(model.name)
    if weight_CA is None or answer.feature_map is None:
        return None
    cam = np.tensordot(weight_CA[answer.top[0].index], answer.feature_map, 1).clip(0)
    alpha = cam / cam.max() * 190 if cam.max() > 0 else cam
    return np.dstack([np.full_like(alpha, v) for v in (255, 196, 0)] + [alpha]).astype(np.uint8)


def cards(models: Sequence[zoo.Predictor], answers: Sequence[tuple[zoo.Prediction, np.ndarray] | None]) -> str:
    both = (card(model, answer) for model, answer in zip(models, answers, strict=True))
    return f'<div class="cards">{"".join(both)}</div>'


def card(model: zoo.Predictor, answer: tuple[zoo.Prediction, np.ndarray] | None) -> str:
    method = ours(model)["method"]
    head = (f'<header><h3>{html.escape(title(model))}</h3><p>{HOW_TRAINED.get(method, "")}</p></header>')
    body = waiting(model) if answer is None else answered(model, *answer)
    return f'<article class="card {"accent" if method == "metasaug" else ""}">{head}{body}{trained(model)}</article>'


def waiting(model: zoo.Predictor) -> str:
    blank = '<li><span class="label"></span><span class="track"></span></li>' * min(5, len(model.labels))
    return f'<div class="waiting"><p>Waiting for a picture</p><ol class="top" aria-hidden="true">{blank}</ol></div>'


def answered(model: zoo.Predictor, answer: zoo.Prediction, seen: np.ndarray) -> str:
    best = answer.top[0]
    glow = heat(model, answer)
    overlay = "" if glow is None else f'<img class="heat" src="{png(glow)}" alt="">'
    where = "What the network gets" + ("" if glow is None else "; yellow: what speaks for its answer")
    rows = "".join(
        f'<li><span class="label">{html.escape(c.label)}</span>{badge(c.group)}'
        f'<span class="count">{times(c.train_images)}</span>'
        f'<span class="number">{html.escape(percent(c.probability))}</span>'
        f'<span class="track"><i class="{c.group}" style="width:{c.probability:.2%}"></i></span></li>'
        for c in answer.top
    )
    mass = "".join(f'<i class="{g}" style="width:{p:.2%}"></i>' for g, p in answer.groups.items())
    mass_words = "".join(f"<li>{badge(g)} <b>{html.escape(percent(p))}</b></li>" for g, p in answer.groups.items())
    return f"""
<div class="answer">
  <figure class="seen" title="{where}"><img src="{png(seen)}" alt="{where}">{overlay}</figure>
  <div><p class="best">{html.escape(best.label)}</p>
  <p>{badge(best.group)} <span class="sure">{percent(best.probability)} sure</span></p></div>
</div>
<p class="trust">{trust(model, best)}</p>
<h4>Likeliest, and how often seen in training</h4><ol class="top">{rows}</ol>
<h4>All probability, by group</h4>
<div class="mass" aria-hidden="true">{mass}</div><ul class="mass-words">{mass_words}</ul>
"""


def times(count: int | None) -> str:
    return "?" if count is None else f"{count:,} seen"


def trust(model: zoo.Predictor, best: zoo.TopClass) -> str:
    """How often the model is right on classes of this group, in words, from the model folder's results."""
    seen = "" if best.train_images is None else f"Seen in training {best.train_images:,} times. "
    figures = results(model).get("groups", {}).get(best.group)
    if not figures or not figures["images"]:
        return seen + "How often it is right on such classes was not measured."
    low, high = figures["interval"]
    return (f"{seen}On {SUCH.get(best.group, 'its classes')} this model was right for <b>{figures['correct']:,} of "
            f"{figures['images']:,}</b> test pictures ({low * 100:.0f}–{high:.0%}).")


def trained(model: zoo.Predictor) -> str:
    facts = ours(model)
    pictures = f"{sum(model.class_counts):,} pictures of " if model.class_counts else ""
    time = f"{facts['seconds'] / 60:,.0f} minutes on {facts['hardware']}. " if facts.get("seconds") else ""
    schedule = str(facts.get("schedule") or "schedule not known")
    return (f"<footer><b>Trained on</b> {pictures}{html.escape(str(facts['dataset']))}. <b>How long:</b> "
            f"{html.escape(time + schedule)}. <code>{html.escape(model.name)}</code></footer>")


def legend(model: zoo.Predictor) -> str:
    meaning = BY_RANK if model.groups_by == "rank" else BY_COUNT
    present = [group for group in meaning if group in model.groups]
    items = "".join(f"<li>{badge(group)} {meaning[group]}</li>" for group in present)
    return f'<ul class="legend" aria-label="Groups of classes by training pictures">{items}</ul>'


def introduction(models: Sequence[zoo.Predictor]) -> str:
    model = models[0]
    order = by_size(model)
    story = "Real collections have a long tail: a few classes with many pictures, many classes with few."
    if model.class_counts:
        most, least = (html.escape(model.labels[c]) for c in (order[0], order[-1]))
        many, few = (model.class_counts[c] for c in (order[0], order[-1]))
        story = (f"These networks saw <b>{many:,}</b> pictures of {most}s but only <b>{few:,}</b> of {least}s. Trained "
                 "the usual way, a network overlooks what it rarely saw. MetaSAug is made to mend that: show both the "
                 "same picture, and compare.")
    return (f'<div class="intro"><div><h1>What becomes of the rare ones?</h1><p>{story}</p></div>'
            f"{tail_strip(model, order)}</div>")


def tail_strip(model: zoo.Predictor, order: Sequence[int]) -> str:
    if not model.class_counts or len(order) > 40:
        return ""
    top = max(model.class_counts)
    bars = "".join(
        f'<li><b>{model.class_counts[c]:,}</b><i class="{model.groups[c]}" style="height:'
        f'{model.class_counts[c] / top * 72 + 2:.1f}px"></i><span>{html.escape(model.labels[c])}</span></li>'
        for c in order
    )
    return (f'<figure class="strip"><ol>{bars}</ol><figcaption>Training pictures of each class</figcaption>'
            f"{legend(model)}</figure>")


def by_size(model: zoo.Predictor) -> list[int]:
    counts = model.class_counts or (0,) * len(model.labels)
    return sorted(range(len(counts)), key=lambda c: -counts[c])


def only_these(models: Sequence[zoo.Predictor]) -> str:
    labels = [html.escape(label) for label in models[0].labels]
    which = f"{', '.join(labels[:-1])} and {labels[-1]}" if len(labels) <= 12 else f"its {len(labels)} classes"
    return (f'<p class="aside">The models know only <b>{which}</b>. Any other picture is forced into one of these: try '
            'the cup of coffee.</p><p class="aside">The small picture on each card is what the network gets; yellow '
            "marks what speaks for its answer. Uploads are deleted within two hours, or when the demo stops.</p>")


def example_buttons() -> str:
    buttons = "".join(
        f'<button type="button" data-example="{i}" aria-label="Example: {name}"><img alt="" src="'
        f'{data_uri((EXAMPLES / f"{name}.jpg").read_bytes(), "jpeg")}"><span>{name}</span></button>'
        for i, name in enumerate(EXAMPLE_NAMES)
    )
    return f'<h4>Or try one of these</h4><div class="examples">{buttons}</div>'


def long_tail(models: Sequence[zoo.Predictor]) -> str:
    """Accuracy against class size: a line a group, a line a class, a dot a model."""
    measured = [model for model in models if results(model)]
    if not measured:
        return "<p>No bundled model of this data set has measured results.</p>"
    first = measured[0]
    groups = "".join(group_row(group, measured) for group in ("head", "medium", "tail") if group in first.groups)
    names = [html.escape(title(model)) for model in measured]
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    keyed = "".join(f'<th scope=col class="number"><i class="dot m{i}"></i> {n}</th>' for i, n in enumerate(names))
    rows = "".join(class_row(c, measured) for c in by_size(first))
    return f"""
<section class="longtail"><h2>Who is right, and about which classes</h2>
<p>Measured on {results(first)["images"]:,} test pictures that no model saw in training. In brackets: where the true
share lies, with 95% confidence, judging by that many pictures.</p>
<table class="groups"><thead><tr><th scope=col>Group</th>{head}</tr></thead><tbody>{groups}</tbody></table>
<h2>Class by class, the largest first</h2>
<p>The fewer pictures a class has, the more it matters how the network was trained.</p>
<table class="classes"><thead><tr><th scope=col>Class</th><th scope=col>Training pictures</th>
<th scope=col class="wide" aria-hidden="true"><span class="axis"><span>0%</span><span>right in the test</span>
<span>100%</span></span></th>{keyed}</tr></thead><tbody>{rows}</tbody></table></section>"""


def group_row(group: str, models: Sequence[zoo.Predictor]) -> str:
    cells = ""
    for model in models:
        figures = results(model)["groups"].get(group)
        if not figures or not figures["images"]:
            cells += "<td>not measured</td>"
            continue
        low, high = figures["interval"]
        cells += (f'<td><b>{percent(figures["accuracy"])}</b> <span>({low * 100:.1f}–{high:.1%})</span><small>'
                  f'{figures["correct"]:,} of {figures["images"]:,}</small></td>')
    return f"<tr><th scope=row>{badge(group)}</th>{cells}</tr>"


def class_row(c: int, models: Sequence[zoo.Predictor]) -> str:
    model = models[0]
    count = model.class_counts[c] if model.class_counts else 0
    share = count / max(model.class_counts or (1,))
    right = [(row["correct"] / row["test_images"]) if row["test_images"] else None
             for row in (results(m)["per_class"][c] for m in models)]
    known = [r for r in right if r is not None]
    span = f'<i class="span" style="left:{min(known):.2%};width:{max(known) - min(known):.2%}"></i>' if known else ""
    dots = "".join(f'<i class="dot m{i}" style="left:{r:.2%}"></i>' for i, r in enumerate(right) if r is not None)
    numbers = "".join(f'<td class="number">{"–" if r is None else percent(r)}</td>' for r in right)
    return (f"<tr><th scope=row>{html.escape(model.labels[c])} {badge(model.groups[c])}</th>"
            f'<td><div class="size"><b>{count:,}</b><span class="bar"><i class="{model.groups[c]}" '
            f'style="width:{share:.2%}"></i></span></div></td>'
            f'<td class="wide" aria-hidden="true"><span class="scale">{span}{dots}</span></td>{numbers}</tr>')


def model_card(name: str) -> str:
    """The card without its YAML header, for which the page has no use."""
    text = load(name).folder.card
    return text.split("\n---", 1)[1].lstrip("-\n") if text.startswith("---") and "\n---" in text else text


def how_to_load(name: str) -> str:
    return f'import zoo\nmodel = zoo.load("{name}")\nprint(model.predict("photo.jpg"))'


# ---- the page ----

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace")


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="stone", radius_size="lg", text_size="md", font=FONT,
        font_mono=MONO,
    ).set(
        body_background_fill="#faf9f7", body_background_fill_dark="#161514",
        color_accent="#0f766e", color_accent_soft="#d9f2ee", color_accent_soft_dark="#12443e",
        body_text_color="#1f1d1b", body_text_color_dark="#f0eeea",
        body_text_color_subdued="#5f5a54", body_text_color_subdued_dark="#b3ada5",
        block_background_fill="#ffffff", block_background_fill_dark="#201e1c",
        block_border_color="#e4e0da", block_border_color_dark="#3a3632",
        border_color_primary="#e4e0da", border_color_primary_dark="#3a3632",
        block_shadow="none", block_label_background_fill="#ffffff", block_label_background_fill_dark="#201e1c",
        block_label_text_color="#5f5a54", block_label_text_color_dark="#b3ada5",
    )  # fmt: skip


CSS = (Path(zoo.__file__).parent / "demo.css").read_text(encoding="utf-8")


def build_demo() -> gr.Blocks:
    """The page, on every bundled model; `launch` it with LAUNCH's options and `theme=theme(), css=CSS`."""
    sets = model_sets()
    first = next(iter(sets))
    names = [name for names in sets.values() for name in names]
    with gr.Blocks(title="MetaSAug: the long tail, side by side", analytics_enabled=False,
                   delete_cache=(3600, 3600), fill_width=False) as demo:
        models = models_of(first)
        intro = gr.HTML(introduction(models))
        model_set = gr.Dropdown(list(sets), value=first, label="Models trained on", visible=len(sets) > 1)
        with gr.Tab("Try a picture", id="try"), gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                picture = gr.Image(type="filepath", sources=["upload", "clipboard", "webcam"], label="Your picture",
                                   height=300, buttons=[], elem_id="picture")
                examples = gr.HTML(example_buttons(), js_on_load=CHOOSE)
                note = gr.HTML(only_these(models))
            with gr.Column(scale=9, min_width=320):
                result = gr.HTML(compare(None, first), elem_id="result",
                                 js_on_load=ANNOUNCE)
        with gr.Tab("The long tail", id="tail"):
            tail = gr.HTML(long_tail(models))
        with gr.Tab("The models", id="models"):
            which = gr.Radio(names, value=names[0], label="Model", interactive=True)
            code = gr.Code(how_to_load(names[0]), language="python", label="In three lines of Python", lines=3,
                           interactive=False)
            shown_card = gr.Markdown(model_card(names[0]), elem_id="card")

        page: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        examples.click(choose_example, None, picture, **page)
        picture.change(compare, [picture, model_set], result, preprocess=False, trigger_mode="always_last", **page)
        model_set.change(lambda s: tuple(f(models_of(s)) for f in (introduction, only_these, long_tail)), model_set,
                         [intro, note, tail], **page)
        model_set.change(compare, [picture, model_set], result, preprocess=False, **page)
        which.change(lambda name: (how_to_load(name), model_card(name)), which, [code, shown_card], **page)

        # For gradio_client and curl, see "Use via API" at the foot of the page.
        model = gr.Dropdown(names, value=names[0], label="model", visible=False)
        answer = gr.JSON(label="answer", visible=False)
        gr.Button(visible=False).click(predict, [picture, model], answer, preprocess=False, api_name="predict")
        gr.api(list_models, api_name="models")
    return demo.queue(max_size=64, default_concurrency_limit=2)


def list_models() -> list[dict]:
    """Every model of the zoo: name, data set, method, and whether its weights are bundled or not published yet."""
    return [{"name": e.name, "dataset": e.dataset, "imbalance": e.imbalance, "method": e.method, "weights": e.weights,
             "trained": e.summary} for e in zoo.list_models()]


# Read out by screen readers; and on a phone, where the answer is below the picture, brought into view.
ANNOUNCE = """
element.setAttribute('aria-live', 'polite');
watch('value', () => {
  if (innerWidth < 780 && element.querySelector('.best, .notice')) element.scrollIntoView({block: 'start'});
});
"""

CHOOSE = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-example]');
  if (button) trigger('click', {index: Number(button.dataset.example)});
});
"""

LAUNCH: dict[str, Any] = {
    "share": False, "max_file_size": "20mb", "enable_monitoring": False, "ssr_mode": False, "run_history": False,
    "show_error": False, "mcp_server": False, "pwa": False, "footer_links": ["api", "settings"],
}  # fmt: skip


def demo(host: str = "127.0.0.1", port: int = 7860, open_browser: bool = False) -> None:
    """The Gradio app on the bundled models, until Ctrl-C. Uploads are deleted when it stops.

    Args:
        host: Address to listen on; 0.0.0.0 lets other machines of your network in.
        port: Port to listen on; 0 takes any free one.
        open_browser: Open the page in your browser.
    """
    stopped = threading.Event()
    with tempfile.TemporaryDirectory(prefix="metasaug-demo-") as uploads, stop_signals(stopped):
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_demo()
        try:
            _, url, _ = page.launch(server_name=host, server_port=port or free_port(host), inbrowser=open_browser,
                                    prevent_thread_lock=True, quiet=True, theme=theme(), css=CSS, **LAUNCH)
        except OSError as error:
            raise zoo.ZooError(f"Port {port} on {host} cannot be used: choose another with --port.") from error
        print(f"The demo is at {url} (Ctrl-C stops it)", flush=True)
        stopped.wait()
        page.close(verbose=False)
    print("The demo has stopped; uploads are deleted.", flush=True)


@contextmanager
def stop_signals(stopped: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set the event, instead of ending the process in the middle of something."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, lambda *_: stopped.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port(host: str) -> int:
    with closing(socket.socket()) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def main() -> int:
    """`python app.py`, with the flags of `metasaug demo`."""
    import tyro

    try:
        tyro.cli(demo, prog="app.py")
    except zoo.ZooError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
