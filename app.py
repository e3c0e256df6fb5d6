"""The demo: several models classify the same pictures, of common and rare classes. `python app.py` or `metasaug demo`.

Only zoo.images decodes pictures, under its caps. Every event that takes a picture has `preprocess=False`: Gradio then
checks where the file lies and does not open it. The page loads nothing from another host. Its parts are in zoo/demo.
"""

import os
import signal
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import gradio as gr
import tyro

import zoo
from zoo.demo import answers, directions, long_tail, model_page, models, pictures
from zoo.demo.gate import Rules
from zoo.demo.server import application, served, uploads_in
from zoo.demo.theme import ACT, ANNOUNCE, CHOOSE
from zoo.registry import citation

QUEUE: dict[str, Any] = {"max_size": 64, "default_concurrency_limit": 2}
PAGE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {**PAGE, "queue": False}  # for cheap events, which never wait behind pictures


def build_demo(names: list[str]) -> gr.Blocks:
    """The page, with the models `names` chosen at first; zoo.demo.server serves it."""
    sets = models.sets()
    of_set = next((key for key, members in sets.items() if members == names), None)
    with gr.Blocks(title="MetaSAug: the long tail, side by side", analytics_enabled=False,
                   delete_cache=(3600, 3600), fill_width=False) as demo:
        given = gr.State([], time_to_live=3600)  # the answers to the present picture
        intro = gr.HTML(long_tail.introduction(names), elem_id="intro")
        with gr.Row(elem_id="choice"):
            model_set = gr.Dropdown(list(sets), value=of_set, label="Trained on", visible=len(sets) > 1, scale=2)
            chosen = gr.Dropdown(
                [(o.caption, o.name) for o in models.offers()], value=names, multiselect=True, scale=5,
                max_choices=models.AT_ONCE, label=f"Models side by side, up to {models.AT_ONCE}", elem_id="chosen")
        with gr.Tabs():
            with gr.Tab("Picture", id="try"):
                picture, examples, note, adjust, world, words, result = _picture_tab(names)
            with gr.Tab("Folder", id="folder"):
                _folder_tab(names)
            with gr.Tab("Long tail", id="tail") as tail_tab:
                tail = gr.HTML(long_tail.page(names, []), elem_id="tail")
            with gr.Tab("Directions", id="directions") as directions_tab:
                varied = _directions_tab(given)
            with gr.Tab("Models", id="models"):
                _models_tab(names)

        asked = [picture, chosen, adjust, world]
        examples.click(answers.choose_example, None, picture, **AT_ONCE)
        gr.on([picture.change, chosen.change], answers.compare, asked, [result, given], preprocess=False,
              trigger_mode="always_last", **PAGE)
        model_set.change(lambda key: models.sets().get(key, models.first_set()), model_set, chosen, **AT_ONCE)
        chosen.change(lambda n: (long_tail.introduction(n), answers.only_these(n), long_tail.page(n, [])), chosen,
                      [intro, note, tail], preprocess=False, **AT_ONCE)
        gr.on([world.change, adjust.change], answers.again, [given, chosen, adjust, world], result, preprocess=False,
              trigger_mode="always_last", **AT_ONCE)
        gr.on([world.change, adjust.change, chosen.change], answers.world_in_words, [chosen, adjust, world], words,
              preprocess=False, trigger_mode="always_last", **AT_ONCE)
        world.input(lambda: True, None, adjust, **AT_ONCE)
        tail_tab.select(long_tail.page, [chosen, given], tail, preprocess=False, **AT_ONCE)
        directions_tab.select(directions.page, [*varied[:2], given], varied[2], preprocess=False, **AT_ONCE)
        _api(picture)
    return demo.queue(**QUEUE)


def _picture_tab(names: list[str]):
    with gr.Row(equal_height=False, elem_id="single"):
        with gr.Column(scale=5, min_width=300, elem_id="ask"):
            picture = gr.Image(type="filepath", sources=["upload", "clipboard", "webcam"], label="Your picture",
                               height=300, buttons=[], elem_id="picture")
            examples = gr.HTML(answers.example_buttons(), js_on_load=CHOOSE)
            with gr.Group(elem_id="prior"):
                adjust = gr.Checkbox(False, label="What if the classes were more, or less, common?")
                world = gr.Slider(-1, 1, value=0, step=0.05, label="How common the classes are", buttons=[],
                                  info="left: rare classes are common; middle: all alike; right: as in training")
                words = gr.HTML(answers.world_in_words(names, False, 0.0))
            note = gr.HTML(answers.only_these(names), elem_id="note")
        with gr.Column(scale=9, min_width=320, elem_id="answers"):
            result = gr.HTML(answers.cards(names, {}), elem_id="result", js_on_load=ANNOUNCE)
    return picture, examples, note, adjust, world, words, result


def _folder_tab(names: list[str]) -> None:
    rows, view = gr.State([], time_to_live=3600), gr.State(None, time_to_live=3600)
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=280):
            files = gr.File(file_count="multiple", label="Pictures or zip files (each up to 20 MB)",
                            height=220, elem_id="files", type="filepath")
            ready = [(o.caption, o.name) for o in models.offers() if o.ready]
            which = gr.Dropdown(ready, value=names[0], label="Model")
            with gr.Row():
                start = gr.Button("Classify", variant="primary", min_width=90)
                stop = gr.Button("Stop", min_width=70)
            download = gr.DownloadButton("Download CSV", interactive=False)
        with gr.Column(scale=10, min_width=320):
            shown = gr.HTML(pictures.empty(), elem_id="many", js_on_load=ACT)
    # A limit of its own, so that folders never delay single pictures. Jobs alternate picture by picture.
    event = start.click(pictures.run, [files, which], [shown, rows, view, download], preprocess=False,
                        concurrency_id="many", concurrency_limit=8, **PAGE)
    stop.click(pictures.stopped, rows, [shown, download], cancels=[event], **AT_ONCE)
    shown.click(pictures.turn, [rows, view], [shown, view], **AT_ONCE)


