"""The demo as a person meets it (a headless Chromium on a real server), as a program meets it, and how it stops."""

import base64
import csv
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
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zoo

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'metasaug[demo]'")

import gradio

from benchmarks import load
from zoo.demo import answers, directions, long_tail, model_page, models
from zoo.directions import variation
from zoo.labels import assign_groups
from zoo.model_folder import write_model_folder

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
    # Given an answer on the page, when the next upload is not a picture inside,
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.get_by_text("Waiting for a picture").first.wait_for()
    upload(page, "holiday.png", b"certainly no picture" * 50)
    # then the page says so in one sentence, with neither path nor traceback, and shows no stale answer,
    notice = page.get_by_role("alert").filter(has_text="could not be read")
    notice.wait_for()
    text = notice.inner_text()
    assert "is not a picture" in text
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
    page.get_by_text("Not published yet.", exact=True).wait_for()
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


# ---- more of what a person does ----


@pytest.mark.browser
def test_the_prior_slider_asks_about_another_world_without_the_network(page):
    # Given the answers to a ship, when a person moves the slider to the world that turns training round, by keyboard,
    page.get_by_role("button", name="Example: ship").click()
    page.locator(".best").nth(1).wait_for()
    slider = page.locator("#prior input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    page.get_by_text("If truck were 102 times as common as airplane, the reverse of training.").wait_for()
    # then each card shows what the model says under that prior,
    for i, name in enumerate(("metasaug-cifar10-lt", "ce-cifar10-lt")):
        model = zoo.load(name)
        expected = model.predict(EXAMPLES / "ship.jpg", prior=1 / np.array(model.class_counts))
        page.locator("article.card").nth(i).get_by_text(f"{expected.top[0].probability:.1%} sure").wait_for()
    # and unticked, the model's own answer is back.
    page.get_by_label("What if the classes").uncheck()
    own = zoo.load("ce-cifar10-lt").predict(EXAMPLES / "ship.jpg").top[0].probability
    page.locator("article.card").nth(1).get_by_text(f"{own:.1%} sure").wait_for()


@pytest.mark.browser
def test_directions_say_in_words_what_the_covariances_hold(page):
    page.get_by_role("button", name="Example: truck").click()
    page.locator(".best").first.wait_for()
    page.get_by_role("tab", name="Directions").click()
    # The rarest class first: each direction with its share, the classes it leans to, and pictures in order along it.
    page.get_by_role("heading", name="How “truck” varies").wait_for()
    expected = variation(zoo.load("metasaug-cifar10-lt").folder, 9)
    rows = page.locator("li.direction")
    assert rows.count() == len(expected.directions) == 5
    for row, d in zip(rows.all(), expected.directions, strict=True):
        assert f"{d.share:.1%}" in row.locator("header").inner_text()
        assert zoo.load("metasaug-cifar10-lt").labels[int(d.lean_C.argmax())] in row.locator("p").inner_text()
        along = [picture.get_attribute("alt") for picture in row.locator(".along img").all()]
        assert sorted(along) == sorted([*answers.EXAMPLE_NAMES, "your picture"])
    # Another class is found by typing.
    choose(page, "#class", "ship (83)")
    page.get_by_role("heading", name="How “ship” varies").wait_for()
    # Another model of the same classes, from the rarest on, tells what its own method did.
    choose(page, "#class", "truck (49)")
    page.get_by_role("heading", name="How “truck” varies").wait_for()
    choose(page, "#whose", "heldout-cifar10-lt")
    page.get_by_text("Held-out augmentation measures this scatter").wait_for()
    share = variation(zoo.load("heldout-cifar10-lt").folder, 9).directions[0].share
    assert f"{share:.1%}" in rows.first.locator("header").inner_text()


@pytest.mark.browser
def test_a_zip_becomes_a_gallery_a_table_and_a_csv(page, tmp_path):
    # Given a zip of pictures with a text in disguise among them, one more picture, and a zip that is a bomb,
    inside = {f"trip/{name}.jpg": (EXAMPLES / f"{name}.jpg").read_bytes() for name in answers.EXAMPLE_NAMES}
    good, bomb = tmp_path / "trip.zip", tmp_path / "bomb.zip"
    for path, members in ((good, inside | {"trip/notes.jpg": b"sunny"}), (bomb, {"b.png": bytes(5_000_000)})):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    page.get_by_role("tab", name="Folder").click()
    page.locator("#files input[type=file]").set_input_files([good, bomb, EXAMPLES / "horse_silhouette.png"])
    page.locator("#files").get_by_text("trip.zip").or_(page.locator("#files").get_by_text("trip")).first.wait_for()
    # when they are classified,
    page.get_by_role("button", name="Classify").click()
    page.get_by_role("heading", name="9 pictures classified, 2 could not be read").wait_for()
    # then the least sure come first,
    model = zoo.load("metasaug-cifar10-lt")
    expected = {name: model.predict(content).top[0] for name, content in inside.items()}
    expected["horse_silhouette.png"] = model.predict(EXAMPLES / "horse_silhouette.png").top[0]
    ordered = sorted(expected, key=lambda name: expected[name].probability)
    shown = page.locator(".gallery li:not(.unread) small").all_inner_texts()
    assert shown == [name.rpartition("/")[2] for name in ordered]
    # what could not be read says why,
    unread = page.locator(".gallery .unread").all_inner_texts()
    assert any("notes.jpg" in t and "not a picture" in t for t in unread)
    assert any("bomb.zip" in t and "zip bomb" in t for t in unread)
    # one group can be looked at alone, the table is sorted by its headings,
    tail = [name for name in ordered if expected[name].group == "tail"]
    page.get_by_role("button", name=f"tail {len(tail)}").click()
    expect_count(page.locator(".gallery li"), len(tail))
    page.get_by_role("button", name="all 11").click()
    page.get_by_role("button", name="Table").click()
    page.locator(".folder table").wait_for()
    page.get_by_role("columnheader", name="File").get_by_role("button").click()
    page.locator("th[aria-sort=ascending]", has_text="File").wait_for()
    names = page.locator(".folder tbody tr:not(.unread) th").all_inner_texts()
    assert names == sorted(expected)
    # and the CSV has what the command line would have written.
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").or_(page.get_by_role("link", name="Download CSV")).first.click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert {row["path"]: row["label"] for row in rows if row["label"]} == {n: t.label for n, t in expected.items()}
    assert sum(bool(row["error"]) for row in rows) == 2


@pytest.mark.browser
def test_a_model_that_is_not_out_says_what_to_do_and_the_others_answer(page):
    choose(page, "#chosen", "metasaug-cifar100-lt (not published yet)")
    page.keyboard.press("Escape")
    card = page.locator("article.card.closed")
    card.wait_for()
    assert "metasaug train cifar100-lt --imbalance 100" in card.inner_text()
    page.get_by_role("button", name="Example: bird").click()
    page.locator(".best").nth(1).wait_for()
    assert card.is_visible()


@pytest.mark.browser
def test_a_picture_comes_by_paste_and_by_webcam(chromium, address):
    # Given a page where a picture is pasted, as from a screenshot, when it arrives, then it is classified;
    context = chromium.new_context(permissions=["camera"])
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.locator(".examples button").first.wait_for()
    for count in (1, 2):  # the second replaces the first
        page.evaluate("""async (bytes) => {
          const file = new File([new Uint8Array(bytes)], 'pasted.png', {type: 'image/png'});
          const carrier = new DataTransfer();
          carrier.items.add(file);
          document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: carrier, bubbles: true}));
        }""", list(png((40 * count, 30))))
        page.locator(".best").nth(1).wait_for()
        page.wait_for_function("n => document.querySelector('#picture img')?.naturalWidth === 40 * n", arg=count)
    # and a webcam (a made-up one) gives one as well.
    page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
    page.get_by_text("Waiting for a picture").first.wait_for()
    page.get_by_label("Capture from camera").click()
    page.locator("[title='grant webcam access'] button").click()
    # Gradio takes no photo before the camera's first frame has come.
    page.wait_for_function("() => { const v = document.querySelector('#picture video'); "
                           "return v && v.videoWidth > 0 && v.readyState >= 2 && v.currentTime > 0; }")
    page.get_by_label("capture photo").click()
    page.locator(".best").nth(1).wait_for()
    context.close()


@pytest.mark.browser
def test_the_whole_page_is_used_by_keyboard_alone(page):
    # Given only a keyboard, when a person goes through the tabs by arrow,
    def reach(condition: str, presses: int = 60) -> None:
        for _ in range(presses):
            if page.evaluate(f"(() => {{ const e = document.activeElement; return !!({condition}); }})()"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab never reached {condition}")

    reach("e.getAttribute('role') === 'tab' && e.textContent.includes('Picture')")
    reach("e.getAttribute('aria-label') === 'Example: ship'")
    page.keyboard.press("Space")
    page.locator(".best").nth(1).wait_for()
    reach("e.closest('#prior') && e.type === 'checkbox'")
    page.keyboard.press("Space")
    page.get_by_text("If all classes were equally common.").wait_for()
    page.keyboard.press("Shift+Tab")
    # then every part of the page opens and answers: the class list by typing,
    page.locator("[role=tab]", has_text="Directions").focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="How “truck” varies").wait_for()
    reach("e.closest('#class') && e.tagName === 'INPUT'")
    page.keyboard.press("Control+A")
    page.keyboard.type("frog")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="How “frog” varies").wait_for()
    # and the pictures of a folder can be chosen.
    page.locator("[role=tab]", has_text="Folder").focus()
    page.keyboard.press("Enter")
    reach("e.closest('#files')")
    reach("e.textContent.trim() === 'Classify'")
    page.keyboard.press("Enter")
    page.get_by_role("alert").filter(has_text="Choose pictures").wait_for()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.long)])
