"""Attack a running demo, and report its answers and the server's memory over time.

    python -m benchmarks.attacks                    # all, in short form, on a demo that it starts
    python -m benchmarks.attacks --long --only json_bodies slow_uploads
    python -m benchmarks.attacks --root OTHER       # another checkout: before and after
"""

import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from benchmarks import load

ROOT = Path(__file__).resolve().parent.parent
HEAD = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: %s\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
FORM = b"multipart/form-data; boundary=b"


@dataclass
class Target:
    """A demo under attack: its address, its process, and what it printed."""

    url: str
    process: subprocess.Popen
    folder: Path  # of its uploads
    printed: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def memory(self) -> float:
        """Resident memory in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu(self) -> float:
        """Seconds of CPU time so far."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def stored(self) -> float:
        """MB in the folder of uploads."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file()) / 1e6

    def tracebacks(self) -> int:
        return sum(line.startswith("Traceback") for line in self.printed)


@contextmanager
def target(root: Path = ROOT, *flags: str) -> Iterator[Target]:
    """Start a demo on a free port."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": scratch,
                       "PYTHONPATH": str(root)}
        process = subprocess.Popen([sys.executable, "app.py", "--port", "0", *flags], cwd=root, env=environment,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        printed: list[str] = []
        url = ""
        for line in process.stdout:
            printed.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                url = found[0]
                break
        if not url:
            raise RuntimeError(f"the demo did not start:\n{''.join(printed)}")
        reader = threading.Thread(target=lambda: printed.extend(process.stdout or ()), daemon=True)
        reader.start()
        try:
            yield Target(url, process, Path(scratch), printed)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            reader.join(10)


@dataclass
class Outcome:
    """Result of an attack: figures by name, and the server's memory in MB every half second."""

    figures: dict[str, Any]
    memory: list[float]


def attacked(on: Target, attack: Callable[[Target, bool], dict[str, Any]], long: bool = False) -> Outcome:
    """Run an attack and watch the memory. Classify a picture before and after it, as a visitor would."""
    load.ask(on.url, load.upload(on.url, load.EXAMPLES / "ship.jpg"))
    memory, over = [on.memory()], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            memory.append(on.memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        figures = attack(on, long)
    finally:
        over.set()
        watcher.join()
    began = time.monotonic()
    told, answer = load.ask(on.url, load.upload(on.url, load.EXAMPLES / "ship.jpg"), timeout=60)
    figures |= {"answers_after": answer is not None, "answer_after_s": round(time.monotonic() - began, 1),
                "grown_mb": round(on.memory() - memory[0]), "peak_mb": round(max(memory)),
                "tracebacks": on.tracebacks()}
    if answer is None:
        figures["told_after"] = told
    return Outcome(figures, [round(m) for m in memory])


# ---- pieces ----


def request(on: Target, path: str, body: bytes | None = None, method: str | None = None, timeout: float = 30,
            **headers: str) -> tuple[int, bytes]:
    """Status and content of the answer; status 0 if the connection was closed."""
    kind = {"Content-Type": "application/json"} if body is not None else {}
    asked = urllib.request.Request(on.url + path, body, {**kind, **headers}, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=timeout) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(error).encode()


def opened(on: Target, start: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", on.port), timeout=10)
    connection.sendall(start)
    return connection


def still_open(connections: list[socket.socket]) -> int:
    """Connections that the server has neither answered nor closed."""
    waiting = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            waiting += 1
        except OSError:
            pass
    return waiting


def first_line(connection: socket.socket) -> str:
    connection.settimeout(20)
    with contextlib.suppress(OSError):
        return connection.recv(200).split(b"\r\n")[0].decode()
    return "closed"


def image(width: int, height: int) -> bytes:
    """A black PNG: few bytes for many pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(width + 1)) for _ in range(height)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def overlapping_tags(entries: int = 5000, size: int = 900_000) -> bytes:
    """A TIFF without a picture, or EXIF data: all its tags point to the same bytes, 4.5 GB if each is read."""
    data_at = 8 + 2 + 12 * entries + 4
    tags = b"".join(struct.pack("<HHII", 0x9000 + i, 7, size, data_at) for i in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + tags + bytes(4) + bytes(size)


def zip_of(content: bytes, copies: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for i in range(copies):
            archive.writestr(f"{i:05}.png", content)
    return buffer.getvalue()


def upload_bytes(on: Target, name: str, content: bytes) -> str:
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    status, reply = request(on, "/gradio_api/upload", head + content + b"\r\n--b--\r\n", timeout=60,
                            **{"Content-Type": FORM.decode()})
    if status != 200:
        raise RuntimeError(f"HTTP {status}: {reply[:200]!r}")
    return json.loads(reply)[0]


# ---- bodies ----


def json_bodies(on: Target, long: bool) -> dict[str, Any]:
    """Large JSON bodies, with their length announced and in chunks."""
    bodies, size = (8, 100_000_000) if long else (2, 30_000_000)
    body = b'{"data": ["' + b"x" * size + b'"]}'
    path = b"/gradio_api/call/predict"
    announced: Counter[str] = Counter()
    chunked: Counter[str] = Counter()
    for _ in range(bodies):
        with opened(on, HEAD % (path, b"application/json") + b"Content-Length: %d\r\n\r\n" % len(body)) as line:
            with contextlib.suppress(OSError):
                line.settimeout(60)
                line.sendall(body)
            announced[first_line(line)] += 1
        with opened(on, HEAD % (path, b"application/json") + b"Transfer-Encoding: chunked\r\n\r\n") as line:
            with contextlib.suppress(OSError):
                line.settimeout(60)
                for start in range(0, len(body), 1_000_000):
                    piece = body[start : start + 1_000_000]
                    line.sendall(b"%x\r\n" % len(piece) + piece + b"\r\n")
                line.sendall(b"0\r\n\r\n")
            chunked[first_line(line)] += 1
    time.sleep(2)
    return {"bytes_each": len(body), "announced": dict(announced), "chunked": dict(chunked)}


def slow_uploads(on: Target, long: bool) -> dict[str, Any]:
    """Uploads that begin and then stall; meanwhile a new visitor sends a request."""
    return _stalled(on, HEAD % (b"/gradio_api/upload", FORM) + b"Content-Length: 1000000\r\n\r\n" + PART, long)


def slow_bodies(on: Target, long: bool) -> dict[str, Any]:
    """JSON bodies that stall."""
    return _stalled(on, HEAD % (b"/gradio_api/call/predict", b"application/json") + b'Content-Length: 99\r\n\r\n{"da',
                    long)


def slow_headers(on: Target, long: bool) -> dict[str, Any]:
    """Connections that never finish their request's header and send a byte now and then."""
    return _stalled(on, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-", long, drip=b"x")


def _stalled(on: Target, start: bytes, long: bool, drip: bytes = b"") -> dict[str, Any]:
    count, patience = (300, 40) if long else (60, 26)
    lines = [opened(on, start) for _ in range(count)]
    began = time.monotonic()
    status, _ = request(on, "/config")
    newcomer = round(time.monotonic() - began, 2)
    while time.monotonic() - began < patience and still_open(lines):
        time.sleep(1)
        for line in lines if drip else ():
            with contextlib.suppress(OSError):
                line.send(drip)
    left = still_open(lines)
    for line in lines:
        line.close()
    return {"connections": count, "newcomer_status": status, "newcomer_s": newcomer, "seconds": patience,
            "still_open": left}


def websockets(on: Target, long: bool) -> dict[str, Any]:
    """Upgrades to a protocol that the demo does not speak."""
    start = (b"GET /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
             b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
    lines = [opened(on, start) for _ in range(200 if long else 20)]
    answers = Counter(first_line(line) for line in lines)
    for line in lines:
        line.close()
    return {"answers": dict(answers)}


def uploads_in_all(on: Target, long: bool) -> dict[str, Any]:
    """More uploads than the server's quota, of different contents."""
    requests, files = (30, 5) if long else (3, 2)
    statuses: Counter[int] = Counter()
    for _ in range(requests):
        parts = b"".join(PART + os.urandom(19_000_000) + b"\r\n" for _ in range(files))
        statuses[request(on, "/gradio_api/upload", parts + b"--b--\r\n", timeout=120,
                         **{"Content-Type": FORM.decode()})[0]] += 1
    return {"sent_mb": 19 * requests * files, "statuses": dict(statuses), "stored_mb": round(on.stored())}


def hostile_uploads(on: Target, long: bool) -> dict[str, Any]:
    """Damaged pictures, and tags that all point to the same bytes; each is uploaded and classified."""
    import numpy as np

    rng, good = np.random.default_rng(0), (load.EXAMPLES / "ship.jpg").read_bytes()
    answers: Counter[str] = Counter()
    leaks = 0
    for i in range(1000 if long else 60):
        changed = bytearray(good[: int(rng.integers(1, len(good)))] if i % 3 == 0 else good)
        for at in rng.integers(len(changed), size=20):
            changed[at] = int(rng.integers(256))
        content = overlapping_tags() if i % 20 == 7 else bytes(changed)
        data = [{"path": upload_bytes(on, f"{i}.jpg", content), "meta": {"_type": "gradio.FileData"}},
                load.MODEL, "own"]
        reply = load.reply(on.url, {"data": data}, 60)
        answers[reply.partition("\n")[0] or "none"] += 1
        leaks += "Traceback" in reply or str(on.folder) in reply or str(ROOT) in reply
    return {"uploads": sum(answers.values()), "answers": dict(answers), "leaks": leaks}


def uncollected(on: Target, long: bool) -> dict[str, Any]:
    """Requests whose answers are never fetched."""
    uploaded = load.upload(on.url, load.EXAMPLES / "ship.jpg")
    body = json.dumps({"data": [{"path": uploaded, "meta": {"_type": "gradio.FileData"}}, load.MODEL, "own"]}).encode()
    statuses: Counter[int] = Counter()
    until = time.monotonic() + (60 if long else 5)
    while time.monotonic() < until:
        statuses[request(on, "/gradio_api/call/predict", body)[0]] += 1
    time.sleep(3)
    return {"requests": sum(statuses.values()), "statuses": dict(statuses)}


# ---- jobs ----


class Job:
    """A job of one visitor, started as the Folder tab does; `read` follows it to its end."""

    def __init__(self, on: Target, name: str, content: bytes, session: str):
        self.on, self.session, self.began = on, session, time.monotonic()
        config = json.loads(request(on, "/config")[1])
        event = next(d for d in config["dependencies"] if d["api_name"] == "run")
        file = {"path": upload_bytes(on, name, content), "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        self.uploaded = time.monotonic()
        self.status, _ = request(on, "/gradio_api/queue/join", json.dumps({
            "data": [[file], load.MODEL], "fn_index": event["id"], "session_hash": session,
            "trigger_id": None}).encode())
        self.stream = urllib.request.urlopen(f"{on.url}/gradio_api/queue/data?session_hash={session}", timeout=1200)

    def read(self, until: Callable[[str], bool] = lambda line: "process_completed" in line) -> tuple[str, float]:
        """The first line of the stream that `until` accepts, and the seconds since the job began."""
        for line in self.stream:
            if until(line.decode()):
                return line.decode(), time.monotonic() - self.uploaded
        return "", time.monotonic() - self.uploaded


def _progress(line: str) -> bool:
    return "<progress" in line


def large_pictures(on: Target, long: bool) -> dict[str, Any]:
    """A small zip of pictures of 25 megapixels; meanwhile another visitor classifies three small ones."""
    packed = zip_of(image(5000, 5000), 5000 if long else 12)
    hostile = Job(on, "large.zip", packed, "hostile")
    _, first = hostile.read(_progress)
    small = Job(on, "small.zip", zip_of(image(64, 64), 3), "small")
    _, other = small.read()
    last, whole = hostile.read()
    found = re.search(r"([\d,]+) pictures? classified(?:, ([\d,]+) could)?", last)
    return {"zip_mb": round(len(packed) / 1e6, 1), "first_progress_s": round(first, 1),
            "another_visitor_s": round(other, 1), "job_s": round(whole, 1),
            "classified": found[1] if found else last[:200], "left_out": found[2] if found else None}


def hang_up(on: Target, long: bool) -> dict[str, Any]:
    """A visitor starts a job of large pictures and leaves: CPU time until the server rests, for up to a minute."""
    def work() -> float:
        before = on.cpu()
        time.sleep(1)
        return on.cpu() - before

    resting = max(work() for _ in range(3))  # Gradio's queue polls a thousand times a second
    job = Job(on, "large.zip", zip_of(image(5000, 5000), 60), "leaves")
    job.read(_progress)
    job.stream.close()
    worked: list[float] = []
    while len(worked) < 60 and (len(worked) < 2 or min(worked[-2:]) > 1.5 * resting + 0.02):
        worked.append(work())
    return {"resting_cpu": round(resting, 2), "s_until_rest": len(worked) - 2,
            "cpu_s_until_rest": round(sum(worked) - len(worked) * resting, 2)}


# ---- hosts, origins, malformed requests ----


def other_names(on: Target, long: bool) -> dict[str, Any]:
    """Requests under another host name (DNS rebinding), and from pages of other sites."""
    body = b'{"data": []}'
    names = {name: request(on, "/config", Host=name)[0] for name in
             ("evil.example", f"evil.example:{on.port}", "127.0.0.1.evil.example", "", "[::1", "192.168.1.5")}
    own = {name: request(on, "/config", Host=name)[0] for name in ("localhost", f"127.0.0.1:{on.port}", "[::1]:80")}
    origins, allowed = {}, {}
    for origin in ("http://evil.example", "null", "https://127.0.0.1", f"http://127.0.0.1:{on.port + 1}"):
        origins[origin] = request(on, "/gradio_api/call/models", body, Origin=origin)[0]
        asked = urllib.request.Request(f"{on.url}/config", headers={"Origin": origin})
        with urllib.request.urlopen(asked, timeout=30) as reply:
            allowed[origin] = {n: v for n, v in reply.headers.items() if n.lower().startswith("access-control")}
    asked = urllib.request.Request(f"{on.url}/config", headers={"X-Forwarded-Host": "evil.example"})
    with urllib.request.urlopen(asked, timeout=30) as reply:
        forwarded = b"evil.example" in reply.read()
        headers = {name.lower() for name in reply.headers}
    return {"foreign_names": names, "own_names": own, "foreign_origins": origins, "permissions": allowed,
            "forwarded_believed": forwarded,
            "headers": {name: name in headers for name in ("content-security-policy", "x-content-type-options")}}


def malformed(on: Target, long: bool) -> dict[str, Any]:
    """Requests that make no sense: unknown names, wrong counts, types and nesting. Each must be refused plainly."""
    path = "/gradio_api/call/predict"
    good = {"path": load.upload(on.url, load.EXAMPLES / "ship.jpg"), "meta": {"_type": "gradio.FileData"}}
    bodies: list[tuple[str, bytes]] = [(f"/gradio_api/{kind}/nonsense", b'{"data": []}') for kind in ("call", "run")]
    bodies += [(path, b) for b in (b"", b"null", b"[]", b"{", b'"x"', b"\xff", b"[" * 90_000, b"9" * 9_000,
                                   b'{"data": null}', b'{"data": {}}')]
    odd: list[Any] = [None, 7, "", "x", [], {}, [[]], {"path": 7}, {"path": "/etc/passwd"}, {"url": "http://a"}, 1e308,
                      True, {"meta": {"_type": "gradio.FileData"}}, {"path": good["path"], "size": "many"}]
    for value in odd:
        bodies += [(path, json.dumps({"data": data}).encode()) for data in
                   ([value, load.MODEL, "own"], [good, value, "own"], [good, load.MODEL, value], [value], [value] * 4)]
    for index in (*range(30 if long else 14), -1, 999, "0", None, 1.5):
        for value in odd[:: 1 if long else 4]:
            for count in range(5):
                bodies.append(("/gradio_api/queue/join", json.dumps({
                    "data": [value] * count, "fn_index": index, "session_hash": "attack", "event_data": value,
                    "trigger_id": value}).encode()))
    statuses: Counter[int] = Counter()
    empty = []
    for where, body in bodies:
        status, reply = request(on, where, body)
        if status == 200 and where == path:
            event = json.loads(reply)["event_id"]
            told = request(on, f"{path}/{event}")[1].decode()
            status = 200 if "event: complete" in told else 422
            if re.search(r"data: (null|\{\"error\": null)", told):
                empty.append(body.decode()[:200])
        statuses[status] += 1
    time.sleep(3)
    return {"requests": len(bodies), "statuses": dict(statuses), "without_a_sentence": len(empty),
            "examples": empty[:3]}


ATTACKS: dict[str, Callable[[Target, bool], dict[str, Any]]] = {
    f.__name__: f for f in (json_bodies, slow_bodies, slow_headers, slow_uploads, websockets, uncollected,
                            uploads_in_all, hostile_uploads, large_pictures, hang_up, other_names, malformed)}


def main(only: tuple[str, ...] = (), long: bool = False, root: Path = ROOT, out: Path | None = None) -> None:
    """Attack a demo of this machine.

    Args:
        only: Attacks to run; all by default.
        long: Run the full attacks instead of their short form.
        root: The checkout whose demo is attacked.
        out: Append one JSON object per attack to this file.
    """
    for name in only or ATTACKS:
        with target(root.resolve()) as on:
            outcome = attacked(on, ATTACKS[name], long)
            if outcome.figures["tracebacks"]:
                print("".join(on.printed[-60:]), file=sys.stderr)
        line = json.dumps({"attack": name, "long": long, **outcome.figures, "memory_mb": outcome.memory})
        print(line, flush=True)
        if out is not None:
            with open(out, "a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.attacks")