def _directions_tab(given: gr.State):
    offered = directions.offered()
    first = offered[0] if offered else None
    with gr.Row():
        which = gr.Dropdown(offered, value=first, label="Model", interactive=True, elem_id="whose")
        choices = directions.classes(first) if first else {"choices": [], "value": None}
        label = gr.Dropdown(choices["choices"], value=choices["value"], interactive=True,
                            label="Class, the rarest first (pictures in training)", elem_id="class")
    shown = gr.HTML("", elem_id="varied")
    told: dict[str, Any] = {"fn": directions.page, "inputs": [which, label, given], "outputs": shown,
                            "preprocess": False, **PAGE}
    # `then`, not `label.change`: if the other model has the same classes, the label does not change.
    which.change(directions.classes, which, label, preprocess=False, **AT_ONCE).then(**told)
    label.input(**told)
    return which, label, shown


def _models_tab(names: list[str]) -> None:
    facts, code, card = model_page.page(names[0])
    which = gr.Dropdown([(o.caption, o.name) for o in models.offers()], value=names[0], label="Model",
                        elem_id="which")
    shown = gr.HTML(facts, elem_id="facts")
    lines = gr.Code(code, language=None, label="In three lines of Python", lines=3, interactive=False)
    text = gr.Markdown(card, elem_id="card")
    gr.Code(citation().rstrip(), language=None, label="To cite the method", interactive=False, elem_id="cite")
    which.change(model_page.page, which, [shown, lines, text], preprocess=False, **PAGE)


def _api(picture: gr.Image) -> None:
    """For gradio_client and curl; see "Use via API" at the foot of the page."""
    ready = models.ready_names()
    model = gr.Dropdown(ready, value=ready[0], label="model", visible=False)
    prior = gr.Dropdown(list(answers.WORLDS), value="own", label="prior", visible=False)
    answer = gr.JSON(label="answer", visible=False)
    gr.Button(visible=False).click(answers.predict, [picture, model, prior], answer, preprocess=False,
                                   api_name="predict")
    gr.api(model_page.list_models, api_name="models")


def demo(
    own: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL ...]")] = (),
    host: str | None = None,
    port: int | None = None,
    open_browser: bool = False,
    auth: str | None = None,
    allowed_host: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    root_path: str | None = None,
    trust_proxy: bool = False,
) -> None:
    """Serve the demo page until Ctrl-C. Uploads are deleted when it stops.

    Args:
        own: Model folders (RUN/model), or names from `metasaug list`, that the page shows first.
        host: Address to listen on, 127.0.0.1 by default; 0.0.0.0 opens the demo to other machines on your network.
        port: Port to listen on, 7860 by default; 0 picks a free one.
        open_browser: Open the page in your browser.
        auth: user:password that every visitor must enter; use it with --host 0.0.0.0. METASAUG_DEMO_AUTH does the same
            and keeps the password out of the process list.
        allowed_host: A host name by which visitors reach the demo, such as lab.example.org; repeat the flag for more
            names. IP addresses (192.168.1.5) and this computer's own name always work.
        root_path: Path below which a reverse proxy serves the demo, such as /zoo.
        trust_proxy: Trust the X-Forwarded-* headers. Use it only behind a reverse proxy that sets them.
    """
    host = host or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # set in a Space
    port = int(os.environ.get("GRADIO_SERVER_PORT", 7860)) if port is None else port
    auth = auth or os.environ.get("METASAUG_DEMO_AUTH") or None
    if auth is not None and not all(auth.partition(":")):
        raise zoo.ZooError("--auth takes user:password, with a colon between them.")
    root_path = (os.environ.get("GRADIO_ROOT_PATH", "") if root_path is None else root_path).rstrip("/")
    if root_path and not root_path.startswith("/"):
        raise zoo.ZooError(f"--root-path {root_path}: a path that begins with /, such as /zoo.")
    in_space = "SPACE_ID" in os.environ  # behind Hugging Face's proxy, which shows the page in a frame
    rules = Rules(host, tuple(name.lower() for name in allowed_host), trust_proxy or in_space, auth,
                  "https://huggingface.co" if in_space else "'none'")
    names, stopped = models.offer(own), threading.Event()
    with (tempfile.TemporaryDirectory(prefix="metasaug-demo-") as folder, stop_signals(stopped),
          uploads_in(folder) as uploads, served(application(build_demo(names), rules, uploads, root_path), host, port
                                                ) as url):
        print(f"The demo is at {url} (Ctrl-C stops it)", flush=True)
        if open_browser:
            webbrowser.open(url)
        stopped.wait()
    print("The demo has stopped; uploads are deleted.", flush=True)


@contextmanager
def stop_signals(stopped: threading.Event) -> Iterator[None]:
    """Make Ctrl-C and SIGTERM set the event instead of ending the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, lambda *_: stopped.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    """`python app.py`, with the flags of `metasaug demo`."""
    try:
        tyro.cli(demo, prog="app.py")
    except zoo.ZooError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
