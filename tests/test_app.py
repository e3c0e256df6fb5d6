"""The demo as a person meets it (a headless Chromium on a real server), as a program meets it, and how it stops."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import zoo

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'metasaug[demo]'")

from zoo.demo import answers, models

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "zoo" / "examples"
PATIENCE = 90_000  # milliseconds; a page answers in a fraction of that, unless the machine is busy


def start(*flags: str) -> tuple[subprocess.Popen, str]:
    """`python app.py` on a free port, and its address once it says that it is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "app.py", "--port", "0", *flags], cwd=ROOT, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return process, found[0]
    process.wait()
    raise AssertionError(f"the demo did not start:\n{''.join(lines)}")


def stop(process: subprocess.Popen, how: signal.Signals = signal.SIGTERM) -> str:
    process.send_signal(how)
    try:
        return process.communicate(timeout=20)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    process, url = start()
    yield url
    stop(process)


@pytest.fixture
def page(chromium, address):
    """The demo, open; at the end, nothing on it came from another host, and nothing broke in it."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    elsewhere, broken = [], []
    page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(address)
    page.locator(".examples button").first.wait_for()
    yield page
    page.close()
    assert elsewhere == []
    assert broken == []


def upload(page, name: str, content: bytes, kind: str = "image/png") -> None:
    page.locator("#picture input[type=file]").set_input_files({"name": name, "mimeType": kind, "buffer": content})


def choose(page, where: str, option: str) -> None:
    """Of a dropdown: typed and taken, as a person does with a long list."""
    box = page.locator(f"{where} input").first
    box.click()
    box.fill(option)
    page.get_by_role("option", name=option, exact=True).click()


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (20, 90, 160)).save(buffer, "PNG")
    return buffer.getvalue()


# ---- a person ----


@pytest.mark.browser
def test_an_example_shows_both_models_side_by_side(page):
    # Given the page, which says what the models know, and of how many pictures,
    assert "forced into one of these" in page.inner_text(".aside")
    assert "4,990" in page.inner_text(".intro")
    # when a person chooses the ship,
    page.get_by_role("button", name="Example: ship").click()
    page.locator(".best").first.wait_for()
    # then each model's card says what it sees, how sure it is, and what it was trained on and how long,
    cards = page.locator("article.card")
    assert cards.locator("h3").all_inner_texts() == ["MetaSAug", "Plain cross entropy"]
    for i, name in enumerate(("metasaug-cifar10-lt", "ce-cifar10-lt")):
        model, card = zoo.load(name), cards.nth(i)
        answer = model.predict(EXAMPLES / "ship.jpg")
        assert card.locator(".best").inner_text() == answer.top[0].label
        rows = card.locator("ol.top li")
        assert rows.count() == 5
        for row, top in zip(rows.all(), answer.top, strict=True):
            assert row.locator(".label").inner_text() == top.label
            assert row.locator(".badge").inner_text() == top.group
            assert f"{top.train_images:,}" in row.locator(".count").inner_text()
        # the probability of each group, the rarity of the answer, and how far to trust it, from the model folder.
        assert [t.split()[0] for t in card.locator(".mass-words li").all_inner_texts()] == ["head", "medium", "tail"]
        figures = model.folder.results["groups"][answer.top[0].group]
        assert f"{figures['correct']:,} of {figures['images']:,}" in card.locator(".trust").inner_text()
        assert "CIFAR-10 (JPEG)" in card.locator("footer").inner_text()
        assert "60 epochs" in card.locator("footer").inner_text()


@pytest.mark.browser
def test_an_uploaded_picture_is_classified_and_a_bad_one_gets_one_plain_sentence(page):
    upload(page, "blue.png", png())
    page.locator(".best").first.wait_for()
    # Given an answer on the page, when the next upload is no picture inside,
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.get_by_text("Waiting for a picture").first.wait_for()
    upload(page, "holiday.png", b"certainly no picture" * 50)
    # then the page says so in one sentence, with neither path nor traceback, and shows no stale answer,
    notice = page.get_by_role("alert").filter(has_text="could not be read")
    notice.wait_for()
    text = notice.inner_text()
    assert "is no picture" in text
    assert "/" not in text.replace("JPEG, PNG", "") and "Traceback" not in text
    assert page.locator(".best").count() == 0
    # and the next example works.
    page.get_by_role("button", name="Example: cat").click()
    page.locator(".best").first.wait_for()
    assert page.get_by_role("alert").filter(has_text="could not be read").count() == 0


@pytest.mark.browser
def test_everything_is_reached_by_keyboard(page):
    # Given only a keyboard, when Tab is pressed until an example has the focus, and then Enter,
    for _ in range(25):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "Example: bird":
            break
    else:
        raise AssertionError("Tab never reached the examples")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    # then the answer appears, in a region that screen readers follow.
    page.locator(".best").first.wait_for()
    assert page.locator("[aria-live=polite] .best").count() == 2
    # No button is without a name.
    nameless = page.evaluate("""[...document.querySelectorAll('button')].filter(b => b.checkVisibility()
        && !b.textContent.trim() && !b.getAttribute('aria-label') && !b.title).map(b => b.outerHTML)""")
    assert nameless == []


@pytest.mark.browser
def test_the_long_tail_and_the_cards_have_their_tabs(page):
    page.get_by_role("tab", name="Long tail").click()
    rows = page.locator("table.classes tbody tr")
    rows.first.wait_for()
    assert rows.count() == 10
    assert "airplane" in rows.first.inner_text() and "truck" in rows.last.inner_text()
    results = zoo.load("metasaug-cifar10-lt").folder.results
    assert f"{results['groups']['tail']['accuracy']:.1%}" in page.locator("table.groups").inner_text()
    page.get_by_role("tab", name="Models").click()
    page.get_by_role("heading", name="metasaug-cifar10-lt").wait_for()
    choose(page, "#which", "ce-cifar10-lt")
    page.get_by_role("heading", name="ce-cifar10-lt", exact=True).wait_for()
    # The model's page has its figures, three lines that load it, and the paper to cite.
    assert 'zoo.load("ce-cifar10-lt")' in page.inner_text("#models, body")
    assert "li2021metasaug" in page.inner_text("#cite")
    # A model that is not out is shown as such, with the command that makes it.
    choose(page, "#which", "metasaug-cifar10-lt-50 (not published yet)")
    page.get_by_text("Not published yet.").wait_for()
    assert "metasaug train cifar10-lt --imbalance 50" in page.inner_text("#facts")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(chromium, address, scheme):
    page = chromium.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.get_by_role("button", name="Example: automobile").click()
    page.locator(".best").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("body.dark").count() == (scheme == "dark")
    page.close()


# ---- a program ----


def test_the_api_answers_gradio_client(address, tmp_path):
    client_library = pytest.importorskip("gradio_client")
    client = client_library.Client(address, verbose=False, analytics_enabled=False)
    # A picture in, the same answer out as from the library,
    answer = client.predict(client_library.handle_file(EXAMPLES / "ship.jpg"), "ce-cifar10-lt", api_name="/predict")
    expected = zoo.load("ce-cifar10-lt").predict(EXAMPLES / "ship.jpg")
    assert [row["label"] for row in answer["top"]] == [c.label for c in expected.top]
    assert answer["top"][0]["probability"] == pytest.approx(expected.top[0].probability, abs=1e-6)
    assert answer["groups"] == pytest.approx(expected.groups, abs=1e-6)
    # every model listed with what stands behind its name,
    listed = {row["name"]: row for row in client.predict(api_name="/models")}
    assert listed["metasaug-cifar10-lt"]["weights"] == "bundled"
    assert {row["weights"] for row in listed.values()} <= {"bundled", "unpublished"}
    # and for no picture one sentence, without a path.
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture at all")
    with pytest.raises(Exception, match="This file is no picture") as caught:
        client.predict(client_library.handle_file(bad), "ce-cifar10-lt", api_name="/predict")
    assert "bad.jpg" not in str(caught.value) and "/tmp" not in str(caught.value)
    with pytest.raises(Exception, match="Unknown model"):
        client.predict(client_library.handle_file(EXAMPLES / "ship.jpg"), "nonsense", api_name="/predict")


@pytest.mark.parametrize("marked", [True, False])
def test_no_request_reaches_a_file_that_was_not_uploaded(address, marked):
    # Given a picture of this computer that nobody uploaded, when a request names its path (Gradio guards files that
    # are marked as such, so also one without the mark), or brings bytes round the upload's limit,
    mark = {"meta": {"_type": "gradio.FileData"}} if marked else {}
    data_url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for picture in ({"path": str(EXAMPLES / "cat.jpg")}, {"path": "/etc/passwd"}, {"path": "../../etc/passwd"},
                    {"path": None, "url": data_url}, {"path": data_url}, {"path": "x\0y"}, {"path": 7}):
        reply = call_api(address, [{**picture, **mark}, "ce-cifar10-lt"])
        # then it gets an error that tells nothing.
        assert reply.startswith("event: error")
        assert "probability" not in reply and "Traceback" not in reply and "root:" not in reply
        assert "no picture in" not in reply and str(ROOT) not in reply


def test_an_upload_over_the_limit_is_refused(address):
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    request = urllib.request.Request(f"{address}/gradio_api/upload", head + bytes(21_500_000) + b"\r\n--b--\r\n",
                                     {"Content-Type": "multipart/form-data; boundary=b"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 413
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}/gradio_api/file={ROOT / 'zoo' / 'registry.py'}")
    assert caught.value.code == 403


def call_api(address: str, data: list) -> str:
    """The reply's text, from /predict called as curl would."""
    request = urllib.request.Request(f"{address}/gradio_api/call/predict", json.dumps({"data": data}).encode(),
                                     {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    return urllib.request.urlopen(f"{address}/gradio_api/call/predict/{event}").read().decode()


# ---- the process ----


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_cleanly_and_deletes_what_was_uploaded(how, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process, url = start()
    assert list(tmp_path.glob("metasaug-demo-*"))
    # When it is told to stop,
    output = stop(process, how)
    # then it ends well, without a traceback, its port is free, and no upload is left.
    assert process.returncode == 0
    assert "Traceback" not in output and "stopped" in output
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) != 0
    assert not list(tmp_path.glob("metasaug-demo-*"))


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run([sys.executable, "app.py", "--port", port], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"Port {port}" in done.stderr and "--port" in done.stderr and "Traceback" not in done.stderr


def test_one_process_never_loads_a_model_twice():
    # Given eight people who ask for a model at the same moment, when it is loaded, then all have the same one.
    models.offer()
    with ThreadPoolExecutor(8) as people:
        loaded = list(people.map(lambda _: models.model("ce-cifar10-lt").predictor, range(8)))
    assert len({id(predictor) for predictor in loaded}) == 1
    assert not models.model("metasaug-cifar10-lt").loaded  # and nothing that nobody asked for is


def test_examples_are_small_and_their_licences_are_stated():
    notes = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in answers.EXAMPLE_NAMES:
        assert (EXAMPLES / f"{name}.jpg").stat().st_size < 60_000
        assert f"`{name}.jpg`" in notes