def test_axe_finds_nothing_serious_in_any_part(chromium, address, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.get_by_role("button", name="Example: ship").click()
    page.locator(".best").nth(1).wait_for()
    found = {}
    for tab, ready in (("Picture", ".best"), ("Folder", "#many .empty"), ("Long tail", "table.classes"),
                       ("Directions", ".direction"), ("Models", "#card h3")):
        page.get_by_role("tab", name=tab).click()
        page.locator(ready).first.wait_for()
        if tab == "Folder":
            page.locator("#files input[type=file]").set_input_files([EXAMPLES / "cat.jpg", EXAMPLES / "README.md"])
            page.locator("#files").get_by_text("README").first.wait_for()
            page.get_by_role("button", name="Classify").click()
            page.locator(".folder h2").wait_for()
        result = axe.Axe().run(page).response
        found |= {(tab, v["id"], node["target"][0] if isinstance(node["target"][0], str) else str(node["target"])):
                  node["failureSummary"] for v in result["violations"] if v["impact"] in ("serious", "critical")
                  for node in v["nodes"]}
    context.close()
    assert found == {}


@pytest.mark.browser
def test_a_full_queue_is_shown_as_busy(page):
    # Given a server whose queue is full (it says so with 503, as the load test sees), when a person asks,
    full = '{"detail": "Queue is full. Max size is 64 and size is 64."}'
    page.route("**/queue/join*", lambda route: route.fulfill(status=503, content_type="application/json", body=full))
    page.get_by_role("button", name="Example: cat").click()
    # then the page says at once that it is busy, and works again when there is room.
    page.get_by_text("currently busy. Please try again.").first.wait_for(timeout=20_000)
    page.unroute("**/queue/join*")
    page.get_by_role("button", name="Example: bird").click()
    page.locator(".best").nth(1).wait_for()


@pytest.mark.browser
def test_nothing_moves_when_an_answer_comes(page):
    # Given the page at rest, when an answer takes the place of the waiting cards, then Chromium counts no layout shift
    # worth the name (0.1 is "good").
    page.evaluate("""() => { window.shift = 0; new PerformanceObserver(list => { for (const e of list.getEntries())
        window.shift += e.value; }).observe({type: 'layout-shift'}); }""")
    page.get_by_role("button", name="Example: cat").focus()
    page.keyboard.press("Enter")
    page.locator(".best").nth(1).wait_for()
    page.wait_for_timeout(500)
    assert page.evaluate("window.shift") < 0.1


def expect_count(locator, count: int) -> None:
    locator.nth(count - 1).wait_for()
    for _ in range(100):
        if locator.count() == count:
            return
        locator.page.wait_for_timeout(100)
    raise AssertionError(f"{locator.count()} instead of {count}")


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
    assert {row["weights"] for row in listed.values()} <= {"bundled", "hub", "unpublished"}
    assert "metasaug train" in listed["metasaug-cifar10-lt-50"]["what_to_do"]
    # and for no picture one sentence, without a path.
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture at all")
    with pytest.raises(Exception, match="This file is not a picture") as caught:
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
        # then it is refused in a sentence that tells nothing.
        with pytest.raises(urllib.error.HTTPError) as caught:
            call_api(address, [{**picture, **mark}, "ce-cifar10-lt", "own"])
        reply = caught.value.read().decode()
        assert (caught.value.code == 400 and "data" in reply) or "picture" in reply
        assert "Traceback" not in reply and "root:" not in reply and str(ROOT) not in reply


def test_an_upload_over_the_limit_is_refused(address):
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    request = urllib.request.Request(f"{address}/gradio_api/upload", head + bytes(21_500_000) + b"\r\n--b--\r\n",
                                     {"Content-Type": "multipart/form-data; boundary=b"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 413
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}/gradio_api/file={ROOT / 'zoo' / 'registry.py'}")
    assert caught.value.code == 404


def call_api(address: str, data: list) -> str:
    """The reply's text, from /predict called as curl would."""
    request = urllib.request.Request(f"{address}/gradio_api/call/predict", json.dumps({"data": data}).encode(),
                                     {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    return urllib.request.urlopen(f"{address}/gradio_api/call/predict/{event}").read().decode()


# ---- the process ----


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
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


# ---- other models ----


def test_a_model_folder_named_at_the_start_comes_first(tiny_model_folder):
    # Given the folder of a training, when the demo is told of it, then the page begins with it, beside the zoo's.
    try:
        names = models.offer([str(tiny_model_folder), "ce-cifar10-lt"])
        assert names == ["tiny", "ce-cifar10-lt"]
        assert models.find("tiny").weights == "yours"
        assert models.ready_names()[0] == "tiny"
        answer = models.model("tiny").predictor.predict(EXAMPLES / "cat.jpg")
        html = answers.cards(names, {"tiny": answers.Answer("tiny", answer, np.zeros((32, 32, 3), np.uint8))})
        assert "<h3>MetaSAug</h3>" in html and answer.top[0].label in html
        assert f'zoo.load("{tiny_model_folder}")' in model_page.how_to_load("tiny")
        # One that is named like a model of the zoo is told apart.
        assert models.offer([str(ROOT / "zoo" / "weights" / "ce-cifar10-lt")]) == ["ce-cifar10-lt (yours)"]
    finally:
        models.offer()


@pytest.mark.parametrize(("name", "says"), [("nowhere/at/all", "does not exist"), ("metasaug-inat18", "not published")])
def test_a_model_that_cannot_be_opened_ends_the_start_with_its_reason(name, says):
    done = subprocess.run([sys.executable, "app.py", name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr


def test_8142_hostile_classes_neither_swell_nor_break_the_page(tmp_path):
    # Given a model of iNaturalist's size, unmeasured groups and all, whose first label is an attack,
    counts = [max(2, int(1000 * 0.999**c)) for c in range(8142)]
    labels = ["<img src=x onerror=alert(1)>", *(f"Species number {c}" for c in range(1, 8142))]
    groups, by = assign_groups(counts)
    tested = [{"label": label, "train_images": n, "test_images": 3, "correct": c % 4}
              for c, (label, n) in enumerate(zip(labels, counts, strict=True))]
    by_group = {g: {"classes": 1, "images": 3, "correct": 1, "accuracy": 1 / 3, "interval": [0.1, 0.7]} for g in
                ("head", "medium", "tail")}
    config = {
        "architecture": "resnet50", "num_classes": 8142, "num_features": 32, "label_names": labels,
        "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [0.4] * 3, "std": [0.2] * 3, "crop_pct": 0.875,
                           "interpolation": "bilinear", "classifier": "fc"},
        "metasaug": {"name": "large", "method": "metasaug", "dataset": "many <b>species</b>", "class_counts": counts,
                     "groups": list(groups), "groups_by": by, "prior": "train",
                     "results": {"images": 24_426, "error": 0.3, "macro_error": 0.3, "worst_class_error": 1.0,
                                 "groups": by_group, "per_class": tested}},
    }
    rng = np.random.default_rng(0)
    spread = rng.random((8142, 32)).astype(np.float32)
    write_model_folder(tmp_path / "large", config, {"fc.weight": rng.normal(size=(8142, 32)).astype(np.float32)},
                       {"running": spread, "learned": spread * 0.01})
    try:
        names = models.offer([str(tmp_path / "large")])
        model = models.model(names[0])
        logits = rng.normal(size=8142).astype(np.float32)
        top = tuple(zoo.TopClass(labels[c], 0.5, groups[c], counts[c], c) for c in (0, 8141))
        said = zoo.Prediction("x", top, {"tail": 1.0}, logits=logits)
        answer = answers.Answer(names[0], said, np.zeros((9, 9, 3), np.uint8))
        # when each part of the page is made,
        parts = [long_tail.introduction(names), long_tail.page(names, [answer]), answers.only_these(names),
                 answers.cards(names, {names[0]: answer}), answers.world_in_words(names, True, 0.5),
                 model_page.facts(names[0]), directions.lead(model, 0, variation(model.folder, 0)),
                 *(directions.direction(model, 0, 1, d, []) for d in variation(model.folder, 0).directions)]
        # then none is larger than a picture, and no label is taken for HTML.
        assert max(map(len, parts)) < 120_000
        assert not any("<img src=x" in part or "<b>species" in part for part in parts)
        assert "8,142 classes" in parts[1] and "&lt;img src=x" in parts[1]
    finally:
        models.offer()


# ---- as a Space, and under load ----


def test_the_space_starts_from_its_folder_alone(tmp_path):
    # Given the folder that `make space` builds,
    folder = tmp_path / "space"
    subprocess.run([sys.executable, "-m", "zoo.demo.space", str(folder)], cwd=ROOT, check=True, capture_output=True)
    header = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
    needs = (folder / "requirements.txt").read_text(encoding="utf-8")
    assert "sdk: gradio" in header and "app_file: app.py" in header
    assert f"sdk_version: {gradio.__version__}" in header and f"gradio=={gradio.__version__}" in needs
    assert "torch" not in needs and "onnxruntime==" in needs
    # when it is started as a Space is, without this checkout and without torch,
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1"}
    (folder / "torch.py").write_text("raise ModuleNotFoundError('no torch in a Space', name='torch')")
    process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{environment['GRADIO_SERVER_PORT']}"
    assert process.stdout is not None and url in process.stdout.readline()
    # then it answers.
    client_library = pytest.importorskip("gradio_client")
    client = client_library.Client(url, verbose=False, analytics_enabled=False)
    answer = client.predict(client_library.handle_file(EXAMPLES / "ship.jpg"), "metasaug-cifar10-lt", "inverted",
                            api_name="/predict")
    assert answer["top"][0]["label"] == "ship"
    stop(process)
    # A folder of something else is not overwritten.
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    done = subprocess.run([sys.executable, "-m", "zoo.demo.space", str(tmp_path / "thesis")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "other than a Space" in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.promise("load")
@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.long)])
def test_fifty_people_at_once_get_their_own_answers_or_a_plain_busy(address, seconds, figure):
    # Given 50 clients that ask for pictures of their own, again and again, on two cores,
    outcome = load.fifty_clients(address, seconds)
    figure(f"in {seconds} s {outcome.right} answers, {outcome.busy} told busy, {outcome.wrong} wrong, "
           f"{len(outcome.broken)} broken")
    # then nothing broke: no 5xx but the full queue's 503, no wrong answer,
    assert outcome.wrong == 0 and outcome.broken == []
    assert outcome.right > 0
    # and the server still answers a newcomer.
    assert urllib.request.urlopen(address).status == 200
