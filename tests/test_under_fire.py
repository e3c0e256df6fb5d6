"""The demo under attack: each attack of benchmarks.attacks in short form, and whole in the long tests."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import zoo
from tests.test_images import as_bytes, drawing
from tests.test_pixels import RAMP, tiff
from zoo import rows
from zoo.images import NamedPicture
from zoo.pixels import Reading

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'metasaug[demo]'")

from benchmarks import attacks, load
from zoo.demo import gate, pictures, server
from zoo.demo.gate import Event, Gate, Rules
from zoo.demo.uploads import Uploads, used

pytestmark = pytest.mark.promise("demo")

ROOT = Path(__file__).resolve().parent.parent
FORMS = [pytest.param(False, id="short"), pytest.param(True, id="long", marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def demo():
    with attacks.target() as on:
        yield on


@pytest.fixture
def attacked(demo, record_property):
    """Runs an attack by its name; the demo answers afterwards, and nothing of it was a traceback."""

    def run(name: str, long: bool = False) -> dict:
        before = demo.tracebacks()
        outcome = attacks.attacked(demo, attacks.ATTACKS[name], long)
        if long:
            record_property("memory_mb", json.dumps({name: outcome.memory}))
            record_property("figure", f"{name}: grown by {outcome.figures['grown_mb']} MB")
        assert outcome.figures["answers_after"], outcome.figures
        assert demo.tracebacks() == before, "".join(demo.printed[-40:])
        return outcome.figures

    return run


# ---- bodies ----


@pytest.mark.parametrize("long", FORMS)
def test_a_large_json_body_is_refused_and_takes_no_memory(attacked, long):
    found = attacked("json_bodies", long)
    assert all("413" in status or status == "closed" for status in (*found["announced"], *found["chunked"]))
    assert found["grown_mb"] < 30


@pytest.mark.parametrize("attack", ["slow_uploads", "slow_bodies", "slow_headers"])
def test_stalled_connections_are_closed_and_keep_nobody_out(attack, tmp_path, monkeypatch):
    # Given a server that waits for half a second (the demo waits for longer), and 60 clients that stall,
    monkeypatch.setattr(gate, "SECONDS", 0.5)
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.5)
    with served(reads_all, tmp_path) as on:
        found = attacks.ATTACKS[attack](on, False)
    # then a newcomer is served meanwhile, and all of them are gone in the end.
    assert found["newcomer_status"] == 200 and found["newcomer_s"] < 5
    assert found["still_open"] == 0


@pytest.mark.long
@pytest.mark.parametrize("attack", ["slow_uploads", "slow_bodies", "slow_headers"])
def test_three_hundred_stalled_connections_are_closed(attacked, attack):
    found = attacked(attack, long=True)
    assert found["newcomer_status"] == 200 and found["newcomer_s"] < 5
    assert found["still_open"] == 0 and found["grown_mb"] < 30


def test_an_upload_that_drips_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "SECONDS", 0.5)
    with served(reads_all, tmp_path) as on:
        head = attacks.HEAD % (b"/gradio_api/upload", attacks.FORM)
        line = attacks.opened(on, head + b"Content-Length: 9999\r\n\r\n")
        answer = []
        reader = threading.Thread(target=lambda: answer.append(attacks.first_line(line)), daemon=True)
        reader.start()
        for _ in range(100):
            try:
                line.send(b"x")
            except OSError:
                break
            time.sleep(0.05)
            if answer:
                break
        reader.join(10)
        line.close()
    assert "408" in answer[0]


@pytest.mark.parametrize("long", FORMS)
def test_websockets_are_not_spoken(attacked, long):
    assert all("404" in status for status in attacked("websockets", long)["answers"])


@pytest.mark.parametrize("long", FORMS)
def test_answers_that_nobody_fetches_take_little(attacked, long):
    # The first minute fills what Gradio keeps of recent answers; after that nothing more is kept.
    for _ in range(1 + long):
        found = attacked("uncollected", long)
        assert set(map(int, found["statuses"])) <= {200, 503}
    assert found["grown_mb"] < 40


def test_a_session_that_fetches_nothing_is_stopped(tmp_path):
    # Given a client that joins the queue again and again in one session, and never reads,
    async def answers(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'data: {"msg":"process_completed"}\n\n' * 5})

    body = json.dumps({"data": [], "fn_index": 0, "session_hash": "s"}).encode()
    with served(answers, tmp_path) as on:
        statuses = [attacks.request(on, "/gradio_api/queue/join", body)[0] for _ in range(gate.UNREAD + 2)]
        assert statuses == [200] * gate.UNREAD + [429] * 2
        # then it may go on once it has read, and other sessions never notice.
        assert attacks.request(on, "/gradio_api/queue/join", body.replace(b'"s"', b'"t"'))[0] == 200
        attacks.request(on, "/gradio_api/queue/data?session_hash=s")
        assert attacks.request(on, "/gradio_api/queue/join", body)[0] == 200


# ---- uploads ----


@pytest.mark.parametrize("long", FORMS)
def test_hostile_uploads_get_a_plain_answer_each_and_leave_no_memory(attacked, long):
    found = attacked("hostile_uploads", long)
    assert set(found["answers"]) <= {"event: complete", "event: error"} and found["leaks"] == 0
    assert found["grown_mb"] < 50


@pytest.mark.long
def test_all_uploads_together_stay_below_the_quota(attacked):
    found = attacked("uploads_in_all", long=True)
    assert found["sent_mb"] > 2800 and found["stored_mb"] <= 2000


def test_over_the_quota_what_nobody_used_for_longest_goes_first(tmp_path):
    # Given three uploads, of which the oldest was used just now,
    uploads, now = Uploads(tmp_path, quota=250), time.time()
    for name, age in (("old", 300), ("older", 400), ("oldest", 500)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(bytes(100))
        os.utime(tmp_path / name / "a.png", (now - age, now - age))
    used(str(tmp_path / "oldest" / "a.png"))
    # when room is made, then the longest unused goes, its folder too;
    uploads.tidy()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "oldest"]
    # and for more to come, more goes.
    with uploads.room_for(150) as room:
        assert room == 150
        assert [p.name for p in tmp_path.iterdir()] == ["oldest"]
        # What cannot fit at all, or not beside others, has no room.
        with uploads.room_for(150) as second:
            assert second is None
    with uploads.room_for(10**12) as room:
        assert room is None


# ---- jobs ----


@pytest.mark.parametrize("long", FORMS)
def test_a_zip_of_large_pictures_keeps_nobody_waiting_and_ends_by_its_budget(attacked, long):
    # Given 12 pictures of 25 megapixels (long: 5,000) in a few kB, and another visitor with three small ones,
    found = attacked("large_pictures", long)
    # then the other is done long before, and no memory stays;
    assert found["another_visitor_s"] < found["job_s"] / 2
    assert found["peak_mb"] < 800 and found["grown_mb"] < 50
    # and what the budget leaves of the many is told as not read.
    assert int(found["classified"].replace(",", "")) == 12 if not long else found["left_out"]


def test_a_visitor_who_leaves_ends_the_job(attacked):
    found = attacked("hang_up")
    assert found["cpu_s_until_rest"] < 4  # all of it: 40 and more


def test_a_job_reads_up_to_its_budget(monkeypatch):
    picture = Image.new("RGB", (100, 100))
    budget = pictures.Budget()
    budget.pixels = 25_000
    given = iter([NamedPicture(str(i), picture) for i in range(9)])
    assert len(list(pictures.each(given, [], budget))) == 3
    budget = pictures.Budget()
    budget.seconds = 0
    assert list(pictures.each(given, [], budget)) == []


def test_the_demo_reads_pictures_as_the_model_was_trained_on_them_and_notes_what_is_missing():
    deep, jpeg = tiff((RAMP * 16).astype(np.uint16)), as_bytes(drawing(), "JPEG")
    given, seen = iter([NamedPicture("deep", deep), NamedPicture("cut", jpeg[:-2])]), []
    made = list(pictures.each(given, seen, pictures.Budget(), Reading(white=4080)))
    assert len(made) == 2 and np.asarray(made[0].picture).max() == 255 and "missing" in seen[1][1] and not seen[0][1]
    row = pictures.Row(zoo.Prediction("cut", top=(zoo.TopClass("cat", 0.9, "head", 9, 0),), note=seen[1][1]))
    for shown in (pictures.gallery([row]), pictures.table([row], pictures.View())):
        assert f"cut ({seen[1][1]})" in shown


def test_turns_go_round():
    # Given one who holds the turn, and others who ask for it twice each, when it is let go,
    turns, order = pictures.Turns(), []

    def worker(name: str) -> None:
        for _ in range(2):
            with turns.turn():
                order.append(name)
                time.sleep(0.05)

    threads = [threading.Thread(target=worker, args=(name,)) for name in "ab"]
    with turns.turn():
        for thread in threads:
            thread.start()
            time.sleep(0.05)
    for thread in threads:
        thread.join(10)
    # then they alternate.
    assert order in (list("abab"), list("baba"))


@given(st.text(max_size=30))
def test_no_cell_is_a_formula_and_every_text_comes_back(text):
    assert not rows.safe(text).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert rows.plain(rows.safe(text)) == text


def test_a_csv_of_hostile_file_names_holds_no_formula():
    for name in ("=1+1.png", "+x.png", "-2+3.png", "@SUM(1).png", "\t=x.png", "'=x.png"):
        path, *_, error = rows.Layout().cells(zoo.Prediction(name, error=f"{name} is not a picture"))
        assert path == f"'{name}" and rows.plain(path) == name
        assert not error.startswith(("=", "+", "-", "@", "\t"))


# ---- who asks ----


def test_other_names_and_other_sites_are_refused(attacked):
    found = attacked("other_names")
    assert set(found["foreign_names"].values()) <= {400, 421}
    assert set(found["own_names"].values()) == {200}
    assert set(found["foreign_origins"].values()) == {403}
    assert not any(found["permissions"].values()) and not found["forwarded_believed"]
    assert all(found["headers"].values())


@pytest.mark.parametrize(("rules", "host", "status"), [
    (Rules("0.0.0.0"), "192.168.1.5:7860", 200), (Rules("0.0.0.0"), socket.gethostname(), 200),
    (Rules("0.0.0.0"), "lab.example.org", 421), (Rules("0.0.0.0", ("lab.example.org",)), "lab.example.org", 200),
    (Rules("0.0.0.0", ("lab.example.org",)), "lab.example.org.evil.example", 421),
    (Rules("127.0.0.1", ("lab.example.org",)), "Lab.Example.org:80", 200), (Rules("::1"), "[::1]:7860", 200),
    (Rules("127.0.0.1"), "10.0.0.1", 421), (Rules("127.0.0.1", trust_proxy=True), "anything.example", 200),
    (Rules("127.0.0.1"), "demo.localhost", 200)], ids=str)
def test_names_are_allowed_by_the_address_and_by_flags(tmp_path, rules, host, status):
    with served(reads_all, tmp_path, rules) as on:
        assert attacks.request(on, "/config", Host=host)[0] == status


def test_a_password_is_asked_for_on_every_route(tmp_path):
    with served(reads_all, tmp_path, Rules(auth="me:se:cret")) as on:
        good = {"Authorization": "Basic " + base64.b64encode(b"me:se:cret").decode()}
        wrong = {"Authorization": "Basic " + base64.b64encode(b"me:guess").decode()}
        for path in ("/", "/assets/a.js", "/config", "/gradio_api/heartbeat/x"):
            assert attacks.request(on, path)[0] == 401
            assert attacks.request(on, path, **good)[0] == 200
        assert attacks.request(on, "/gradio_api/upload", b"x")[0] == 401
        # A wrong one takes a second, so that nobody tries many.
        began = time.monotonic()
        assert attacks.request(on, "/", **wrong)[0] == 401
        assert time.monotonic() - began >= 1


def test_a_password_without_a_colon_is_named():
    done = subprocess.run([sys.executable, "app.py", "--auth", "secret"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "user:password" in done.stderr


@pytest.mark.browser
def test_it_works_below_a_path_of_a_reverse_proxy_with_a_password(chromium):
    # Given a lab's web server that serves the demo below /zoo, and a password,
    with attacks.target(ROOT, "--root-path", "/zoo", "--trust-proxy", "--auth", "me:secret") as on, \
            proxied(on.port, "/zoo") as (front, outside):
        context = chromium.new_context(http_credentials={"username": "me", "password": "secret"})
        page = context.new_page()
        page.set_default_timeout(90_000)
        page.goto(f"http://127.0.0.1:{front}/zoo/")
        # when a person uses it, then it answers, and asks nothing outside that path.
        page.get_by_role("button", name="Example: ship").click()
        page.locator(".best").nth(1).wait_for()
        context.close()
        client_library = pytest.importorskip("gradio_client")
        client = client_library.Client(f"http://127.0.0.1:{front}/zoo/", verbose=False, analytics_enabled=False,
                                       httpx_kwargs={"auth": ("me", "secret")})
        assert client.predict(api_name="/models")
    assert set(outside) <= {"/favicon.ico"}  # which browsers ask every site for


# ---- requests that make no sense ----


@pytest.mark.parametrize("long", FORMS)
def test_what_makes_no_sense_is_refused_in_a_sentence(attacked, long):
    found = attacked("malformed", long)
    assert set(found["statuses"]) <= {200, 400, 404, 413, 422, 429}, found["statuses"]
    assert found["without_a_sentence"] == 0


def test_an_upload_is_named_without_a_path_of_the_server(demo):
    path = load.upload(demo.url, load.EXAMPLES / "ship.jpg")
    assert path.startswith("uploads/") and path.endswith("ship.jpg")
    assert attacks.request(demo, f"/gradio_api/file={path}")[1] == (load.EXAMPLES / "ship.jpg").read_bytes()
    for other in ("/etc/passwd", "uploads/../../app.py", f"{ROOT}/app.py", "app.py"):
        status, reply = attacks.request(demo, f"/gradio_api/file={other}")
        assert status == 404 and b"/" not in reply
    # Nor does any other answer.
    for route in ("/", "/config", "/gradio_api/info"):
        reply = attacks.request(demo, route)[1]
        assert str(demo.folder).encode() not in reply and str(ROOT).encode() not in reply


# ---- a server for the gate alone ----


async def reads_all(scope, receive, send):
    """An application that reads what comes and says that it has."""
    if scope["type"] == "lifespan":
        return
    while scope["method"] == "POST" and (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"read"})


@contextmanager
def served(app, folder: Path, rules: Rules | None = None):
    """An application behind a gate, as the demo is served."""
    gated = Gate(app, rules or Rules(), {0: Event([])}, {"predict": Event([]), "models": Event([])}, Uploads(folder))
    with server.served(gated, "127.0.0.1", 0) as url:
        yield SimpleNamespace(url=url, port=int(url.rsplit(":", 1)[1]))


@contextmanager
def proxied(back: int, below: str):
    """A reverse proxy that serves the demo below a path: its port, and what was asked for outside the path."""
    import httpx
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    outside: list[str] = []
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    front = listener.getsockname()[1]
    client = httpx.AsyncClient(timeout=None)

    async def forward(request):
        path = request.url.path
        if not path.startswith(below):
            outside.append(path)
            return PlainTextResponse("not mine", 404)
        name = f"127.0.0.1:{front}"
        headers = {k: v for k, v in request.headers.items() if k != "host"} | {
            "host": name, "x-forwarded-host": name, "x-forwarded-proto": "http"}
        asked = client.build_request(request.method, f"http://127.0.0.1:{back}{path.removeprefix(below) or '/'}",
                                     params=request.query_params, headers=headers, content=await request.body())
        reply = await client.send(asked, stream=True)
        kept = {k: v for k, v in reply.headers.items() if k != "transfer-encoding"}
        return StreamingResponse(reply.aiter_raw(), reply.status_code, kept)

    app = Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST", "HEAD"])])
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield front, outside
    finally:
        server.should_exit = True
        thread.join(10)
